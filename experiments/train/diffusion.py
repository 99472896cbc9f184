"""The stage of the diffusion, and the trained models of a finished run."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from eqxldm import models
from eqxldm.checkpoints import CheckpointError, Checkpoints
from eqxldm.data import Latents, latent_batches
from eqxldm.data.pixels import to_float
from eqxldm.distributed import all_gather
from eqxldm.models import DiT, Posterior
from eqxldm.sharding import build_placed, shardings
from eqxldm.training import (
    adamw,
    init_state,
    make_loss,
    make_train_step,
    posthoc_ema,
    posthoc_weights,
)

from .autoencoder import AUTOENCODER, load_vae
from .conditions import Captions, Condition
from .config import AttentionName, Config, RematName
from .few_steps import FEW_STEP, warm_start
from .hooks import Evaluate, Snapshot, open_snapshots
from .job import Job, read_data
from .methods import DTYPES, diffusion_rate, make_decays, make_method
from .networks import Pixels, Shape, Space, make_denoiser
from .options import read_options
from .run import RunFolder
from .sampling import Trained
from .stages import restore_average
from .telemetry import Telemetry
from .terminal import UserError, user_errors

# What measures the model along the way: `(trained, step)` to scalars and a picture.
Measure = Callable[[Trained, int], tuple[dict[str, float], Any]]


def diffusion_state(
    config: Config,
    shape: Shape,
    condition: Condition,
    *,
    remat: RematName = "narrow",
    attention: AttentionName = "xla",
):
    """`(state, static, optimizer)` of the denoiser."""
    c = config.diffusion
    optimizer = adamw(
        diffusion_rate(c), b2=c.b2, weight_decay=c.weight_decay, clip_norm=c.clip_norm
    )
    network = make_denoiser(config, shape, condition, remat=remat, attention=attention)
    return *init_state(network, optimizer, num_emas=len(make_decays(c))), optimizer


def diffusion_step(
    config: Config,
    condition: Condition,
    space: Space,
    static: Any,
    optimizer: Any,
    *,
    grad_accum_steps: int = 1,
    plain: bool = False,
) -> Any:
    """The train step of the denoiser, over batches of images or of cached posteriors.

    `plain`: that of the steps before an objective of few calls sets in. A step takes constants, the
    arrays of a teacher.
    """

    options, decays = config.diffusion, make_decays(config.diffusion)

    def step(state: Any, batch: Any, key: Any, *teacher: Any) -> Any:
        method = make_method(config, condition.null, *teacher)
        loss_fn = make_loss(
            method.plain if plain and method.plain is not None else method.objective,
            null=condition.null,
            cond_dropout=options.cond_dropout if condition.null is not None else 0.0,
            prepare=_prepare(space, config.pictures.pad),
            dtype=DTYPES[options.dtype],
        )
        return make_train_step(
            loss_fn, static, optimizer, ema_decays=decays, grad_accum_steps=grad_accum_steps
        )(state, batch, key)

    return step


def _prepare(space: Space, pad: int) -> Callable[[Any, Any], dict[str, Any]]:
    """`prepare(batch, key)`: the images, or fresh samples of their posteriors, and conditions."""
    if isinstance(space, Pixels):
        return lambda batch, key: {
            "x0": to_float(batch["image"], pad=pad),
            "cond": batch.get("cond"),
        }

    return lambda batch, key: {"x0": draw_latents(space, batch, key), "cond": batch.get("cond")}


def draw_latents(autoencoder: Any, batch: Any, key: Any) -> Any:
    """Fresh normalised latents of a batch of cached posteriors."""

    def draw(mean, logvar, key):
        raw = Posterior(mean.astype(jnp.float32), logvar.astype(jnp.float32))
        return autoencoder.normalise(raw).sample(key)

    keys = jax.random.split(key, len(batch["mean"]))
    return jax.vmap(draw)(batch["mean"], batch["logvar"], keys)


def train_diffusion(
    job: Job,
    space: Space,
    latents: Latents | None,
    measure: Measure | None = None,
    *,
    eval_every: int = 0,
) -> Trained:
    """The averaged network, trained on images or on fresh samples of the cached posteriors."""
    config, options, compute = job.config, job.config.diffusion, job.compute
    shape = space.latent_shape(*config.padded)
    build = lambda: diffusion_state(
        config, shape, job.condition, remat=compute.remat, attention=compute.attention
    )
    _, static, optimizer = eqx.filter_eval_shape(build)
    make_step = lambda plain: diffusion_step(
        config, job.condition, space, static, optimizer,
        grad_accum_steps=compute.grad_accum_steps, plain=plain,
    )  # fmt: skip
    few = config.objective in FEW_STEP
    phases = [(options.steps, make_step(False))]
    if few and config.few.pretrain:
        phases.insert(0, (config.few.pretrain, make_step(True)))
    state = build_placed(lambda: build()[0], job.mesh)
    start = job.start if few and job.start is not None else None
    if start is not None:
        begun = warm_start(eqx.combine(state.params, static), start.denoiser)
        state = init_state(begun, optimizer, num_emas=len(state.ema))[0]
    teacher = () if start is None or config.objective != "scm" else (start.denoiser,)
    network = eqx.combine(jax.eval_shape(lambda s: s.params, state), static)

    def finish(state: Any) -> Trained:
        average = eqx.combine(all_gather(state.ema[0], job.mesh), static)
        return Trained(space, average, shape, job.condition.null)

    def along(state: Any, step: int) -> tuple[dict[str, float], Any]:
        return measure(finish(state), step) if measure else ({}, None)

    def hooks(telemetry: Telemetry) -> list[Any]:
        found: list[Any] = []
        if options.posthoc:
            found.append(
                Snapshot(
                    job.run, "diffusion", _power_averages(config), every=options.snapshot_every
                )
            )
        if measure:
            found.append(Evaluate(along, job.run, telemetry, every=eval_every))
        return found

    state = job.stages.train(
        "diffusion",
        phases,
        state,
        _batches(job, latents),
        options.batch_size,
        *teacher,
        flops=None if few else _flops(network, job.condition, options.batch_size),
        hooks=hooks,
    )
    return finish(state)


def load_start(config: Config, path: Path, mesh: Mesh) -> Trained:
    """The finished run that another one starts from; refuses what does not fit it."""
    run = RunFolder(path)
    found = read_options(Config, run)
    names = ("space", "denoiser", "size", "pictures", "diffusion.path", "diffusion.prediction")
    value = lambda options, name: functools.reduce(getattr, name.split("."), options)
    for name in names:
        there, here = value(found, name), value(config, name)
        if there != here:
            raise UserError(
                f"--start-from {path}: that run has another --{name}, {there}; here it is {here}."
            )
    if found.objective not in ("denoising", "flow") or found.diffusion.learned_range:
        raise UserError(
            f"--start-from {path}: needed is a denoiser without a learned range; that run has "
            f"--objective {found.objective}."
        )
    condition, _ = read_data(run, found)
    return load_finished(found, run, condition, mesh)


def _batches(job: Job, latents: Latents | None) -> Any:
    batch_size = job.config.diffusion.batch_size
    if latents is None:
        return job.images("diffusion", batch_size, condition=job.condition.read)
    if batch_size > len(latents):
        raise UserError(
            f"--diffusion.batch-size {batch_size} is more than the {len(latents)} images that "
            "could be read."
        )
    return latent_batches(
        latents,
        batch_size,
        flip=job.config.pictures.flip,
        workers=job.compute.workers,
        **job.stages.order("diffusion", batch_size),
    )


def _flops(network: Any, condition: Condition, batch_size: int) -> float | None:
    """Of a step: forward, and twice backward."""
    if not isinstance(network, DiT):
        return None
    tokens = condition.max_length if isinstance(condition, Captions) else 0
    return 6.0 * batch_size * models.multiply_adds(network, tokens)


def _power_averages(config: Config) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
    first = len(config.diffusion.ema_decays)
    return lambda state: (state.ema[first:], {"updates": int(state.step - state.skipped)})


def load_finished(
    config: Config, run: RunFolder, condition: Condition, mesh: Mesh, sigma_rel: float | None = None
) -> Trained:
    """The averaged models of a finished run.

    With `sigma_rel` the denoiser's average is put together from the run's snapshots.
    """
    space: Space = Pixels(config.pictures.channels)
    if config.space == "latent":
        if not (run.path / AUTOENCODER).exists():
            raise UserError(f"the run in {run.path} is not finished: no {AUTOENCODER}.")
        space = load_vae(run.path, config.pictures.channels, option="run")
    shape, steps = space.latent_shape(*config.padded), config.diffusion.steps
    build = lambda: diffusion_state(config, shape, condition)
    like, static, _ = eqx.filter_eval_shape(build)
    if sigma_rel is not None:
        _check_finished(run, steps)
        params = posthoc_average(config, run, like.ema, sigma_rel)
    else:
        place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
        placed = jax.tree.map(place, like, shardings(like, mesh))
        params = all_gather(_final_average(run, steps, placed), mesh)
    return Trained(space, eqx.combine(params, static), shape, condition.null)


def _check_finished(run: RunFolder, steps: int) -> Checkpoints:
    """The checkpoints of the finished diffusion."""
    checkpoints = Checkpoints(run.checkpoints / "diffusion")
    found = checkpoints.steps()
    if steps not in found:
        at = f"at step {found[-1]} of {steps}" if found else "not begun"
        raise UserError(
            f"the run in {run.path} is not finished: diffusion is {at}. Run the train command "
            "again to go on."
        )
    return checkpoints


def _final_average(run: RunFolder, steps: int, like: Any) -> Any:
    """The first average at the last step."""
    with _check_finished(run, steps) as checkpoints:
        try:
            return restore_average(checkpoints, steps, like)
        except CheckpointError as error:
            raise UserError(
                f"{error}\nIt is not used. Delete {run.path / 'metrics.json'} and train again: the "
                "run goes on from the checkpoint before."
            ) from None


def posthoc_average(config: Config, run: RunFolder, like: Any, sigma_rel: float) -> Any:
    """The average of this width at the end of training, from the run's snapshots."""
    widths = config.diffusion.posthoc
    if not widths:
        raise UserError(
            "--sigma-rel: the run has no averages by power functions. Train one with "
            "--diffusion.posthoc 0.05 0.1."
        )
    failing = user_errors(ValueError, CheckpointError, what=f"--sigma-rel {sigma_rel}")
    with open_snapshots(run, "diffusion") as snapshots, failing:
        steps = snapshots.steps()
        updates = [snapshots.info(step)["updates"] for step in steps]
        there = [(n, width) for n in updates for width in widths]
        shares = posthoc_weights(there, max(updates, default=0), sigma_rel)
        wanted = tuple(like[len(config.diffusion.ema_decays) :])
        trees = (tree for step in steps for tree in snapshots.restore(step, wanted)[0])
        return posthoc_ema(trees, shares)
