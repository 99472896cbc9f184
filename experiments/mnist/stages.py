"""The stages of training: judge, autoencoder, latents, diffusion. Each goes on where it stopped."""

import json
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
import optax
from jax.sharding import Mesh, SingleDeviceSharding

from eqxldm.checkpoints import Checkpoints, digest
from eqxldm.data import Digits, cache_dir
from eqxldm.data.images import to_float
from eqxldm.data.pipelines import training_batches
from eqxldm.models import AutoencoderKL, ConvClassifier, Posterior
from eqxldm.training import (
    AutoencoderState,
    adamw,
    init_state,
    l2_distance,
    make_autoencoder_step,
    make_diffusion_loss,
    make_train_step,
    measure_latents,
)

from ..common.loop import restore_newest, train_stage
from ..common.run import RunFolder, as_dict, replacing, write_json
from ..common.terminal import Signals, StageBar, UserError
from . import config as cfg
from .batching import map_images
from .config import Config
from .spaces import Pixels, Trained

DATA, STATS = "data.json", "autoencoder.json"
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

    def train(self, stage: str, step_fns: Any, state: Any, arrays: dict, options: Any) -> Any:
        """`train_stage` with the job's seed, mesh and run folder."""
        batches = training_batches(
            arrays, options.batch_size, seed=cfg.data_seed(self.config, stage)
        )
        state, self.timings[stage] = train_stage(
            stage,
            step_fns,
            state,
            batches,
            batch_size=options.batch_size,
            key=cfg.stage_key(self.config, stage, "step"),
            mesh=self.mesh,
            run=self.run,
            signals=self.signals,
            save_every=self.config.checkpoint_every,
        )
        return state


def warmup_cosine(peak: float, steps: int, warmup: int) -> optax.Schedule:
    """The learning rate of every stage: linear to `peak`, then a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)


def classifier_state(config: Config, image_shape, num_classes: int):
    c = config.classifier
    rate = warmup_cosine(c.learning_rate, c.steps, c.steps // 10)
    optimizer = adamw(rate, weight_decay=0.05)
    model = cfg.make_classifier(config, image_shape, num_classes)
    return *init_state(model, optimizer), optimizer


def train_classifier(job: Job) -> ConvClassifier:
    """The judge, from the cache if the same one was trained before."""
    options, digits = job.config.classifier, job.digits
    state, static, optimizer = classifier_state(job.config, job.image_shape, digits.num_classes)
    identity = {
        "classifier": as_dict(options),
        "seed": job.config.seed,
        "data": digest([digits.train_images, digits.train_labels]),
    }
    cached = cache_dir() / "classifiers" / f"{digits.name}-{digest(_encoded(identity))[:16]}.eqx"
    model = eqx.combine(state.ema, static)
    if cached.exists():
        try:
            job.timings["classifier"] = {"seconds": 0.0}
            return eqx.tree_deserialise_leaves(cached, model)
        except (RuntimeError, ValueError, EOFError, OSError):
            cached.unlink()  # damaged: train it again

    def loss_fn(model, batch, key):
        _, logits = jax.vmap(model)(to_float(batch["image"]))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(losses), {}

    step = make_train_step(loss_fn, static, optimizer, ema_decay=0.99)
    arrays = {"image": digits.train_images, "label": digits.train_labels}
    state = job.train("classifier", [(options.steps, step)], state, arrays, options)
    model = eqx.combine(state.ema, static)
    with replacing(cached) as temporary:
        eqx.tree_serialise_leaves(temporary, model)
    return model


def _encoded(identity: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(repr(identity).encode(), np.uint8)


def autoencoder_state(config: Config, channels: int):
    c = config.autoencoder
    rate = warmup_cosine(c.learning_rate, c.steps, min(50, c.steps // 2))
    optimizers = (
        adamw(rate, b2=0.99, clip_norm=1.0),
        adamw(c.discriminator_learning_rate, b1=0.5, b2=0.9),
    )
    ae_state, ae_static = init_state(cfg.make_autoencoder(config, channels), optimizers[0])
    disc = cfg.make_discriminator(config, channels)
    disc_state, disc_static = init_state(disc, optimizers[1], ema=False)
    return AutoencoderState(ae_state, disc_state), (ae_static, disc_static), optimizers


def train_autoencoder(job: Job) -> AutoencoderKL:
    """The averaged autoencoder, its latents not yet normalised."""
    options = job.config.autoencoder
    state, statics, optimizers = autoencoder_state(job.config, job.image_shape[0])

    def step_fn(adversarial: bool):
        step = make_autoencoder_step(
            *statics,
            *optimizers,
            distance=l2_distance,
            kl_weight=options.kl_weight,
            gan_weight=options.gan_weight,
            adversarial=adversarial,
            ema_decay=options.ema_decay,
        )
        return lambda state, batch, key: step(state, to_float(batch["image"], pad=options.pad), key)

    start = min(options.gan_start, options.steps) if options.gan_weight > 0 else options.steps
    phases = [(start, step_fn(False)), (options.steps, step_fn(True))]
    arrays = {"image": job.digits.train_images}
    state = job.train("autoencoder", phases, state, arrays, options)
    return eqx.combine(state.autoencoder.ema, statics[0])


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
    job.timings["latents"] = {"seconds": _last_seconds(job.run, "latents")}
    return normalised(autoencoder, job.run), latents


def normalised(autoencoder: AutoencoderKL, run: RunFolder) -> AutoencoderKL:
    """The autoencoder with its run's latent statistics."""
    stats = _read(run, STATS, "made_by", "shift", "scale")
    if stats["made_by"] != digest(eqx.filter(autoencoder, eqx.is_array)):
        raise UserError(
            f"{run.path / STATS} belongs to another autoencoder; delete latents.npz and train."
        )
    return autoencoder.with_latent_stats(tuple(stats["shift"]), tuple(stats["scale"]))


def _read(run: RunFolder, name: str, *keys: str) -> dict[str, Any]:
    path = run.path / name
    try:
        found = json.loads(path.read_text())
        missing = set(keys) - set(found)
        if missing:
            raise ValueError(f"without {', '.join(sorted(missing))}")
        return found
    except FileNotFoundError:
        raise UserError(f"the run in {run.path} is not finished: no {name}. Train first.") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete latents.npz and train.") from None


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


def _last_seconds(run: RunFolder, stage: str) -> float:
    return next((e["seconds"] for e in reversed(run.log_entries()) if e["stage"] == stage), 0.0)


def diffusion_state(config: Config, shape: tuple[int, int, int], num_classes: int):
    c = config.diffusion
    assert c.learning_rate is not None and c.steps is not None
    rate = warmup_cosine(c.learning_rate, c.steps, c.warmup)
    optimizer = adamw(rate, b2=0.99, weight_decay=c.weight_decay, clip_norm=c.clip_norm)
    return *init_state(cfg.make_network(config, shape, num_classes), optimizer), optimizer


def padded_shape(
    config: Config, space: AutoencoderKL | Pixels, image_shape
) -> tuple[int, int, int]:
    """What the denoiser sees of images of this shape, with their border."""
    _, h, w = image_shape
    pad = 2 * config.autoencoder.pad
    return space.latent_shape(h + pad, w + pad)


def train_diffusion(job: Job, space: AutoencoderKL | Pixels, arrays: Arrays) -> Trained:
    """The averaged network, trained on pixels or on fresh samples of the cached posteriors."""
    options, digits = job.config.diffusion, job.digits
    shape = padded_shape(job.config, space, job.image_shape)
    state, static, optimizer = diffusion_state(job.config, shape, digits.num_classes)

    loss_fn = make_diffusion_loss(
        cfg.make_path(options),
        cfg.make_prediction(options),
        cfg.make_time_sampler(options),
        weight=cfg.make_weight(options),
        label_dropout=options.label_dropout,
        prepare=_prepare(space, job.config.autoencoder.pad),
    )
    step = make_train_step(loss_fn, static, optimizer, ema_decay=options.ema_decay)
    arrays = {**arrays, "label": digits.train_labels}
    state = job.train("diffusion", [(options.steps, step)], state, arrays, options)
    return Trained(space, eqx.combine(state.ema, static), shape)


def _prepare(space: AutoencoderKL | Pixels, pad: int) -> Callable[[Any, Any], Any]:
    """`prepare(batch, key) -> (x0, labels)`: the images, or samples of their posteriors."""
    if isinstance(space, Pixels):
        return lambda batch, key: (to_float(batch["image"], pad=pad), batch["label"])

    def draw(mean, logvar, key):
        raw = Posterior(mean.astype(jnp.float32), logvar.astype(jnp.float32))
        return space.normalise(raw).sample(key)

    def prepare(batch, key):
        keys = jax.random.split(key, len(batch["label"]))
        return jax.vmap(draw)(batch["mean"], batch["logvar"], keys), batch["label"]

    return prepare


def load_finished(config: Config, run: RunFolder) -> tuple[Trained, int]:
    """The averaged models of a finished run and the number of classes."""
    about = _read(run, DATA, "image_shape", "num_classes")
    image_shape, num_classes = tuple(about["image_shape"]), about["num_classes"]
    space = Pixels(image_shape[0])
    if config.space == "latent":
        state, statics = eqx.filter_eval_shape(
            lambda: autoencoder_state(config, image_shape[0])[:2]
        )
        state = _final_state(run, "autoencoder", config.autoencoder.steps, state)
        space = normalised(eqx.combine(state.autoencoder.ema, statics[0]), run)
    shape = padded_shape(config, space, image_shape)
    shapes = lambda: diffusion_state(config, shape, num_classes)[:2]
    state, static = eqx.filter_eval_shape(shapes)
    assert config.diffusion.steps is not None
    state = _final_state(run, "diffusion", config.diffusion.steps, state)
    return Trained(space, eqx.combine(state.ema, static), shape), num_classes


def _final_state(run: RunFolder, stage: str, steps: int, like: Any) -> Any:
    folder = run.checkpoints / stage
    if not folder.is_dir():
        raise UserError(
            f"the run in {run.path} is not finished: no {stage} checkpoint. Train first."
        )
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.steps()
        if not found or found[-1] < steps:
            at = found[-1] if found else 0
            raise UserError(
                f"the run in {run.path} is not finished: {stage} is at step {at} of {steps}. "
                "Run the train command again to go on."
            )
        here = SingleDeviceSharding(jax.devices()[0])
        place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here)
        return restore_newest(checkpoints, jax.tree.map(place, like))[0]
