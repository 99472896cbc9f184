"""The stage of the autoencoder: the one given, or one trained here; and encoding with it."""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from eqxldm import pretrained
from eqxldm.data import to_float
from eqxldm.digests import digest
from eqxldm.models import LPIPS, AutoencoderKL
from eqxldm.sharding import batch_sharding, build_placed, place
from eqxldm.training import MeanDistance, measure_latents

from ..common import stages as shared
from ..common.processes import agreed, barrier, copied, gathered, local_mesh
from ..common.run import read_json, write_json
from ..common.stages import averaged
from ..common.streams import data_seed
from ..common.terminal import UserError
from . import config as cfg
from .config import CHANNELS, Config
from .images import decoded
from .job import Job

AUTOENCODER, TIMES = "autoencoder.safetensors", "autoencoder.json"
LOSS = "autoencoder-loss.json"


def load_vae(path: Path) -> AutoencoderKL:
    """The autoencoder of a file, a diffusers folder, or another run's folder."""
    if (path / AUTOENCODER).exists():
        path = path / AUTOENCODER
    try:
        model = pretrained.load(path)
    except (pretrained.WeightsError, OSError) as error:
        raise UserError(
            f"--vae {path}: {error} Needed is a diffusers folder of an AutoencoderKL (config.json "
            f"and weights), an {AUTOENCODER}, or the run folder that holds it."
        ) from None
    if not isinstance(model, AutoencoderKL):
        raise UserError(f"--vae {path}: is a {type(model).__name__}; needed is an AutoencoderKL.")
    if model.in_channels != CHANNELS:
        raise UserError(f"--vae {path}: is for {model.in_channels} channels; images have 3.")
    return model


def load_lpips(folder: Path) -> LPIPS:
    try:
        return pretrained.load_lpips(folder)
    except (pretrained.WeightsError, OSError, ImportError) as error:
        raise UserError(f"--lpips: {error}") from None


def identity(model: AutoencoderKL | LPIPS) -> str:
    """What the latent cache knows an autoencoder by, and a run its LPIPS."""
    return digest(eqx.filter(model, eqx.is_array))


def obtain_autoencoder(job: Job, vae: AutoencoderKL | None, lpips: LPIPS | None) -> AutoencoderKL:
    """The run's autoencoder: that of the run folder, else the one given, else one trained here.

    Whichever it is, it is kept in the run folder, with the shift and scale of its latents.
    """
    path = job.run.path / AUTOENCODER
    if not agreed(path.exists()):
        model = vae if vae is not None else _train_autoencoder(job, lpips)
        if job.run.primary:
            write_json(job.run.path / TIMES, job.timings.get("autoencoder", {"seconds": 0.0}))
            pretrained.save(_measured(job, model) if vae is None else model, path)
        barrier("autoencoder")
    job.timings["autoencoder"] = read_json(job.run.path / TIMES) or {"seconds": 0.0}
    model = load_vae(path)
    if vae is not None and (model.shift, model.scale, identity(model)) != (
        vae.shift,
        vae.scale,
        identity(vae),
    ):
        of = lambda ae: ae.latent_shape(job.config.size, job.config.size)
        raise UserError(
            f"the run in {job.run.path} has another autoencoder than --vae: "
            f"{identity(model)[:12]} with latents {of(model)}, given {identity(vae)[:12]} with "
            f"latents {of(vae)}. Leave --vae out, use another --run-dir, or --overwrite."
        )
    return model


def autoencoder_state(config: Config):
    return shared.autoencoder_state(config, config.autoencoder, CHANNELS)


def autoencoder_phases(config: Config, statics: Any, optimizers: Any) -> list[tuple[int, Any]]:
    """The train steps of random crops, without and with the discriminator."""
    options = config.autoencoder
    prepare = lambda batch, key: to_float(random_crop(batch["image"], config.size, key))
    return shared.autoencoder_phases(
        options,
        statics,
        optimizers,
        prepare,
        distance=cfg.make_distance(options),
        dtype=cfg.DTYPES[options.dtype],
    )


def _keep_loss(job: Job, lpips: LPIPS | None) -> None:
    """Training that has begun with LPIPS goes on with the same LPIPS, or is refused."""
    path = job.run.path / LOSS
    given = {"lpips": None if lpips is None else identity(lpips)}
    begun = read_json(path) or given
    if begun != given:
        name = lambda loss: loss["lpips"][:12] if loss["lpips"] else "none"
        raise UserError(
            f"the autoencoder in {job.run.path} is trained with --lpips {name(begun)}, given is "
            f"{name(given)}. Use the same, another --run-dir, or --overwrite to start anew."
        )
    barrier("loss")
    if job.run.primary and not path.exists():
        write_json(path, given)


def _train_autoencoder(job: Job, lpips: LPIPS | None) -> AutoencoderKL:
    """The averaged autoencoder, its latents not yet normalised."""
    _keep_loss(job, lpips)
    config, options = job.config, job.config.autoencoder
    _, statics, optimizers = eqx.filter_eval_shape(lambda: autoencoder_state(config))
    state = build_placed(lambda: autoencoder_state(config)[0], job.mesh)
    size = options.crop_from or config.size
    phases = autoencoder_phases(config, statics, optimizers)
    # A network's weights are an argument of the step: as constants they would be compiled in.
    perceptual = []
    if lpips is not None:
        perceptual = [place(MeanDistance(lpips, options.perceptual_weight), job.mesh)]
    batches = job.images("autoencoder", size, options.batch_size)
    state = job.train("autoencoder", phases, state, batches, options, *perceptual)
    return averaged(gathered(state.autoencoder, job.mesh), statics[0])


def random_crop(images: Any, size: int, key: Any) -> Any:
    """A `size x size` part of each image, `(b, h, w, c)`; the image itself where it has that size.

    >>> random_crop(jnp.zeros((2, 6, 6, 3), jnp.uint8), 4, jax.random.key(0)).shape
    (2, 4, 4, 3)
    """
    b, h, w, c = images.shape
    if (h, w) == (size, size):
        return images
    corners = jax.random.randint(key, (b, 2), 0, jnp.array([h - size + 1, w - size + 1]))
    cut = lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (size, size, c))
    return jax.vmap(cut)(images, corners)


class Encoder:
    """`encode(images) -> (mean, logvar)`, a batch divided over this process's devices."""

    def __init__(self, autoencoder: AutoencoderKL, batch_size: int):
        mesh = local_mesh()
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._sharding: NamedSharding = batch_sharding(mesh)
        params, static = eqx.partition(autoencoder, eqx.is_array)
        self._params = copied(params, mesh)

        @jax.jit
        def posterior(params, images):
            found = jax.vmap(eqx.combine(params, static).posterior)(to_float(images))
            return found.mean, found.logvar

        self._posterior = posterior

    def __call__(self, images: np.ndarray) -> tuple[Any, Any]:
        return self._posterior(self._params, jax.device_put(images, self._sharding))


def _measured(job: Job, autoencoder: AutoencoderKL) -> AutoencoderKL:
    """The autoencoder with the shift and scale that some training images' latents have."""
    encode = Encoder(autoencoder, job.config.latents.batch_size)
    n, size = len(job.source), encode.batch_size
    chosen = np.random.default_rng(data_seed(job.config, "autoencoder")).permutation(n)
    indices = np.sort(chosen[: job.config.latents.statistics])
    moments = []
    for images, _ in decoded(job.source, indices, job.config.size, strict=job.compute.strict):
        for i in range(0, len(images), size):
            part = images[i : i + size]
            padded = np.pad(part, [(0, size - len(part))] + [(0, 0)] * 3, mode="edge")
            moments.append([np.asarray(m)[: len(part)] for m in encode(padded)])
    shift, scale = measure_latents(*(np.concatenate(m) for m in zip(*moments, strict=True)))
    return autoencoder.with_latent_stats(shift, scale)
