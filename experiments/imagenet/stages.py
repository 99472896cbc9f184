"""The stages of training beside the autoencoder: judge, latents, diffusion. Each resumes."""

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from eqxldm import models
from eqxldm.checkpoints import CheckpointError
from eqxldm.data import Latents, latent_batches, latent_header, open_latents, write_latents
from eqxldm.models import AutoencoderKL
from eqxldm.sharding import build_placed, own_rows, shardings
from eqxldm.training import (
    adamw,
    exponential,
    init_state,
    make_loss,
    make_train_step,
    posthoc_ema,
    posthoc_weights,
)
from experiments.common.classifier import ConvClassifier

from ..common import stages as shared
from ..common.judge import classifier_loss
from ..common.loop import open_snapshots
from ..common.processes import barrier, gathered
from ..common.run import RunFolder, read_json
from ..common.spaces import Trained, posterior_draw
from ..common.stages import averaged, read_about
from ..common.streams import data_seed
from ..common.terminal import StageBar, UserError, console
from . import config as cfg
from .autoencoder import AUTOENCODER, Encoder, identity, load_vae
from .config import AttentionName, Config, RematName
from .job import DATA, LATENTS, MEND, Job

SKIPPED = "skipped.json"  # what write_latents leaves when all shards are there


def train_classifier(job: Job) -> ConvClassifier:
    """The judge, on this process's own device."""
    options = job.config.classifier
    build = lambda: shared.classifier_state(
        cfg.make_classifier(job.config, job.num_classes), options
    )
    state, static, optimizer = eqx.filter_eval_shape(build)
    state = build_placed(lambda: build()[0], job.mesh)
    step = make_train_step(classifier_loss, static, optimizer, ema_decays=(exponential(0.99),))
    batches = job.images("classifier", cfg.judge_size(job.config.size), options.batch_size)
    state = job.train("classifier", [(options.steps, step)], state, batches, options)
    return jax.device_get(averaged(gathered(state, job.mesh), static))


def cache_header(job: Job, autoencoder: AutoencoderKL) -> dict[str, Any]:
    """What the run's latent cache must have been made from."""
    config = job.config
    return latent_header(
        job.source,
        size=config.size,
        shape=autoencoder.latent_shape(config.size, config.size),
        autoencoder=identity(autoencoder),
        shift=autoencoder.shift,
        scale=autoencoder.scale,
        dtype=config.latents.dtype,
        images_per_shard=config.latents.images_per_shard,
    )


def check_cache(job: Job, vae: AutoencoderKL | None, *, overwrite: bool) -> None:
    """Refuses a cache that is there already and is another one, before anything is trained."""
    own = job.latents.resolve() == (job.run.path / LATENTS).resolve()
    path = job.latents / "header.json"
    if not path.exists() or (own and overwrite):  # which deletes it
        return
    kept = job.run.path / AUTOENCODER
    autoencoder = load_vae(kept) if vae is None and kept.exists() and not overwrite else vae
    if autoencoder is None and own:  # the same one will come of the run's checkpoints
        return
    if autoencoder is None:
        raise UserError(
            f"--latents {job.latents}: there is a latent cache already, and this run is to train "
            "an autoencoder of its own, whose latents are others. Give the one that made it with "
            "--vae, or use another folder, or delete this one."
        )
    header, found = cache_header(job, autoencoder), read_json(path) or {}
    if any(found.get(name) != value for name, value in header.items()):
        open_latents(job.latents, header)  # raises, with all that differs


def cache_latents(job: Job, autoencoder: AutoencoderKL) -> Latents:
    """The posteriors of all images and of their mirror images, in the cache."""
    config, header = job.config, cache_header(job, autoencoder)
    begin, encode = time.monotonic(), Encoder(autoencoder, config.latents.batch_size)
    complete = (job.latents / SKIPPED).exists()
    with StageBar("latents", len(job.source) // jax.process_count(), "image") as bar:
        write_latents(
            job.source,
            encode,
            job.latents,
            header,
            batch_size=encode.batch_size,
            strict=job.compute.strict,
            progress=lambda done, total: bar.update(done),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    barrier("latents")
    latents = open_latents(job.latents, header)
    if not complete:
        job.run.log(stage="latents", seconds=time.monotonic() - begin)
    job.timings["latents"] = {"seconds": shared.last_seconds(job.run, "latents")}
    skipped = read_json(job.latents / SKIPPED)
    if skipped:
        console.print(
            f"latents: {len(skipped)} unreadable images are left out, listed in "
            f"{job.latents / SKIPPED}; the first: {next(iter(skipped.values()))}"
        )
    return latents


def diffusion_rate(options: cfg.DiffusionConfig) -> Any:
    if options.cosine_decay:
        return shared.warmup_cosine(options.learning_rate, options.steps, options.warmup)
    if not options.warmup:
        return options.learning_rate
    rate = options.learning_rate
    return lambda step: rate * jnp.minimum(1.0, (step + 1) / options.warmup)


def diffusion_state(
    config: Config,
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    remat: RematName = "narrow",
    attention: AttentionName = "xla",
):
    """`(state, static, optimizer)` of the denoiser."""
    c = config.diffusion
    optimizer = adamw(
        diffusion_rate(c), b2=c.b2, weight_decay=c.weight_decay, clip_norm=c.clip_norm
    )
    dit = cfg.make_dit(config, shape, num_classes, remat=remat, attention=attention)
    return *init_state(dit, optimizer, num_emas=len(cfg.make_averages(c))), optimizer


def diffusion_step(
    config: Config,
    num_classes: int,
    static: Any,
    optimizer: Any,
    prepare: Callable[[Any, Any], Any],
    grad_accum_steps: int,
):
    """The train step of the denoiser."""
    options, diffusion = config.diffusion, cfg.make_diffusion(config)
    loss_fn = make_loss(
        diffusion.objective,
        null=num_classes,
        cond_dropout=options.label_dropout,
        prepare=prepare,
        dtype=cfg.DTYPES[options.dtype],
    )
    ema_decays = cfg.make_averages(options)
    return make_train_step(
        loss_fn, static, optimizer, ema_decays=ema_decays, grad_accum_steps=grad_accum_steps
    )


def train_diffusion(job: Job, autoencoder: AutoencoderKL, latents: Latents) -> Trained:
    """The averaged network, trained on fresh samples of the cached posteriors."""
    config, options, compute = job.config, job.config.diffusion, job.compute
    shape = autoencoder.latent_shape(config.size, config.size)
    build = lambda: diffusion_state(
        config, shape, job.num_classes, remat=compute.remat, attention=compute.attention
    )
    _, static, optimizer = eqx.filter_eval_shape(build)
    if options.batch_size > len(latents):
        raise UserError(
            f"--diffusion.batch-size {options.batch_size} is more than the {len(latents)} images "
            "that could be read."
        )
    prepare = posterior_draw(autoencoder)
    step = diffusion_step(
        config, job.num_classes, static, optimizer, prepare, compute.grad_accum_steps
    )
    batches = latent_batches(
        latents,
        options.batch_size,
        seed=data_seed(config, "diffusion"),
        flip=options.flip,
        workers=compute.workers,
        rows=own_rows(options.batch_size, job.mesh),
    )
    state = build_placed(lambda: build()[0], job.mesh)
    dit = eqx.combine(jax.eval_shape(lambda s: s.params, state), static)

    def power_averages(state):
        updates = int(state.step - state.skipped)
        return state.ema[len(options.ema_decays) :], {"updates": updates}

    state = job.train(
        "diffusion",
        [(options.steps, step)],
        state,
        batches,
        options,
        flops=6.0 * options.batch_size * models.multiply_adds(dit),  # forward, and twice backward
        snapshots=power_averages if options.posthoc else None,
    )
    params = gathered(state.ema[0], job.mesh)
    return Trained(autoencoder, _network(config, shape, job.num_classes, params), shape)


def _network(config: Config, shape: tuple[int, int, int], num_classes: int, params: Any) -> Any:
    """The network that samples: the trained parameters, with attention for any dtype."""
    make = lambda: cfg.make_dit(config, shape, num_classes, remat="nothing")
    like, static = eqx.partition(eqx.filter_eval_shape(make), _is_float_shape)
    leaves = jax.tree.leaves(params)
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(like), leaves), static)


def _is_float_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def load_finished(
    config: Config, run: RunFolder, mesh: Mesh, sigma_rel: float | None = None
) -> tuple[Trained, int, int]:
    """The averaged models of a finished run, its number of labels and of classes.

    With `sigma_rel` the denoiser's average is put together from the run's snapshots.
    """
    about = read_about(run, DATA, "num_classes", "class_names", mend=MEND)
    if not (run.path / AUTOENCODER).exists():
        raise UserError(f"the run in {run.path} is not finished: no {AUTOENCODER}. Train first.")
    autoencoder, labels = load_vae(run.path / AUTOENCODER), about["num_classes"]
    shape = autoencoder.latent_shape(config.size, config.size)
    like = eqx.filter_eval_shape(lambda: diffusion_state(config, shape, labels)[0])
    placed = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), like, shardings(like, mesh)
    )
    steps = config.diffusion.steps
    if sigma_rel is None:
        params = gathered(shared.final_average(run, "diffusion", steps, placed), mesh)
    else:
        shared.check_finished(run, "diffusion", steps)
        params = posthoc_average(config, run, like.ema, sigma_rel)
    network = _network(config, shape, labels, params)
    return Trained(autoencoder, network, shape), labels, len(about["class_names"])


def posthoc_average(config: Config, run: RunFolder, like: Any, sigma_rel: float) -> Any:
    """The average of this width at the end of training, from the snapshots of the kept ones."""
    widths = config.diffusion.posthoc
    if not widths:
        raise UserError(
            "--sigma-rel: the run kept no averages by power functions. Train one with "
            "--diffusion.posthoc 0.05 0.1."
        )
    with open_snapshots(run, "diffusion") as snapshots:
        try:
            steps = snapshots.steps()
            updates = [snapshots.info(step)["updates"] for step in steps]
            kept = [(n, width) for n in updates for width in widths]
            shares = posthoc_weights(kept, max(updates, default=0), sigma_rel)
            wanted = tuple(like[len(config.diffusion.ema_decays) :])
            trees = (tree for step in steps for tree in snapshots.restore(step, wanted)[0])
            return posthoc_ema(trees, shares)
        except (ValueError, CheckpointError) as error:
            raise UserError(f"--sigma-rel {sigma_rel}: {error}") from None
