"""The commands: their options, the ten that people need first, and what they do."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import OmitArgPrefixes

from eqxldm.distributed import barrier, from_primary, is_primary
from eqxldm.sharding import make_mesh

from .autoencoder import load_lpips, load_vae, obtain_autoencoder
from .checks import (
    check_batches,
    check_networks,
    check_options,
    check_out,
    check_readable,
    mesh_of,
)
from .classifier import train_classifier
from .conditions import Captions, FrozenCaptions, Labels, Wanted, choose_condition
from .config import (
    Config,
    DenoiserName,
    FormName,
    ObjectiveName,
    PresetName,
    SamplingConfig,
    SpaceName,
    default_form,
)
from .data import open_source, open_test
from .diffusion import load_start, train_diffusion
from .evaluate import Measuring, describe, summary, write_curves
from .few_steps import FEW_STEP
from .figures import image_grid, read_png, save_png
from .finished import open_finished
from .frozen_text import CAPTIONS, ENCODER, find_encoder, keep_encoder, write_captions
from .job import Compute, Inputs, Job, describe_data
from .latents import cache_latents, check_cache
from .methods import check_sampling
from .networks import Pixels
from .options import Batch, Count, MaybeSteps, Range, Samples, Seed, check
from .processes import Processes, all_succeed, join
from .reference import Reference
from .run import METRICS, RunFolder, as_dict, write_json
from .sampling import Drawing, Sampler
from .streams import stream_key
from .telemetry import LogOptions, Telemetry, check_packages
from .terminal import Signals, UserError, say


@dataclass(frozen=True)
class Train(Config):
    """Train everything, sample and measure; goes on where an interrupted run stopped."""

    preset: PresetName = "images"  # The defaults of all other options.
    # A folder of images, or with one for each class, or with captions; tars, parquet, ArrayRecord;
    # for MNIST's presets a folder with its four files, for text one with the archives of emoji,
    # which are fetched otherwise.
    images: Path | None = None
    run_dir: Path | None = None  # The run folder; by default in runs/, with the preset's name.
    samples: Samples = 1000  # How many images to sample at the end, as many of each class.
    # Steps between measurements of samples while the diffusion trains; 0: at the end alone.
    eval_every: MaybeSteps = 0
    overwrite: bool = False  # Delete what the run in the folder wrote, and start anew.
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    inputs: OmitArgPrefixes[Inputs] = field(default_factory=Inputs)
    compute: OmitArgPrefixes[Compute] = field(default_factory=Compute)
    processes: OmitArgPrefixes[Processes] = field(default_factory=Processes)
    log: LogOptions = field(default_factory=LogOptions)

    @property
    def config(self) -> Config:
        """The part of the options that the run folder belongs to."""
        return Config(**{f.name: getattr(self, f.name) for f in fields(Config)})


@dataclass(frozen=True)
class Autoencoder(Train):
    """Train the autoencoder alone and measure it; `train --vae RUN_DIR` takes it then.

    What is said of the diffusion and of samples is not used.
    """


@dataclass(frozen=True)
class Which:
    """Which finished run, and how it is sampled."""

    preset: PresetName = "images"  # With space and denoiser the name of the run's folder.
    space: SpaceName = "latent"  # As in training.
    denoiser: DenoiserName = "dit"  # As in training.
    form: FormName = "published"  # As in training.
    objective: ObjectiveName = "denoising"  # As in training.
    # The run folder; by default in runs/, with the preset's name.
    run_dir: Path | None = None
    sampling: OmitArgPrefixes[SamplingConfig] = field(default_factory=SamplingConfig)
    # The width of a post-hoc average, from a run with --diffusion.posthoc; else the first one.
    sigma_rel: Annotated[float, Range(0, 1, "()")] | None = None


@dataclass(frozen=True)
class Sample(Which):
    """Sample from a finished run into a picture."""

    # The class; without it one row for each of some classes.
    label: Annotated[int, Range(0, 10**7)] | None = None
    prompt: str | None = None  # The caption, of a run with captions.
    n: Count = 10  # How many images; a row where classes have rows.
    seed: Seed = 0  # Another one draws other images from the same network.
    sampling_batch: Batch = 64  # Images sampled at once.
    # The picture; by default sample-<label>.png or sample.png in the run folder.
    out: Path | None = None


@dataclass(frozen=True)
class Evaluate(Which):
    """Sample a finished run again and bring samples.npz and metrics.json up to date."""

    images: Path | None = None  # The training images; by default where they were.
    n: Samples = 1000  # How many images, as many of each class.
    inputs: OmitArgPrefixes[Inputs] = field(default_factory=Inputs)
    compute: OmitArgPrefixes[Compute] = field(default_factory=Compute)
    processes: OmitArgPrefixes[Processes] = field(default_factory=Processes)


def train(command: Train) -> None:
    job, reference = prepare(command, ("classifier", "autoencoder", "diffusion"))
    with in_folder(job, command.images, overwrite=command.overwrite):
        metrics = job.run.metrics()
        if from_primary(metrics is not None):  # whatever it was evaluated with since
            say(
                f"{job.run.path} is finished; `evaluate` samples it again, --overwrite starts anew."
            )
            if metrics is not None:
                say(summary(metrics, job.run.path))
            return
        run_stages(command, job, reference)


def run_stages(command: Train, job: Job, reference: Reference) -> None:
    """What is left to do of the run, stage by stage."""
    config, run = job.config, job.run
    encode_captions(job)
    measuring = Measuring(job, command.sampling, reference, train_classifier(job))
    space, latents, measured = Pixels(config.pictures.channels), None, {}
    if config.space == "latent":
        space = obtain_autoencoder(job)
        if is_primary():
            measured["autoencoder"] = measuring.autoencoder(space)
        latents = cache_latents(job, space)
    measure = measuring.along if command.eval_every else None
    trained = train_diffusion(job, space, latents, measure, eval_every=command.eval_every)
    results = measuring.final(trained, command.samples)
    few = {} if command.objective not in FEW_STEP else measuring.few_steps(trained, command.samples)
    if not is_primary():
        return
    measuring.pictures(trained)
    with Telemetry(run, job.log) as telemetry:
        for name in ("reconstructions", "samples", "few-steps"):
            if (run.path / f"{name}.png").exists():
                grid = read_png(run.path / f"{name}.png")
                telemetry.images("samples", config.diffusion.steps, name, grid)
    timings = {**job.timings, **results["timings"]}
    timings["total"] = {"seconds": sum(stage["seconds"] for stage in timings.values())}
    found = {**measured, "diffusion": results["diffusion"], **few, "timings": timings}
    write_json(run.file(METRICS), metrics := {**found, **describe(config)})
    say(summary(metrics, run.path))


def train_autoencoder(command: Autoencoder) -> None:
    if command.inputs.vae is not None or command.space == "pixel":
        raise UserError("the autoencoder command trains one: leave --vae and --space pixel out.")
    job, reference = prepare(command, ("classifier", "autoencoder"))
    with in_folder(job, command.images, overwrite=command.overwrite):
        metrics = job.run.metrics()
        if not from_primary(metrics is not None):
            measuring = Measuring(job, command.sampling, reference, train_classifier(job))
            autoencoder = obtain_autoencoder(job)
            if not is_primary():
                return
            found = measuring.autoencoder(autoencoder)
            write_curves(job.run)
            metrics = {"autoencoder": found, "timings": job.timings, **describe(job.config)}
            write_json(job.run.file(METRICS), metrics)
        if metrics is not None:
            say(summary(metrics, job.run.path))
        say(f"`train --vae {job.run.path}` takes this autoencoder.")


def prepare(command: Train, trained: tuple[str, ...]) -> tuple[Job, Reference]:
    """The job and what is given to it, everything checked and nothing written."""
    join(command.processes)
    signals, config, compute = Signals(), command.config, command.compute
    alone = "diffusion" not in trained
    run = run_folder(command, "-autoencoder" if alone else "")
    with all_succeed():
        check(command)
        check_options(config, command.sampling, compute)
        check_packages(command.log)
        mesh, inputs = mesh_of(compute.mesh), command.inputs
        start = None
        if inputs.start_from is not None and not alone:
            if config.objective not in FEW_STEP:
                raise UserError(f"--start-from is for --objective {', '.join(FEW_STEP)}.")
            start = load_start(config, inputs.start_from, mesh)
            inputs = start_inputs(config, inputs)
        vae = load_vae(inputs.vae, config.pictures.channels) if inputs.vae is not None else None
        lpips = load_lpips(inputs.lpips) if inputs.lpips is not None else None
        source = open_source(config, command.images)
        encoder = chosen_encoder(config, run, inputs, anew=command.overwrite)
        condition = choose_condition(config, source, run.path, encoder)
        test = open_test(config, command.images, inputs.test_images, source)
        left_out = {"autoencoder"} if vae is not None or config.space == "pixel" else set()
        check_batches(config, source, mesh, compute, tuple(s for s in trained if s not in left_out))
        check_networks(
            config,
            command.sampling,
            condition,
            vae,
            diffusion=not alone,
            attention=compute.attention,
        )
        reference = Reference(config, source, test, condition, strict=inputs.strict)
        if config.space == "latent" and not alone:
            check_readable(config, source, strict=inputs.strict)
        job = Job(
            config, compute, inputs, source, condition, run, mesh, signals, command.log, vae, lpips,
            start, test,
        )  # fmt: skip
        if config.space == "latent" and not alone:
            check_cache(job, own=False, overwrite=command.overwrite)
    return job, reference


def chosen_encoder(config: Config, run: RunFolder, inputs: Inputs, *, anew: bool) -> Path | None:
    """The folder of the frozen encoder of captions; None where one is trained along."""
    if config.text.tokens == "frozen":
        return find_encoder(run.path, inputs.text_encoder, config.text.max_length, anew=anew)
    if inputs.text_encoder is not None:
        raise UserError("--text-encoder: is for --text.tokens frozen; leave one of them out.")
    return None


def encode_captions(job: Job) -> None:
    """All captions by the frozen encoder, once; it and they stay in the run folder."""
    condition, run = job.condition, job.run
    if not isinstance(condition, FrozenCaptions):
        return
    if run.primary:
        run.file(f"{ENCODER}.part")
        folder = keep_encoder(condition.folder, run.file(ENCODER))
        sources = [job.source] if job.test is None else [job.source, job.test]
        texts = (source[i].caption for source in sources for i in range(len(source)))
        run.file(CAPTIONS)
        reader = replace(condition, folder=folder).read
        write_captions(reader, (text for text in texts if text is not None))
    barrier("captions")


def start_inputs(config: Config, inputs: Inputs) -> Inputs:
    """The inputs with the autoencoder and the latents of the run that is started from."""
    path = inputs.start_from
    if path is None or config.space == "pixel" or inputs.vae is not None:
        return inputs
    latents = inputs.latents
    if latents is None and (path / "latents" / "header.json").exists():
        latents = path / "latents"
    return replace(inputs, vae=path, latents=latents)


@contextlib.contextmanager
def in_folder(job: Job, images: Path | None, *, overwrite: bool | None = None) -> Iterator[None]:
    """Keeps the run's folder until all processes are done with it.

    `overwrite` says how a run is begun or resumed; None: it is there and stays as it is.
    """
    with contextlib.ExitStack() as stack:
        with all_succeed():
            stack.enter_context(job.run.locked())
            if overwrite is not None:
                job.run.open(as_dict(job.config), overwrite=overwrite, defaults=as_dict(Config()))
            describe_data(job, images, trains=overwrite is not None)
            if job.config.space == "latent":
                check_cache(job, own=True)
        yield
        barrier("done")  # process 0 measures and draws for longer than jax waits at an exit


def run_folder(command: Train | Which, ending: str = "") -> RunFolder:
    """The folder named, or runs/ with the preset, and what is not the default."""
    names = [command.preset]
    names += ["pixel"] * (command.space == "pixel") + ["unet"] * (command.denoiser == "unet")
    default = default_form(command.preset, command.space, command.denoiser)
    names += [command.form] * (command.form != default)
    names += [command.objective] * (command.objective != "denoising")
    path = command.run_dir or Path("runs") / ("-".join(names) + ending)
    return RunFolder(path, primary=is_primary())


def sample(command: Sample) -> None:
    check(command)
    Signals()
    finished = open_finished(run_folder(command))
    run, config = finished.run, finished.config
    check_sampling(finished.method, command.sampling, prefix="")
    wanted, columns = wanted_samples(command, finished.condition)
    name = "sample.png" if command.label is None else f"sample-{command.label}.png"
    out = run.path / name if command.out is None else command.out
    scale = 4 if max(config.size) <= 32 else 2
    grid = lambda images: image_grid(images, columns, scale=scale)
    h, w = config.size
    check_out(out, grid(np.zeros((wanted.count, h, w, config.pictures.channels), np.uint8)))
    trained = finished.networks(make_mesh(), command.sigma_rel)
    sampler = Sampler.of(config, command.sampling)
    batch = min(command.sampling_batch, wanted.count)
    drawing = Drawing(sampler, trained.shape, trained.null, batch=batch)
    images = drawing(trained, wanted, stream_key(command.seed, "samples"))
    path = run.file(name) if command.out is None else out
    save_png(path, grid(images))
    say(f"{len(images)} images in {out}")


def wanted_samples(command: Sample, condition: Any) -> tuple[Wanted, int]:
    """What to draw, and in how many columns."""
    square = math.ceil(math.sqrt(command.n))
    if command.label is not None and not isinstance(condition, Labels):
        raise UserError("--label: the run has no classes.")
    if command.prompt is not None and not isinstance(condition, Captions):
        raise UserError("--prompt: the run has no captions.")
    if isinstance(condition, Captions):
        prompt = command.prompt or ""
        condition.say_cut(prompt)
        return condition.wanted(command.n, (prompt,)), square
    if not isinstance(condition, Labels):
        return condition.wanted(command.n), square
    if command.label is None:
        return condition.of(np.repeat(condition.shown(), command.n)), command.n
    if command.label >= condition.classes:
        raise UserError(f"--label {command.label}: the classes are 0 to {condition.classes - 1}.")
    return condition.of(np.full(command.n, command.label)), square


def evaluate(command: Evaluate) -> None:
    join(command.processes)
    signals, run = Signals(), run_folder(command)
    with all_succeed():
        check(command)
        mesh, finished = mesh_of(command.compute.mesh), open_finished(run)
        check_options(finished.config, command.sampling, command.compute, prefix="")
        metrics = run.metrics()
        about = command.images, command.inputs, command.compute
        job, reference = finished.measured(*about, mesh, signals)
    if metrics is None:
        raise UserError(f"the run in {run.path} is not finished: no {METRICS}. Train first.")
    trained = finished.networks(mesh, command.sigma_rel)
    with in_folder(job, command.images):
        measuring = Measuring(job, command.sampling, reference, train_classifier(job))
        results = measuring.final(trained, command.n, sigma_rel=command.sigma_rel)
        few = finished.config.objective in FEW_STEP
        metrics |= measuring.few_steps(trained, command.n) if few else {}
        if not is_primary():
            return
        metrics["diffusion"] = results["diffusion"]
        metrics["timings"].update(results["timings"])
        write_json(run.file(METRICS), metrics)
    say(summary(metrics, run.path))
