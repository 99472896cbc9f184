"""The stage of the latent cache: the posteriors of all images, written once."""

import os
import time
from pathlib import Path
from typing import Any

import jax

from eqxldm.data import Latents, latent_header, open_latents, write_latents
from eqxldm.data.latent_cache import compare_headers
from eqxldm.distributed import barrier

from .autoencoder import AUTOENCODER, identity, image_encoder, load_vae
from .checks import check_writable
from .job import Job
from .networks import Autoencoder
from .run import read_json
from .terminal import StageBar, UserError, say

SKIPPED = "skipped.json"  # what write_latents leaves when all shards are there
LATENTS = "latents"


def latents_folder(job: Job) -> Path:
    return job.inputs.latents or job.run.path / LATENTS


def cache_header(job: Job, autoencoder: Autoencoder) -> dict[str, Any]:
    """What the run's latent cache must have been made from."""
    config = job.config
    return latent_header(
        job.source,
        size=config.size,
        channels=config.pictures.channels,
        shape=autoencoder.latent_shape(*config.padded),
        autoencoder=identity(autoencoder),
        shift=autoencoder.shift,
        scale=autoencoder.scale,
        dtype=config.latents.dtype,
        images_per_shard=config.latents.images_per_shard,
        condition=job.condition.read,
        mirrored=config.pictures.flip,
    )


def check_cache(job: Job, *, own: bool, overwrite: bool = False) -> None:
    """Refuses a latent cache that is there already and is another one, before anything is trained.

    The run's own is checked once the folder is known to be about these images, others before.
    """
    folder = latents_folder(job)
    real = os.path.realpath  # which takes a link to itself as it is
    if own != (real(folder) == real(job.run.path / LATENTS)):
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--latents {folder}: is a file; needed is a folder, which may be new.")
    if not own and not (folder / SKIPPED).exists():  # a whole one may be one that is read only
        check_writable(folder / "header.json", "--latents")
    if not (folder / "header.json").exists():
        return
    autoencoder = job.vae
    if autoencoder is None and not overwrite and (job.run.path / AUTOENCODER).exists():
        autoencoder = load_vae(job.run.path, job.config.pictures.channels, option="run")
    if autoencoder is None and own:  # the same one will come of the run's checkpoints
        return
    if autoencoder is None:
        raise UserError(
            f"--latents {folder}: there is a latent cache already, and this run is to train an "
            "autoencoder of its own, whose latents are others. Give the one that made it with "
            "--vae, or use another folder, or delete this one."
        )
    header = cache_header(job, autoencoder)
    found = read_json(folder / "header.json", repair="Delete the folder.")
    compare_headers(folder, found, header)


def cache_latents(job: Job, autoencoder: Autoencoder) -> Latents:
    """The posteriors of all images, and of their mirror images where they are wanted."""
    config, header, folder = job.config, cache_header(job, autoencoder), latents_folder(job)
    if job.inputs.latents is None:
        folder = job.run.file(LATENTS)
    encode = image_encoder(autoencoder, config)
    begin, complete = time.monotonic(), (folder / SKIPPED).exists()
    with StageBar("latents", len(job.source) // jax.process_count(), "image") as bar:
        write_latents(
            job.source,
            encode,
            folder,
            header,
            batch_size=encode.batch_size,
            strict=job.inputs.strict,
            condition=job.condition.read,
            progress=lambda done, total: bar.update(done),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    barrier("latents")
    latents = open_latents(folder, header)
    if not complete:
        job.run.log(stage="latents", seconds=time.monotonic() - begin)
    spent = [e.get("seconds") for e in job.run.log_entries() if e["stage"] == "latents"]
    spent = [seconds for seconds in spent if isinstance(seconds, int | float)]
    job.timings["latents"] = {"seconds": spent[-1] if spent else 0.0}
    skipped = read_json(folder / SKIPPED, repair="Delete it; it is written again.")
    if skipped:
        say(
            f"latents: {len(skipped)} unreadable images are left out, listed in "
            f"{folder / SKIPPED}; the first: {next(iter(skipped.values()))}"
        )
    return latents
