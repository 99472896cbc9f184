"""What the stages of every job share: rates, the autoencoder's phases, what earlier stages left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

from eqxldm.checkpoints import CheckpointError, CheckpointMismatch, Checkpoints
from eqxldm.models import AutoencoderKL, PatchDiscriminator
from eqxldm.training import (
    AutoencoderState,
    adamw,
    exponential,
    init_state,
    l2_distance,
    make_autoencoder_step,
)

from .classifier import ConvClassifier
from .run import RunFolder
from .streams import Seeded, stage_key
from .terminal import UserError

PREPARE = 2**31 - 1  # no step's number: the keys of what is done before a step


def warmup_cosine(peak: float, steps: int, warmup: int) -> optax.Schedule:
    """The learning rate of every stage: linear to `peak`, then a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)


class ClassifierOptions(Protocol):
    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...


def classifier_state(model: ConvClassifier, options: ClassifierOptions):
    """`(state, static, optimizer)` of the judge."""
    rate = warmup_cosine(options.learning_rate, options.steps, options.steps // 10)
    optimizer = adamw(rate, weight_decay=0.05)
    return *init_state(model, optimizer, num_emas=1), optimizer


class AutoencoderOptions(Protocol):
    """The options of the autoencoder that both jobs have."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def channels(self) -> tuple[int, ...]: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def latent_channels(self) -> int: ...
    @property
    def attention(self) -> bool: ...
    @property
    def kl_weight(self) -> float: ...
    @property
    def ema_decay(self) -> float: ...
    @property
    def gan_weight(self) -> float: ...
    @property
    def gan_start(self) -> int: ...
    @property
    def discriminator_channels(self) -> int: ...
    @property
    def discriminator_layers(self) -> int: ...
    @property
    def discriminator_learning_rate(self) -> float: ...


def make_autoencoder(config: Seeded, options: AutoencoderOptions, channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        channels,
        options.latent_channels,
        channels=options.channels,
        blocks=options.blocks,
        patch_size=options.patch_size,
        groups=options.groups,
        attention=options.attention,
        key=stage_key(config, "autoencoder", "model"),
    )


def make_discriminator(
    config: Seeded, options: AutoencoderOptions, channels: int
) -> PatchDiscriminator:
    return PatchDiscriminator(
        channels,
        channels=options.discriminator_channels,
        layers=options.discriminator_layers,
        groups=options.groups,
        key=stage_key(config, "discriminator", "model"),
    )


def autoencoder_state(config: Seeded, options: AutoencoderOptions, channels: int):
    """`(state, statics, optimizers)` of the autoencoder and its discriminator."""
    rate = warmup_cosine(options.learning_rate, options.steps, min(50, options.steps // 2))
    optimizers = (
        adamw(rate, b2=0.99, clip_norm=1.0),
        adamw(options.discriminator_learning_rate, b1=0.5, b2=0.9),
    )
    ae = make_autoencoder(config, options, channels)
    ae_state, ae_static = init_state(ae, optimizers[0], num_emas=1)
    disc = make_discriminator(config, options, channels)
    disc_state, disc_static = init_state(disc, optimizers[1])
    return AutoencoderState(ae_state, disc_state), (ae_static, disc_static), optimizers


def autoencoder_phases(
    options: AutoencoderOptions,
    statics: tuple[Any, Any],
    optimizers: tuple[Any, Any],
    prepare: Callable[[Any, Any], Any],
    *,
    distance: Callable[[Any, Any], Any] = l2_distance,
    dtype: Any = jnp.float32,
) -> list[tuple[int, Any]]:
    """What `train_stage` runs: steps without the discriminator, then with it.

    `prepare(batch, key)` makes of a batch what the networks see; `key` is the step's own.
    """

    def step_fn(adversarial: bool):
        step = make_autoencoder_step(
            *statics,
            *optimizers,
            distance=distance,
            kl_weight=options.kl_weight,
            gan_weight=options.gan_weight,
            adversarial=adversarial,
            ema_decays=(exponential(options.ema_decay),),
            dtype=dtype,
        )

        def run(state, batch, key, *perceptual):
            own = jax.random.fold_in(jax.random.fold_in(key, PREPARE), state.autoencoder.step)
            return step(state, prepare(batch, own), key, *perceptual)

        return run

    start = min(options.gan_start, options.steps) if options.gan_weight > 0 else options.steps
    return [(start, step_fn(False)), (options.steps, step_fn(True))]


def read_about(run: RunFolder, name: str, *keys: str, mend: str) -> dict[str, Any]:
    """A JSON file that an earlier stage left in the run folder, with these keys."""
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
        raise UserError(f"{path} is damaged ({error}); {mend}") from None


def last_seconds(run: RunFolder, stage: str) -> float:
    """How long a stage took that logs itself once, as far as the log says."""
    return next((e["seconds"] for e in reversed(run.log_entries()) if e["stage"] == stage), 0.0)


def check_finished(run: RunFolder, stage: str, steps: int) -> Path:
    """The folder of a finished stage's checkpoints."""
    folder = run.checkpoints / stage
    if not folder.is_dir():
        raise UserError(
            f"the run in {run.path} is not finished: no {stage} checkpoint. Train first."
        )
    found = Checkpoints(folder).steps()
    if not found or found[-1] < steps:
        at = found[-1] if found else 0
        raise UserError(
            f"the run in {run.path} is not finished: {stage} is at step {at} of {steps}. "
            "Run the train command again to go on."
        )
    return folder


def final_average(
    run: RunFolder,
    stage: str,
    steps: int,
    like: Any,
    average: Callable[[Any], Any] = lambda state: state.ema[0],
) -> Any:
    """The first average of a finished stage; nothing else of its checkpoint is read.

    `like` is the stage's state and needs only shapes; the average is put where they say, without
    shardings on one device.
    """
    here = SingleDeviceSharding(jax.devices()[0])
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or here)
    wanted = jax.tree.map(place, average(like))
    nothing = jax.tree.map(lambda _: None, like)
    only = eqx.tree_at(average, nothing, wanted, is_leaf=lambda leaf: leaf is None)
    checkpoints = Checkpoints(check_finished(run, stage, steps))
    try:
        return average(checkpoints.restore(checkpoints.steps()[-1], only, part=True)[0])
    except CheckpointMismatch as error:
        raise UserError(f"{error}\nUse another --run-dir, or --overwrite to start anew.") from None
    except CheckpointError as error:  # an older one is of a training that was not finished
        raise UserError(f"{error}\nRun the train command again: it repeats the end.") from None


def averaged(state: Any, static: Any) -> Any:
    """The model of a training state's first average."""
    return eqx.combine(state.ema[0], static)
