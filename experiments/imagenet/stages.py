"""The stages of training: judge, autoencoder, latents, diffusion. Each goes on where it stopped."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from eqxldm import models, weights
from eqxldm.checkpoints import CheckpointError
from eqxldm.data import ImageSource
from eqxldm.data.images import to_float
from eqxldm.data.latents import (
    Latents,
    latent_header,
    latent_sampler,
    open_latents,
    write_latents,
)
from eqxldm.data.pipelines import Batches, image_batches, latent_batches
from eqxldm.fingerprints import digest
from eqxldm.models import LPIPS, AutoencoderKL, ConvClassifier
from eqxldm.sharding import batch_sharding, build_placed, own_rows, place, shardings
from eqxldm.training import (
    MeanDistance,
    adamw,
    exponential,
    init_state,
    make_diffusion_loss,
    make_train_step,
    measure_latents,
    posthoc_ema,
    posthoc_weights,
)

from ..common import stages as shared
from ..common.judge import classifier_loss
from ..common.loop import Keep, open_snapshots, train_stage
from ..common.processes import agreed, barrier, copied, gathered, local_mesh
from ..common.run import RunFolder, read_json, write_json
from ..common.spaces import Trained
from ..common.stages import averaged, read_about
from ..common.streams import data_seed, stage_key
from ..common.telemetry import LogOptions, Telemetry
from ..common.terminal import Signals, StageBar, UserError, console
from . import config as cfg
from .config import CHANNELS, AttentionName, Config, RematName
from .images import decoded

DATA, AUTOENCODER, TIMES = "data.json", "autoencoder.safetensors", "autoencoder.json"
LOSS, LATENTS = "autoencoder-loss.json", "latents"
SKIPPED = "skipped.json"  # what write_latents leaves when all shards are there
MEND = "--overwrite starts anew."


@dataclass(frozen=True)
class Compute:
    """What it runs on: an interrupted run may go on with other values."""

    mesh: str = ""
    """How devices share the work: data=2,fsdp=4,tensor=1. By default all are on data."""
    accumulate: int = 1
    """Parts of a batch of the diffusion that are computed one after the other."""
    remat: RematName = "narrow"
    """What the backward pass computes again: everything, all but what is as narrow as a token, all
    but the matmuls, or nothing."""
    attention: AttentionName = "xla"
    """cudnn is for bfloat16 on a GPU."""
    workers: int = 0
    """Processes that read and decode images; 0 uses threads."""
    threads: int = 2
    keep_every: int | None = None
    """Checkpoints whose step is a multiple of this stay; the newest two and the best do anyway."""
    strict: bool = False
    """Stop at an unreadable image. By default it is left out and listed."""


@dataclass
class Job:
    """What every stage needs, and the seconds that each took."""

    config: Config
    compute: Compute
    source: ImageSource
    num_classes: int
    run: RunFolder
    latents: Path
    mesh: Mesh
    signals: Signals
    log: LogOptions = field(default_factory=LogOptions)
    timings: dict[str, dict[str, float]] = field(default_factory=dict)

    def train(
        self,
        stage: str,
        phases: Any,
        state: Any,
        batches: Batches,
        options: Any,
        *constants: Any,
        flops: float | None = None,
        snapshots: Callable[[Any], tuple[Any, dict[str, Any]]] | None = None,
    ) -> Any:
        """`train_stage` with the job's seed, mesh and run folder; `flops` are those of a step."""
        flops_per_step = {} if flops is None else {stage: flops}
        with Telemetry(self.run, self.log, flops_per_step=flops_per_step) as telemetry:
            state, self.timings[stage] = train_stage(
                stage,
                phases,
                state,
                batches,
                batch_size=options.batch_size,
                key=stage_key(self.config, stage, "step"),
                mesh=self.mesh,
                run=self.run,
                signals=self.signals,
                keep=Keep(
                    self.config.checkpoint_every,
                    every=self.compute.keep_every,
                    snapshots=snapshots,
                    snapshot_every=self.config.diffusion.snapshot_every,
                ),
                constants=constants,
                telemetry=telemetry,
            )
        if batches.skipped:
            console.print(
                f"{stage}: {len(batches.skipped)} unreadable images were replaced by others, "
                f"the first: {next(iter(batches.skipped.values()))}"
            )
        return state

    def images(self, stage: str, size: int, batch_size: int) -> Batches:
        return image_batches(
            self.source,
            size,
            batch_size,
            seed=data_seed(self.config, stage),
            skip_unreadable=not self.compute.strict,
            workers=self.compute.workers,
            threads=self.compute.threads,
            rows=own_rows(batch_size, self.mesh),
        )


def describe_data(job: Job) -> None:
    """`data.json`: the images that the run is about; refuses others."""
    about = {
        "source": job.source.digest(),
        "images": len(job.source),
        "num_classes": job.num_classes,
        "class_names": list(job.source.class_names),
    }
    if job.run.primary:
        if (job.run.path / DATA).exists():
            found = read_about(job.run, DATA, *about, mend=MEND)
            if found != about:
                raise UserError(
                    f"the run in {job.run.path} is about other images:\n"
                    + _differences(found, about)
                    + "Give the same images, use another --run-dir, or --overwrite to start anew."
                )
        else:
            write_json(job.run.path / DATA, about)


def _differences(found: dict[str, Any], about: dict[str, Any]) -> str:
    names = {"source": "listing", "images": "images", "num_classes": "labels of the network"}
    lines = [
        f"  {shown}: it has {str(found[name])[:16]}, now {str(about[name])[:16]}\n"
        for name, shown in names.items()
        if found[name] != about[name]
    ]
    old, new = found["class_names"], about["class_names"]
    if old != new:
        changed = next((pair for pair in zip(old, new, strict=False) if pair[0] != pair[1]), None)
        first = f", the first that differs is {changed[0]}, now {changed[1]}" if changed else ""
        lines.append(f"  classes: it has {len(old)}, now {len(new)}{first}\n")
    return "".join(lines)


def train_classifier(job: Job) -> ConvClassifier:
    """The judge, on this process's own device."""
    options = job.config.classifier
    build = lambda: shared.classifier_state(
        cfg.make_classifier(job.config, job.num_classes), options
    )
    state, static, optimizer = eqx.filter_eval_shape(build)
    state = build_placed(lambda: build()[0], job.mesh)
    step = make_train_step(classifier_loss, static, optimizer, averages=(exponential(0.99),))
    batches = job.images("classifier", cfg.judge_size(job.config.size), options.batch_size)
    state = job.train("classifier", [(options.steps, step)], state, batches, options)
    return jax.device_get(averaged(gathered(state, job.mesh), static))


def load_vae(path: Path) -> AutoencoderKL:
    """The autoencoder of a file, a diffusers folder, or another run's folder."""
    if (path / AUTOENCODER).exists():
        path = path / AUTOENCODER
    try:
        model = weights.load(path)
    except (weights.WeightsError, OSError) as error:
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
        return weights.load_lpips(folder)
    except (weights.WeightsError, OSError, ImportError) as error:
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
            weights.save(_measured(job, model) if vae is None else model, path)
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
    prepare = lambda batch, key: to_float(random_crop(batch["image"], config.size, key))
    phases = shared.autoencoder_phases(
        options,
        statics,
        optimizers,
        prepare,
        distance=cfg.make_distance(options),
        dtype=cfg.DTYPES[options.dtype],
    )
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
    own = job.latents == job.run.path / LATENTS
    found = read_json(job.latents / "header.json")
    if found is None or (own and overwrite):  # which deletes it
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
    header = cache_header(job, autoencoder)
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
    return *init_state(dit, optimizer, averages=len(cfg.make_averages(c))), optimizer


def diffusion_step(
    config: Config, static: Any, optimizer: Any, prepare: Callable[[Any, Any], Any], accumulate: int
):
    """The train step of the denoiser."""
    options, diffusion = config.diffusion, cfg.make_diffusion(config)
    loss_fn = make_diffusion_loss(
        diffusion.path,
        diffusion.prediction,
        diffusion.time_sampler,
        weight=diffusion.weight,
        example_loss=diffusion.example_loss,
        label_dropout=options.label_dropout,
        prepare=prepare,
        dtype=cfg.DTYPES[options.dtype],
    )
    averages = cfg.make_averages(options)
    return make_train_step(loss_fn, static, optimizer, averages=averages, accumulate=accumulate)


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
    prepare = latent_sampler(autoencoder.shift, autoencoder.scale)
    step = diffusion_step(config, static, optimizer, prepare, compute.accumulate)
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
        return state.ema[len(options.averages) :], {"updates": updates}

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
            wanted = tuple(like[len(config.diffusion.averages) :])
            trees = (tree for step in steps for tree in snapshots.restore(step, wanted)[0])
            return posthoc_ema(trees, shares)
        except (ValueError, CheckpointError) as error:
            raise UserError(f"--sigma-rel {sigma_rel}: {error}") from None
