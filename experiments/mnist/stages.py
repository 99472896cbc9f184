"""The stages of training: judge, autoencoder, latents, diffusion. Each goes on where it stopped."""

import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from eqxldm.data import Batches, cache_dir, image_batches, to_float
from eqxldm.digests import digest
from eqxldm.durable import replacing
from eqxldm.models import AutoencoderKL
from eqxldm.training import (
    adamw,
    exponential,
    init_state,
    make_loss,
    make_train_step,
    measure_latents,
)
from experiments.common.classifier import ConvClassifier

from ..common import stages as shared
from ..common.batching import map_images
from ..common.judge import classifier_loss, read_judge, write_judge
from ..common.loop import Keep, train_stage
from ..common.run import RunFolder, as_dict, write_json
from ..common.spaces import Pixels, Trained, posterior_draw
from ..common.stages import averaged, read_about
from ..common.streams import data_seed, stage_key
from ..common.terminal import Signals, StageBar, UserError
from . import config as cfg
from .config import Config
from .data import Digits

DATA, STATS = "data.json", "autoencoder.json"
MEND = "delete latents.npz and train."
Arrays = dict[str, np.ndarray]


@dataclass
class Job:
    """What every stage needs, and the seconds that each took."""

    config: Config
    digits: Digits
    run: RunFolder
    mesh: Mesh
    signals: Signals
    timings: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return cfg.image_shape(self.digits)

    def images(self, stage: str, options: Any) -> Batches:
        return image_batches(
            self.digits.train,
            options.batch_size,
            size=self.image_shape[1:],
            channels=self.image_shape[0],
            seed=data_seed(self.config, stage),
            flip=False,
        )

    def train(self, stage: str, step_fns: Any, state: Any, batches: Batches, options: Any) -> Any:
        """`train_stage` with the job's seed, mesh and run folder."""
        state, self.timings[stage] = train_stage(
            stage,
            step_fns,
            state,
            batches,
            batch_size=options.batch_size,
            key=stage_key(self.config, stage, "step"),
            mesh=self.mesh,
            run=self.run,
            signals=self.signals,
            keep=Keep(self.config.checkpoint_every),
        )
        return state


def classifier_state(config: Config, image_shape, num_classes: int):
    model = cfg.make_classifier(config, image_shape, num_classes)
    return shared.classifier_state(model, config.classifier)


def train_classifier(job: Job) -> ConvClassifier:
    """The judge, from the cache if the same one was trained before."""
    options, digits = job.config.classifier, job.digits
    state, static, optimizer = classifier_state(job.config, job.image_shape, digits.num_classes)
    identity = {
        "classifier": as_dict(options),
        "seed": job.config.seed,
        "data": digits.train.digest(),
    }
    cached = cache_dir() / "classifiers" / f"{digits.name}-{digest(_encoded(identity))[:16]}.eqx"
    kept = read_judge(cached, averaged(state, static))
    if kept is not None:
        job.timings["classifier"] = {"seconds": 0.0}
        return kept
    step = make_train_step(classifier_loss, static, optimizer, ema_decays=(exponential(0.99),))
    batches = job.images("classifier", options)
    state = job.train("classifier", [(options.steps, step)], state, batches, options)
    model = averaged(state, static)
    write_judge(cached, model)
    return model


def _encoded(identity: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(repr(identity).encode(), np.uint8)


def autoencoder_state(config: Config, channels: int):
    return shared.autoencoder_state(config, config.autoencoder, channels)


def train_autoencoder(job: Job) -> AutoencoderKL:
    """The averaged autoencoder, its latents not yet normalised."""
    options = job.config.autoencoder
    state, statics, optimizers = autoencoder_state(job.config, job.image_shape[0])
    prepare = lambda batch, key: to_float(batch["image"], pad=options.pad)
    phases = shared.autoencoder_phases(options, statics, optimizers, prepare)
    state = job.train("autoencoder", phases, state, job.images("autoencoder", options), options)
    return averaged(state.autoencoder, statics[0])


def describe_data(job: Job) -> None:
    """`data.json`: what a finished run must know of its data."""
    about = {"image_shape": job.image_shape, "num_classes": job.digits.num_classes}
    write_json(job.run.path / DATA, about)


def encode_training_set(job: Job, autoencoder: AutoencoderKL) -> tuple[AutoencoderKL, Arrays]:
    """The training images' raw posteriors, and the autoencoder normalised by their statistics.

    `latents.npz` holds the posteriors, `autoencoder.json` their statistics, both with the digest
    of the autoencoder that made them.
    """
    begin = time.monotonic()
    made_by = digest(eqx.filter(autoencoder, eqx.is_array))
    path = job.run.path / "latents.npz"
    latents = _read_latents(path, made_by)
    if latents is None:
        latents = _encode(job, autoencoder)
        shift, scale = measure_latents(latents["mean"], latents["logvar"])
        stats = {"made_by": made_by, "shift": shift, "scale": scale}
        write_json(job.run.path / STATS, stats)  # first: latents.npz says that both are there
        with replacing(path) as temporary:
            np.savez(temporary, made_by=made_by, mean=latents["mean"], logvar=latents["logvar"])
        job.run.log(stage="latents", seconds=time.monotonic() - begin)
    job.timings["latents"] = {"seconds": shared.last_seconds(job.run, "latents")}
    return normalised(autoencoder, job.run), latents


def normalised(autoencoder: AutoencoderKL, run: RunFolder) -> AutoencoderKL:
    """The autoencoder with its run's latent statistics."""
    stats = read_about(run, STATS, "made_by", "shift", "scale", mend=MEND)
    if stats["made_by"] != digest(eqx.filter(autoencoder, eqx.is_array)):
        raise UserError(f"{run.path / STATS} belongs to another autoencoder; {MEND}")
    return autoencoder.with_latent_stats(tuple(stats["shift"]), tuple(stats["scale"]))


def _encode(job: Job, autoencoder: AutoencoderKL) -> Arrays:
    def encode(autoencoder, images):
        x = to_float(images, pad=job.config.autoencoder.pad)
        posterior = jax.vmap(autoencoder.posterior)(x)
        return posterior.mean.astype(jnp.float16), posterior.logvar.astype(jnp.float16)

    images = job.digits.train_images
    with StageBar("latents", len(images), "image") as bar:
        mean, logvar = map_images(encode, autoencoder, images, bar.update)
    return {"mean": mean, "logvar": logvar}


def _read_latents(path: Path, made_by: str) -> Arrays | None:
    """The cached latents, None if there are none, they are damaged or another model's."""
    try:
        with np.load(path) as file:
            if str(file["made_by"]) == made_by:
                return {"mean": file["mean"], "logvar": file["logvar"]}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    return None


def diffusion_state(config: Config, shape: tuple[int, int, int], num_classes: int):
    c = config.diffusion
    assert c.learning_rate is not None and c.steps is not None
    rate = shared.warmup_cosine(c.learning_rate, c.steps, c.warmup)
    optimizer = adamw(rate, b2=0.99, weight_decay=c.weight_decay, clip_norm=c.clip_norm)
    network = cfg.make_network(config, shape, num_classes)
    return *init_state(network, optimizer, num_emas=1), optimizer


def padded_shape(
    config: Config, space: AutoencoderKL | Pixels, image_shape
) -> tuple[int, int, int]:
    """What the denoiser sees of images of this shape, with their border."""
    _, h, w = image_shape
    pad = 2 * config.autoencoder.pad
    return space.latent_shape(h + pad, w + pad)


def _latent_batches(job: Job, latents: Arrays) -> Batches:
    labels, batch_size = job.digits.train.labels, job.config.diffusion.batch_size
    assert labels is not None

    def read(indices, epochs):
        posteriors = {name: array[indices] for name, array in latents.items()}
        return {**posteriors, "cond": labels[indices]}, {}

    return Batches(len(labels), batch_size, read, seed=data_seed(job.config, "diffusion"))


def train_diffusion(job: Job, space: AutoencoderKL | Pixels, latents: Arrays | None) -> Trained:
    """The averaged network, trained on pixels or on fresh samples of the cached posteriors."""
    options, digits = job.config.diffusion, job.digits
    shape = padded_shape(job.config, space, job.image_shape)
    state, static, optimizer = diffusion_state(job.config, shape, digits.num_classes)

    diffusion = cfg.make_diffusion(job.config)
    loss_fn = make_loss(
        diffusion.objective,
        null=digits.num_classes,
        cond_dropout=options.label_dropout,
        prepare=_prepare(space, job.config.autoencoder.pad),
    )
    step = make_train_step(loss_fn, static, optimizer, ema_decays=(exponential(options.ema_decay),))
    pixels = latents is None
    batches = job.images("diffusion", options) if pixels else _latent_batches(job, latents)
    state = job.train("diffusion", [(options.steps, step)], state, batches, options)
    return Trained(space, averaged(state, static), shape)


def _prepare(space: AutoencoderKL | Pixels, pad: int) -> Callable[[Any, Any], Any]:
    """`prepare(batch, key) -> {"x0", "cond"}`: the images, or samples of their posteriors."""
    if isinstance(space, Pixels):
        return lambda batch, key: {
            "x0": to_float(batch["image"], pad=pad),
            "cond": batch["cond"],
        }
    return posterior_draw(space)


def load_finished(config: Config, run: RunFolder) -> tuple[Trained, int]:
    """The averaged models of a finished run and the number of classes."""
    about = read_about(run, DATA, "image_shape", "num_classes", mend=MEND)
    image_shape, num_classes = tuple(about["image_shape"]), about["num_classes"]
    space = Pixels(image_shape[0])
    if config.space == "latent":
        state, statics = eqx.filter_eval_shape(
            lambda: autoencoder_state(config, image_shape[0])[:2]
        )
        first = lambda state: state.autoencoder.ema[0]
        average = shared.final_average(run, "autoencoder", config.autoencoder.steps, state, first)
        space = normalised(eqx.combine(average, statics[0]), run)
    shape = padded_shape(config, space, image_shape)
    shapes = lambda: diffusion_state(config, shape, num_classes)[:2]
    state, static = eqx.filter_eval_shape(shapes)
    assert config.diffusion.steps is not None
    average = shared.final_average(run, "diffusion", config.diffusion.steps, state)
    return Trained(space, eqx.combine(average, static), shape), num_classes
