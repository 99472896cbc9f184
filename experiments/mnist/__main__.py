"""`python -m experiments.mnist {train,sample,evaluate}`; `--help` shows every option."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from eqxldm.sharding import make_mesh

from ..common.diffusion import SamplingConfig, SolverName, check_guidance, check_sampling
from ..common.figures import image_grid, save_png
from ..common.options import check, check_count
from ..common.run import RunFolder, as_dict, write_json
from ..common.sampling import draw_samples
from ..common.spaces import Pixels
from ..common.streams import sampling_key
from ..common.terminal import Signals, UserError, console, run_main
from . import config as cfg, evaluate as ev, stages
from .config import Config, Dataset, DenoiserName, SpaceName
from .data import Digits, load_digits


@dataclass(frozen=True)
class Place:
    """Where things are and what they run on."""

    run_dir: Path | None = None
    """The run folder; runs/<dataset> by default, with -pixel and -unet for such a run."""
    data_dir: Path | None = None
    """A folder with the four IDX files, gzip'd or not; by default they are fetched and cached."""
    devices: int | None = None
    """How many devices share a batch; all by default."""


@dataclass(frozen=True)
class Train:
    """Train everything, sample and measure; goes on where an interrupted run stopped."""

    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    place: Annotated[Place, tyro.conf.arg(name="")] = field(default_factory=Place)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    samples: int = 2000
    """How many images to sample at the end, as many of each class."""
    overwrite: bool = False
    """Delete what the run folder holds and start anew."""


@dataclass(frozen=True)
class Sample:
    """Sample from a finished run into a PNG."""

    dataset: Dataset = "mnist"
    space: SpaceName = "latent"
    denoiser: DenoiserName = "dit"
    place: Annotated[Place, tyro.conf.arg(name="")] = field(default_factory=Place)
    label: int | None = None
    """The class; without it one row for each class."""
    n: int = 10
    """How many images; a row where no label is given."""
    steps: int = SamplingConfig.steps
    guidance: float = SamplingConfig.guidance
    guidance_interval: tuple[float, float] = SamplingConfig.guidance_interval
    solver: SolverName = SamplingConfig.solver
    seed: int = 0
    out: Path | None = None
    """The PNG; by default sample-<label>.png or sample.png in the run folder."""


@dataclass(frozen=True)
class Evaluate:
    """Sample a finished run again and bring samples.npz and metrics.json up to date."""

    dataset: Dataset = "mnist"
    space: SpaceName = "latent"
    denoiser: DenoiserName = "dit"
    place: Annotated[Place, tyro.conf.arg(name="")] = field(default_factory=Place)
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(
        default_factory=SamplingConfig
    )
    n: int = 10_000
    """How many images, as many of each class."""


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
)


def train(command: Train) -> None:
    config, sampling = cfg.resolved(command.config), command.sampling
    check(config)
    check_guidance(sampling, "sampling.")
    check_count("--samples", command.samples)
    signals = Signals()
    digits, mesh = load(command.place, config.dataset), data_mesh(command.place)
    cfg.check_sizes(config, digits, mesh.size)
    check_sampling(cfg.make_diffusion(config), sampling)
    run = open_run(command.place, config)
    with run.locked():
        run.open(as_dict(config), overwrite=command.overwrite)
        run_stages(command, stages.Job(config, digits, run, mesh, signals))


def run_stages(command: Train, job: stages.Job) -> None:
    """What is left to do of the run, stage by stage."""
    config, digits, run, sampling = job.config, job.digits, job.run, command.sampling
    metrics = run.metrics()
    if metrics is not None:  # whatever it was evaluated with since
        console.print(
            f"{run.path} is finished; `evaluate` samples it again, --overwrite starts anew."
        )
        console.print(ev.summary(metrics, run.path))
        return
    stages.describe_data(job)
    classifier = stages.train_classifier(job)
    measured, spent = {}, 0.0
    if config.space == "pixel":
        space, latents = Pixels(job.image_shape[0]), None
    else:
        space, latents = stages.encode_training_set(job, stages.train_autoencoder(job))
        begin = time.monotonic()
        measured["autoencoder"] = ev.measure_autoencoder(config, space, classifier, digits)
        spent = time.monotonic() - begin
    trained = stages.train_diffusion(job, space, latents)
    results = ev.evaluate(config, sampling, run, trained, classifier, digits, command.samples)
    ev.write_pictures(config, sampling, run, trained, digits)
    timings = {**job.timings, **results["timings"]}
    timings["measuring"] = {"seconds": timings["measuring"]["seconds"] + spent}
    timings["total"] = {"seconds": sum(stage["seconds"] for stage in timings.values())}
    metrics = {
        **measured,
        "diffusion": results["diffusion"],
        "timings": timings,
        **ev.describe(config),
    }
    write_json(run.path / "metrics.json", metrics)
    console.print(ev.summary(metrics, run.path))


def sample(command: Sample) -> None:
    sampling = SamplingConfig(
        command.solver, command.steps, command.guidance, command.guidance_interval
    )
    check_guidance(sampling)
    check_count("--n", command.n)
    Signals()
    config, run, trained, classes = finished_run(command)
    check_sampling(cfg.make_diffusion(config), sampling)
    if command.label is None:
        labels = np.repeat(np.arange(classes, dtype=np.int32), command.n)
    elif 0 <= command.label < classes:
        labels = np.full(command.n, command.label, np.int32)
    else:
        raise UserError(f"--label {command.label}: the classes are 0 to {classes - 1}.")
    images = draw_samples(
        ev.generator(config, sampling, trained), labels, sampling_key(command.seed)
    )
    name = "sample.png" if command.label is None else f"sample-{command.label}.png"
    out = command.out or run.path / name
    columns = command.n if command.label is None else math.ceil(math.sqrt(command.n))
    save_png(out, image_grid(images, columns, scale=4))
    console.print(f"{len(images)} images in {out}")


def evaluate(command: Evaluate) -> None:
    check_guidance(command.sampling)
    check_count("--n", command.n, least=10)
    signals = Signals()
    config, run, trained, _ = finished_run(command)
    check_sampling(cfg.make_diffusion(config), command.sampling)
    metrics = run.metrics()
    if metrics is None:
        raise UserError(f"the run in {run.path} is not finished: no metrics.json. Train first.")
    digits, mesh = load(command.place, config.dataset), data_mesh(command.place)
    with run.locked():
        classifier = stages.train_classifier(stages.Job(config, digits, run, mesh, signals))
        results = ev.evaluate(config, command.sampling, run, trained, classifier, digits, command.n)
        metrics["diffusion"] = results["diffusion"]
        metrics["timings"].update(results["timings"])
        write_json(run.path / "metrics.json", metrics)
    console.print(ev.summary(metrics, run.path))


def load(place: Place, dataset: str) -> Digits:
    return load_digits(dataset, place.data_dir, log=console.print)


def data_mesh(place: Place) -> Mesh:
    found = jax.devices()
    count = len(found) if place.devices is None else place.devices
    if not 1 <= count <= len(found):
        raise UserError(f"--devices: asked for {count} devices, {len(found)} are there.")
    return make_mesh({"data": count}, found[:count])


def open_run(place: Place, which: Config | Sample | Evaluate) -> RunFolder:
    name = cfg.run_name(which.dataset, which.space, which.denoiser)
    return RunFolder(place.run_dir or Path("runs") / name)


def finished_run(command: Sample | Evaluate):
    """A run's configuration, folder, averaged models and number of classes."""
    run = open_run(command.place, command)
    config = cfg.from_dict(run.config())
    trained, classes = stages.load_finished(config, run)
    return config, run, trained, classes


def main(args: Sequence[str] | None = None) -> None:
    command = tyro.cli(Command, args=args, prog="python -m experiments.mnist", description=__doc__)
    {Train: train, Sample: sample, Evaluate: evaluate}[type(command)](command)


if __name__ == "__main__":
    sys.exit(run_main(main))
