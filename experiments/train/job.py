"""What every stage of a run needs, and what the run folder says that it is about."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import equinox as eqx
from jax.sharding import Mesh

from eqxldm.data import ImageSource, image_batches
from eqxldm.data.image_source import sample_digest
from eqxldm.digests import digest
from eqxldm.models import LPIPS

from .conditions import Condition, KindName, make_condition
from .config import AttentionName, Config, RematName
from .networks import Autoencoder
from .options import Batch, Range, Steps
from .run import RunFolder, read_json, write_json
from .stages import Stages
from .telemetry import LogOptions
from .terminal import Signals, UserError

DATA = "data.json"


@dataclass(frozen=True)
class Inputs:
    """What is read beside --images."""

    # Held-out images of the same classes to measure against; by default training images.
    test_images: Path | None = None
    # Published weights, or a run's: a diffusers folder, autoencoder.safetensors, a run folder.
    vae: Path | None = None
    lpips: Path | None = None  # A folder with LPIPS's weights, for the autoencoder's loss.
    # A finished run whose denoiser an objective of few calls starts from; its autoencoder and its
    # latents are used, too.
    start_from: Path | None = None
    # The latent cache, which runs can share; by default latents in the run folder.
    latents: Path | None = None
    # A folder with a published sentence encoder, for --text.tokens frozen: config.json,
    # model.safetensors, tokenizer.json. It is copied into the run folder.
    text_encoder: Path | None = None
    strict: bool = False  # Stop at an unreadable image. By default it is left out and listed.


@dataclass(frozen=True)
class Compute:
    """What it runs on: an interrupted run may go on with other values."""

    # How devices share the work: data=2,fsdp=4,tensor=1. By default all are on data.
    mesh: str = ""
    # Parts of a batch of the diffusion that are computed one after the other.
    grad_accum_steps: Annotated[int, Range(1, 10**6)] = 1
    # What the backward pass computes again: everything, all but what is as narrow as a token, all
    # but the matmuls, or nothing.
    remat: RematName = "narrow"
    # cudnn is for bfloat16 on a GPU, flash for a thousand tokens and more on a TPU.
    attention: AttentionName = "xla"
    # Processes that read and decode images; 0 uses threads.
    workers: Annotated[int, Range(0, 1024)] = 0
    # Threads that read and decode, in each worker or in this process.
    threads: Annotated[int, Range(1, 1024)] = 2
    checkpoint_every: Steps = 500  # Steps between checkpoints.
    # Checkpoints whose step is a multiple of this stay; the newest two do anyway.
    keep_every: Steps | None = None
    sampling_batch: Batch = 64  # Images sampled at once, by each process.
    eval_samples: Annotated[int, Range(10, 10**6)] = 500  # Images that each --eval-every measures.


@dataclass
class Job:
    """What every stage needs."""

    config: Config
    compute: Compute
    inputs: Inputs
    source: ImageSource
    condition: Condition
    run: RunFolder
    mesh: Mesh
    signals: Signals
    log: LogOptions = field(default_factory=LogOptions)
    vae: Autoencoder | None = None
    lpips: LPIPS | None = None
    start: Any = None  # the models of --start-from
    test: ImageSource | None = None  # held-out images to measure against
    stages: Stages = field(init=False)

    def __post_init__(self):
        every, keep = self.compute.checkpoint_every, self.compute.keep_every
        seed, run = self.config.seed, self.run
        self.stages = Stages(seed, run, self.mesh, self.signals, self.log, every, keep)

    @property
    def timings(self) -> dict[str, dict[str, float]]:
        return self.stages.timings

    def images(
        self,
        stage: str,
        batch_size: int,
        *,
        size: tuple[int, int] | None = None,
        condition: Callable[[Any], Any],
    ) -> Any:
        """Batches of images for a stage, each process reading its rows."""
        return image_batches(
            self.source,
            batch_size,
            size=size or self.config.size,
            channels=self.config.pictures.channels,
            condition=condition,
            flip=self.config.pictures.flip,
            skip_unreadable=not self.inputs.strict,
            workers=self.compute.workers,
            threads=self.compute.threads,
            **self.stages.order(stage, batch_size),
        )


def describe_data(job: Job, images: Path | None, *, trains: bool) -> None:
    """`data.json`: the images, the test images and the identity of the LPIPS that the run is about;
    refuses others."""
    about: dict[str, Any] = {
        "source": job.source.digest(),
        "images": len(job.source),
        "class_names": list(job.source.class_names),
        "condition": job.condition.kind,
        "num_classes": getattr(job.condition, "num_classes", None),
    }
    test = job.test if trains else None
    if trains:
        about["test_source"] = None if test is None else test.digest()
        about["lpips"] = None if job.lpips is None else digest(eqx.filter(job.lpips, eqx.is_array))
    if not job.run.primary:
        return
    about["content"] = sample_digest(job.source)
    if trains:
        about["test_content"] = None if test is None else sample_digest(test)
    try:
        found = read_json(job.run.path / DATA, repair="--overwrite starts anew.")
    except FileNotFoundError:
        path = None if images is None else str(images.absolute())
        write_json(job.run.file(DATA), {**about, "path": path})
        return
    first = lambda v: f"{len(v)} ({', '.join(map(str, v[:3]))} ...)"
    short = lambda v: first(v) if isinstance(v, list) else str(v)[:16]
    lines = [
        f"  {name}: it has {short(found.get(name))}, now {short(value)}\n"
        for name, value in about.items()
        # A run of an earlier version does not know its test images.
        if (name not in found and not name.startswith("test_")) or found.get(name, value) != value
    ]
    if lines:
        raise UserError(
            f"the run in {job.run.path} is about other images:\n{''.join(lines)}"
            "Give the same, use another --run-dir, or --overwrite to start anew."
        )


def read_data(run: RunFolder, config: Config) -> tuple[Condition, dict[str, Any]]:
    """The condition of a run's network, and what data.json says."""
    kinds = {"condition": KindName, "class_names": list, "path": str | None}
    try:
        about = read_json(run.path / DATA, kinds, repair="Train again with --overwrite.")
    except FileNotFoundError:
        raise UserError(f"the run in {run.path} is not finished: no {DATA}.") from None
    classes = len(about["class_names"])
    return make_condition(config, about["condition"], classes, run.path), about
