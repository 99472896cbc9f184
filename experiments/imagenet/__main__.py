"""`python -m experiments.imagenet {train,autoencoder,sample,evaluate}`; `--help` shows all options.

`--preset imagenet256|cifar10|smoke` chooses the defaults, which `--help` then shows.
"""

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from eqxldm.data import ImageSource, open_images
from eqxldm.models import LPIPS, AutoencoderKL
from eqxldm.sharding import make_mesh, parse_mesh

from ..common.diffusion import SamplingConfig, SolverName, check_guidance, check_sampling
from ..common.figures import image_grid, read_png, save_png
from ..common.options import check, check_count
from ..common.processes import Processes, agreed, barrier, is_primary, join, leave, together
from ..common.run import RunFolder, as_dict, write_json
from ..common.telemetry import LogOptions, Telemetry
from ..common.terminal import Signals, UserError, console, run_main
from . import autoencoder as ae, config as cfg, evaluate as ev, stages
from .config import PRESETS, AutoencoderConfig, ClassifierConfig, Config, LatentsConfig, PresetName
from .images import EACH, SHAPES, make_shapes
from .job import LATENTS, Compute, Job, describe_data


@dataclass(frozen=True)
class Place:
    """Where things are."""

    preset: PresetName = "imagenet256"
    """The defaults of all other options."""
    images: Path | None = None
    """Class folders of images; or ILSVRC tars, parquet or ArrayRecord files."""
    test_images: Path | None = None
    """Held-out images of the same classes to measure against; by default training images."""
    vae: Path | None = None
    """Published weights, or a run's: a diffusers folder, autoencoder.safetensors, a run folder."""
    lpips: Path | None = None
    """A folder with LPIPS's weights, for the autoencoder's loss."""
    run_dir: Path | None = None
    """The run folder; runs/<preset> by default, runs/<preset>-autoencoder for it alone."""
    latents: Path | None = None
    """The latent cache, which runs can share; by default latents in the run folder."""


Unnamed = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Train:
    """Train everything, sample and measure; goes on where an interrupted run stopped."""

    config: Annotated[Config, Unnamed] = field(default_factory=Config)
    place: Annotated[Place, Unnamed] = field(default_factory=Place)
    compute: Annotated[Compute, Unnamed] = field(default_factory=Compute)
    processes: Annotated[Processes, Unnamed] = field(default_factory=Processes)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    log: LogOptions = field(default_factory=LogOptions)
    samples: int = 50_000
    """How many images to sample at the end, as many of each class."""
    sampling_batch: int = 64
    """Images sampled at once, by each process."""
    overwrite: bool = False
    """Delete what the run folder holds and start anew."""


@dataclass(frozen=True)
class Autoencoder:
    """Train the autoencoder alone and measure it; `train --vae RUN_DIR` takes it then."""

    size: int = Config.size
    """The images' side, after ADM's centre crop."""
    num_classes: int | None = None
    """Labels of the judge; by default as many as the images have classes."""
    seed: int = 0
    checkpoint_every: int = Config.checkpoint_every
    """Steps between checkpoints."""
    reference: int = Config.reference
    """Real images, at most, whose reconstructions are measured."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    place: Annotated[Place, Unnamed] = field(default_factory=Place)
    compute: Annotated[Compute, Unnamed] = field(default_factory=Compute)
    processes: Annotated[Processes, Unnamed] = field(default_factory=Processes)
    log: LogOptions = field(default_factory=LogOptions)
    overwrite: bool = False
    """Delete what the run folder holds and start anew."""


@dataclass(frozen=True)
class Sample:
    """Sample from a finished run into a PNG."""

    preset: PresetName = "imagenet256"
    run_dir: Path | None = None
    """The run folder; runs/<preset> by default."""
    label: int | None = None
    """The class; without it one row for each of some classes."""
    n: int = 10
    """How many images; a row where no label is given."""
    steps: int = SamplingConfig.steps
    guidance: float = SamplingConfig.guidance
    guidance_interval: tuple[float, float] = SamplingConfig.guidance_interval
    solver: SolverName = SamplingConfig.solver
    seed: int = 0
    sigma_rel: float | None = None
    """The width of a post-hoc average, from a run with --diffusion.posthoc; else the first one."""
    sampling_batch: int = 64
    """Images sampled at once."""
    out: Path | None = None
    """The PNG; by default sample-<label>.png or sample.png in the run folder."""


@dataclass(frozen=True)
class Evaluate:
    """Sample a finished run again and bring samples.npz and metrics.json up to date."""

    place: Annotated[Place, Unnamed] = field(default_factory=Place)
    compute: Annotated[Compute, Unnamed] = field(default_factory=Compute)
    processes: Annotated[Processes, Unnamed] = field(default_factory=Processes)
    sampling: Annotated[SamplingConfig, Unnamed] = field(default_factory=SamplingConfig)
    n: int = 50_000
    """How many images, as many of each class."""
    sigma_rel: float | None = None
    """The width of a post-hoc average, from a run with --diffusion.posthoc; else the first one."""
    sampling_batch: int = 64
    """Images sampled at once, by each process."""


SMOKE = "smoke"
NO_IMAGES = """no images: --images (make: IMAGES=...) is needed. It can be
  - a folder with a folder a class, images in each, such as ImageNet's train/;
  - a folder of class tars (n01440764.tar, ...), or ILSVRC2012_img_train.tar, which holds them;
  - .parquet files with the columns image and label, or .arrayrecord files.
All stages on images that the run makes itself, in some minutes on two cores:
  make train-imagenet SMOKE=1"""


def train(command: Train) -> None:
    check_guidance(command.sampling, "sampling.")
    check_count("--samples", command.samples, least=10)
    check_count("--sampling-batch", command.sampling_batch)
    check_sampling(cfg.make_diffusion(command.config), command.sampling)
    every = ("classifier", "autoencoder", "diffusion")
    job, vae, lpips, test = prepare(command, command.config, every)
    with held(job, overwrite=command.overwrite):
        run_stages(command, job, vae, lpips, test)


def run_stages(
    command: Train,
    job: Job,
    vae: AutoencoderKL | None,
    lpips: LPIPS | None,
    test: ImageSource | None,
) -> None:
    """What is left to do of the run, stage by stage."""
    config, run, sampling = job.config, job.run, command.sampling
    metrics = run.metrics()
    if agreed(metrics is not None):  # whatever it was evaluated with since
        console.print(
            f"{run.path} is finished; `evaluate` samples it again, --overwrite starts anew."
        )
        if metrics is not None:
            console.print(ev.summary(metrics, run.path))
        return
    classifier = stages.train_classifier(job)
    autoencoder = ae.obtain_autoencoder(job, vae, lpips)
    reference = ev.Reference(config, job.source, test, strict=job.compute.strict)
    measured: dict[str, Any] = {}
    if is_primary():
        measured = ev.measure_autoencoder(config, run, autoencoder, classifier, reference)
    latents = stages.cache_latents(job, autoencoder)
    trained = stages.train_diffusion(job, autoencoder, latents)
    results = ev.evaluate(
        config,
        sampling,
        run,
        trained,
        classifier,
        reference,
        len(job.source.class_names),
        command.samples,
        batch=command.sampling_batch,
    )
    if not is_primary():
        return
    ev.write_pictures(config, sampling, run, trained, reference, len(job.source.class_names))
    with Telemetry(run, job.log) as telemetry:
        for name in ("reconstructions", "samples"):
            grid = read_png(run.path / f"{name}.png")
            telemetry.images("samples", config.diffusion.steps, name, grid)
    timings = {**job.timings, **results["timings"]}
    timings["total"] = {"seconds": sum(stage["seconds"] for stage in timings.values())}
    metrics = {
        "autoencoder": measured,
        "diffusion": results["diffusion"],
        "timings": timings,
        **ev.describe(config),
    }
    write_json(run.path / "metrics.json", metrics)
    console.print(ev.summary(metrics, run.path))


def train_autoencoder(command: Autoencoder) -> None:
    base = PRESETS[command.place.preset]().config
    names = ("size", "num_classes", "seed", "checkpoint_every", "reference")
    names += ("classifier", "autoencoder", "latents")
    config = replace(base, **{name: getattr(command, name) for name in names})
    if command.place.vae is not None:
        raise UserError("--vae: this command trains one; leave it out.")
    job, _, lpips, test = prepare(command, config, ("classifier", "autoencoder"))
    with held(job, overwrite=command.overwrite):
        metrics = job.run.metrics()
        if not agreed(metrics is not None):
            classifier = stages.train_classifier(job)
            autoencoder = ae.obtain_autoencoder(job, None, lpips)
            if not is_primary():
                return
            reference = ev.Reference(config, job.source, test, strict=job.compute.strict)
            found = ev.measure_autoencoder(config, job.run, autoencoder, classifier, reference)
            ev.write_curves(job.run)
            metrics = {"autoencoder": found, "timings": job.timings, **ev.describe(config)}
            write_json(job.run.path / "metrics.json", metrics)
        if metrics is not None:
            console.print(ev.summary(metrics, job.run.path))
        console.print(f"`train --vae {job.run.path}` takes this autoencoder.")


def prepare(
    command: Train | Autoencoder, config: Config, trained: tuple[str, ...]
) -> tuple[Job, AutoencoderKL | None, LPIPS | None, ImageSource | None]:
    """The job and what is given to it, everything checked and nothing written."""
    join(command.processes)
    signals = Signals()
    place, compute = command.place, command.compute
    alone = isinstance(command, Autoencoder)
    run = open_run(place.run_dir, place.preset, "-autoencoder" if alone else "")
    with together():
        check(config)
        check(compute)
        check_count("--grad-accum-steps", compute.grad_accum_steps)
        check_count("--threads", compute.threads)
        check_count("--workers", compute.workers, least=0)
        cfg.check_diffusion(config)
        mesh = mesh_of(compute)
        vae = ae.load_vae(place.vae) if place.vae is not None else None
        lpips = ae.load_lpips(place.lpips) if place.lpips is not None else None
        own = place.images is None and place.preset == SMOKE
        source = None if own else open_source(place.images)
        count = len(SHAPES) * EACH if source is None else len(source)
        classes = len(SHAPES if source is None else source.class_names)
        labels = classes if config.num_classes is None else config.num_classes
        if classes > labels:
            raise UserError(
                f"--num-classes {labels}: {place.images or 'the images'} has {classes} classes. "
                "Leave it out or raise it."
            )
        test = open_test_images(place.test_images, source)
        needed = tuple(s for s in trained if not (s == "autoencoder" and vae is not None))
        cfg.check_sizes(config, count, labels, mesh, compute.grad_accum_steps, vae, needed)
    if source is None:
        with together():
            if is_primary():
                run.path.mkdir(parents=True, exist_ok=True)
                make_shapes(run.path / "images")
        with together():
            source = open_images(run.path / "images")
    latents = place.latents or run.path / LATENTS
    job = Job(config, compute, source, labels, run, latents, mesh, signals, command.log)
    if not alone:
        with together():
            stages.check_cache(job, vae, overwrite=command.overwrite)
    return job, vae, lpips, test


@contextlib.contextmanager
def held(job: Job, *, overwrite: bool | None = None) -> Iterator[None]:
    """Holds the run's folder until all processes are done with it.

    `overwrite` says how a run is begun or resumed; None: it is there and stays as it is.
    """
    with contextlib.ExitStack() as stack:
        with together():
            stack.enter_context(job.run.locked())
            if overwrite is not None:
                job.run.open(as_dict(job.config), overwrite=overwrite)
            describe_data(job)
        yield
        barrier("done")  # process 0 measures and draws for longer than jax waits at an exit


def open_source(path: Path | None) -> ImageSource:
    if path is None:
        raise UserError(NO_IMAGES)
    source = open_images(path)
    if not source.class_names:
        raise UserError(
            f"--images {path}: holds images without labels; needed is one folder for each class."
        )
    return source


def open_test_images(path: Path | None, source: ImageSource | None) -> ImageSource | None:
    if path is None:
        return None
    test, names = open_images(path), SHAPES if source is None else source.class_names
    if test.class_names != names:
        raise UserError(
            f"--test-images {path}: its {len(test.class_names)} classes are not the {len(names)} "
            "of --images."
        )
    return test


def mesh_of(compute: Compute) -> Any:
    try:
        return make_mesh(parse_mesh(compute.mesh))
    except ValueError as error:
        raise UserError(f"--mesh: {error}") from None


def open_run(run_dir: Path | None, preset: str, ending: str = "") -> RunFolder:
    return RunFolder(run_dir or Path("runs") / f"{preset}{ending}", primary=is_primary())


def sample(command: Sample) -> None:
    sampling = SamplingConfig(
        command.solver, command.steps, command.guidance, command.guidance_interval
    )
    check_guidance(sampling)
    check_count("--n", command.n)
    check_count("--sampling-batch", command.sampling_batch)
    Signals()
    run = open_run(command.run_dir, command.preset)
    config = cfg.from_dict(run.config())
    check_sampling(cfg.make_diffusion(config), sampling)
    trained, _, classes = stages.load_finished(config, run, make_mesh(), command.sigma_rel)
    if command.label is None:
        labels = np.repeat(ev.shown_classes(classes), command.n)
    elif 0 <= command.label < classes:
        labels = np.full(command.n, command.label, np.int32)
    else:
        raise UserError(f"--label {command.label}: the classes are 0 to {classes - 1}.")
    images = ev.draw(config, sampling, trained, labels, command.seed, batch=command.sampling_batch)
    name = "sample.png" if command.label is None else f"sample-{command.label}.png"
    out = command.out or run.path / name
    columns = command.n if command.label is None else math.ceil(math.sqrt(command.n))
    save_png(out, image_grid(images, columns))
    console.print(f"{len(images)} images in {out}")


def evaluate(command: Evaluate) -> None:
    join(command.processes)
    sampling, place = command.sampling, command.place
    check_guidance(sampling)
    check(command.compute)
    check_count("--n", command.n, least=10)
    check_count("--sampling-batch", command.sampling_batch)
    signals, run = Signals(), open_run(place.run_dir, place.preset)
    with together():
        mesh, config = mesh_of(command.compute), cfg.from_dict(run.config())
        check_sampling(cfg.make_diffusion(config), sampling)
        made = run.path / "images"
        source = open_source(made if place.images is None and made.exists() else place.images)
        test = open_images(place.test_images) if place.test_images is not None else None
        metrics = run.metrics()
    trained, labels, classes = stages.load_finished(config, run, mesh, command.sigma_rel)
    if metrics is None:
        raise UserError(f"the run in {run.path} is not finished: no metrics.json. Train first.")
    job = Job(config, command.compute, source, labels, run, run.path / LATENTS, mesh, signals)
    with held(job):
        classifier = stages.train_classifier(job)
        reference = ev.Reference(config, source, test, strict=job.compute.strict)
        results = ev.evaluate(
            config,
            sampling,
            run,
            trained,
            classifier,
            reference,
            classes,
            command.n,
            batch=command.sampling_batch,
            sigma_rel=command.sigma_rel,
        )
        if not is_primary():
            return
        metrics["diffusion"] = results["diffusion"]
        metrics["timings"].update(results["timings"])
        write_json(run.path / "metrics.json", metrics)
    console.print(ev.summary(metrics, run.path))


def commands(name: PresetName) -> Any:
    """The program's commands with the defaults of a preset."""
    preset = PRESETS[name]()
    config, sampling, place = preset.config, preset.sampling, Place(preset=name)
    names = ("size", "num_classes", "seed", "checkpoint_every", "reference")
    names += ("classifier", "autoencoder", "latents")
    alone = Autoencoder(**{n: getattr(config, n) for n in names}, place=place)
    solver = {n: getattr(sampling, n) for n in ("steps", "guidance", "guidance_interval", "solver")}
    defaults: dict[str, Any] = {
        "train": Train(config, place, sampling=sampling, samples=preset.samples),
        "autoencoder": alone,
        "sample": Sample(name, **solver),
        "evaluate": Evaluate(place, sampling=sampling, n=preset.samples),
    }
    kinds = [
        Annotated[type(default), tyro.conf.subcommand(command, default=default)]
        for command, default in defaults.items()
    ]
    union: Any = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    return union


def chosen_preset(args: Sequence[str]) -> PresetName:
    """The preset that the arguments name, which says what all other options start from."""
    for i, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name == "--preset":
            value = value or (args[i + 1] if i + 1 < len(args) else "")
            if value in PRESETS:
                return value  # pyright: ignore[reportReturnType]
    return "imagenet256"


def main(args: Sequence[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else args
    command = tyro.cli(
        commands(chosen_preset(args)),
        args=args,
        prog="python -m experiments.imagenet",
        description=__doc__,
    )
    run = {Train: train, Autoencoder: train_autoencoder, Sample: sample, Evaluate: evaluate}
    run[type(command)](command)


if __name__ == "__main__":
    leave(lambda: run_main(main))
