"""`python -m experiments.train.tables {modern,few-steps}`: tables on CIFAR-10's latents.

`modern`: DiT as published, each newer addition alone, and all together, at equal steps and about
equal multiply-adds. `few-steps`: objectives by the number of network calls. Each row is trained
with several seeds at once, and measured by the distance of features of the job's own classifier
(`fd`) to the test images'. Classifier and autoencoder are those of a run, or are trained first.
A row that is finished stays in the folder of results, so that the command goes on where it
stopped. It writes results.json and table.md.
"""

import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from tyro.conf import OmitArgPrefixes

import eqxldm as ex
from eqxldm.durable import replacing
from eqxldm.metrics import frechet_distance

from .autoencoder import obtain_autoencoder
from .classifier import train_classifier
from .commands import Autoencoder, Train, in_folder, prepare
from .config import SamplingConfig
from .few_steps import variants
from .job import Compute
from .options import MaybeSteps, Range, Samples, check
from .presets import BLOCKS, HEAD, INTERNAL, changed, preset
from .scores import Comparison, accuracy, frechet
from .seeds import Built, Draw, build, posteriors, train
from .streams import stream_key
from .terminal import UserError, run_main, say

BUILDERS = 4  # rows that are compiled while another one trains


@dataclass(frozen=True)
class Options:
    """What both tables are told."""

    images: Path | None = None  # A folder of CIFAR-10's training images, one for each class.
    test_images: Path | None = None  # Of the test images, which are measured against.
    # A run with a classifier and an autoencoder of these images; trained here where it has none.
    run_dir: Path = Path("runs/cifar10-autoencoder")
    out: Path | None = None  # The folder of results; by default in runs/, with the table's name.
    steps: MaybeSteps = 0  # Training steps of a row; 0: those of the preset.
    seeds: Annotated[int, Range(1, 64)] = 3  # Networks of each row.
    samples: Samples = 5000  # Of each network.
    only: tuple[str, ...] = ()  # The rows to make; by default all.
    # The preset whose networks these are; smoke is for a quick look.
    preset: Literal["cifar10", "smoke"] = "cifar10"
    compute: OmitArgPrefixes[Compute] = field(default_factory=lambda: Compute(sampling_batch=1000))


@dataclass(frozen=True)
class Modern(Options):
    """Newer additions to DiT and its loss, each alone and together."""


@dataclass(frozen=True)
class FewSteps(Options):
    """Objectives by the number of network calls."""


@dataclass(frozen=True)
class Row:
    """A network to train, and the ways in which it is sampled, by name."""

    command: Train
    sampling: dict[str, SamplingConfig]


COSINE, DISPERSIVE = "--diffusion.cosine 0.5", "--dit.early-depth 2 --diffusion.dispersive 0.25"
IN_CONTEXT = "--dit.condition-tokens 1"
TOKENS = f"{IN_CONTEXT} --dit.time-tokens 1 --dit.no-modulated"
VELOCITY = "--diffusion.path flow --diffusion.prediction velocity"
X0 = "--diffusion.path flow --diffusion.prediction x0 --diffusion.weight velocity"
VARIANTS = {
    "published": "",
    "QK norm": "--dit.qk-norm",
    "RMSNorm": "--dit.norm rms",
    "SwiGLU": "--dit.swiglu",
    "RoPE": "--dit.rope",
    "blocks": BLOCKS,  # these four
    "cosine term": COSINE,
    "auxiliary head": HEAD,
    "dispersive term": DISPERSIVE,
    "condition token": IN_CONTEXT,
    "tokens, no adaLN": TOKENS,
    "blocks, cosine": f"{BLOCKS} {COSINE}",
    "blocks, head": f"{BLOCKS} {HEAD}",
    "all": f"{BLOCKS} {HEAD} {COSINE} {DISPERSIVE} {IN_CONTEXT}",
    "flow, velocity": VELOCITY,
    "flow, x0, velocity loss": X0,
    "blocks, head, flow": f"{BLOCKS} {HEAD} {VELOCITY}",
    "time shift": "",  # by the number of dimensions, which the autoencoder says
}
# Beside these, what more guidance by the classes does: it may be all that the head's does.
MORE_GUIDANCE = ("published", "blocks, head")


def modern_rows(options: Options, shape: Any) -> dict[str, Row]:
    """The rows of the first table, guided as the preset is, and not."""
    base, rows = _base(options, "denoising"), {}
    for name, words in VARIANTS.items():
        command = changed(base, words)
        if name == "time shift":
            shift = ex.dimension_shift(shape)
            command = changed(command, f"--diffusion.time-shift {shift} --sampling.shift {shift}")
        guided, plain = command.sampling, replace(command.sampling, guidance=1.0)
        sampling = {"guided": guided, "plain": plain}
        if name in MORE_GUIDANCE:
            sampling["guidance 2.4"] = replace(guided, guidance=2.4)
        if command.diffusion.early:
            for how in ("plain", *(how for how in sampling if how != "plain")):
                internal = changed(replace(command, sampling=sampling[how]), INTERNAL).sampling
                told = f"internal {internal.internal_guidance:g}"
                sampling[told if how == "plain" else f"{how}, {told}"] = internal
        rows[name] = Row(command, sampling)
    return rows


def few_rows(options: Options, shape: Any) -> dict[str, Row]:
    """The rows of the second table: each objective at 1, 2, 4 and 8 steps, and the ODE."""
    rows, names = {}, ("flow", "meanflow", "imf", "shortcut", "scm")
    for name in names:
        command = _base(options, name)
        if name == "flow":
            few = _base(options, "imf")  # the same steps in all
            same = dict(steps=few.diffusion.steps, warmup=few.diffusion.warmup)
            command = replace(command, diffusion=replace(command.diffusion, **same))
            steps = (1, 2, 4, 8, 20, 50)
            sampling = {str(n): replace(command.sampling, steps=n) for n in steps}
        else:
            found = variants(command.config, command.sampling)
            sampling = {str(calls): how for calls, how in found.items()}
        rows[name] = Row(command, sampling)
    return rows


def _base(options: Options, objective: Any) -> Train:
    found = preset(options.preset, objective=objective, form="published")
    if not options.steps:
        return found
    share = options.steps / preset(options.preset).diffusion.steps
    steps = max(2, round(found.diffusion.steps * share))
    pretrain = round(found.few.pretrain * share)
    few = replace(found.few, pretrain=pretrain, warmup=round(found.few.warmup * share))
    warmup = min(found.diffusion.warmup, steps - 1)
    shorter = replace(found.diffusion, steps=steps, warmup=warmup)
    return replace(found, diffusion=shorter, few=few)


def make(options: Options) -> None:
    check(options)
    name = "modern" if isinstance(options, Modern) else "few-steps"
    out = options.out or Path("runs") / f"table-{name}"
    base = preset(options.preset)
    inputs = replace(base.inputs, test_images=options.test_images)
    base = replace(base, images=options.images, run_dir=options.run_dir, inputs=inputs)
    base = replace(base, compute=options.compute)
    base = Autoencoder(**{f.name: getattr(base, f.name) for f in fields(Train)})
    job, reference = prepare(base, ("classifier", "autoencoder"))
    with in_folder(job, options.images, overwrite=False):
        features = train_classifier(job)
        space = obtain_autoencoder(job)
    shape, condition = space.latent_shape(*job.config.padded), job.condition
    rows = (modern_rows if name == "modern" else few_rows)(options, shape)
    for wanted in options.only:
        if wanted not in rows:
            raise UserError(f"--only {wanted!r}: known are {', '.join(map(repr, rows))}.")
    rows = {n: row for n, row in rows.items() if not options.only or n in options.only}
    out.mkdir(parents=True, exist_ok=True)
    path = lambda n: out / f"{n.replace(', ', '-').replace(' ', '-')}.json"
    settings = {n: getattr(options, n) for n in ("steps", "seeds", "samples", "preset")}
    found = {n: _finished(path(n), settings) for n in rows}
    missing = [n for n in rows if found[n] is None]
    if missing:
        data = posteriors(job.source, job.config, space, job.run.file("posteriors.npz"))
        real, _ = reference.described(features)
        others = reference.others(features, options.samples)
        noise = {"fd_real": frechet_distance(real.features, others.features)}
        labels = np.arange(options.samples) % len(job.source.class_names)
        compare = lambda images: Comparison(real, features(images), labels)
        with ThreadPoolExecutor(BUILDERS) as pool:
            prepared = lambda row: _prepared(row, condition, space, shape, data, options)
            building = {n: pool.submit(prepared, rows[n]) for n in missing}
            for n in missing:
                built, draws = building.pop(n).result()
                networks, seconds = train(built, data, n)
                drawn = {how: _measured(draw, networks, labels, compare) for how, draw in draws}
                for how, sampling in rows[n].sampling.items():
                    told = ("solver", "steps", "guidance")
                    drawn[how] |= {name: getattr(sampling, name) for name in told}
                about = _about(built, seconds) | noise | settings
                device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
                found[n] = {"row": n, **about, "device": device, "sampled": drawn}
                with replacing(path(n)) as temporary:
                    temporary.write_text(json.dumps(found[n], indent=1) + "\n")
                _write(out, found, name)
    say(f"\n{_write(out, found, name)}\nresults.json and table.md are in {out}")


def _write(out: Path, found: dict[str, Any], name: str) -> str:
    """The rows that are finished, as JSON and as a table."""
    done = {n: row for n, row in found.items() if row is not None}
    table = "\n".join(_lines(done, name)) + "\n"
    (out / "results.json").write_text(json.dumps(list(done.values()), indent=1) + "\n")
    (out / "table.md").write_text(table)
    return table


def _prepared(
    row: Row, condition: Any, space: Any, shape: Any, data: Any, options: Options
) -> tuple[Built, list[tuple[str, Draw]]]:
    """All that a row runs, compiled."""
    built = build(row.command.config, condition, space, shape, data, options.seeds)
    draw = lambda how: Draw(
        built, how, space, shape, condition.null, options.compute.sampling_batch
    )
    return built, [(name, draw(how)) for name, how in row.sampling.items()]


def _measured(
    draw: Draw, networks: list[Any], labels: Any, compare: Callable[[Any], Comparison]
) -> dict[str, Any]:
    """The scores of each seed's network, sampled so, and images a second."""
    scores: dict[str, list[float]] = {"fd": [], "accuracy": [], "images_per_second": []}
    for seed, network in enumerate(networks):
        images, rate = draw(network, labels, stream_key(seed, "samples"))
        compared = compare(images)
        for key, value in {**frechet(compared), **accuracy(compared)}.items():
            scores[key].append(value)
        scores["images_per_second"].append(rate)
    return scores


def _about(built: Built, seconds: float) -> dict[str, Any]:
    return {
        "parameters": built.parameters,
        "multiply_adds": built.multiply_adds,
        "training_steps": built.config.diffusion.steps,
        "batch_size": built.config.diffusion.batch_size,
        "seconds": seconds,
    }


def _finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a finished one with the same settings."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return found if all(found.get(n) == v for n, v in settings.items()) else None


def _lines(found: dict[str, Any], name: str) -> list[str]:
    """The table in Markdown: means over the seeds, and their standard deviation."""

    def cell(scores: dict[str, Any], key: str = "fd", digits: int = 2) -> str:
        values = np.array(scores[key])
        spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{values.mean():.{digits}f}{spread}"

    if name == "few-steps":
        columns = "objective | steps | FD | accuracy | images/s"
        lines = [f"| {columns} |", "|---|---|---|---|---|"]
        for n, row in found.items():
            for how, scores in row["sampled"].items():
                shown = f"{cell(scores)} | {cell(scores, 'accuracy', 3)}"
                # A guided step calls the network twice; others have the guidance in them, if any.
                guided = scores["guidance"] != 1
                steps = f"{how}, guided" if guided else how
                rate = np.mean(scores["images_per_second"])
                lines.append(f"| {n} | {steps} | {shown} | {rate:.0f} |")
        return lines
    columns = "addition | parameters | multiply-adds | FD, guided | FD, plain | accuracy, guided"
    lines = [f"| {columns} |", "|---|---|---|---|---|---|"]
    for n, row in found.items():
        scores = row["sampled"]
        counts = f"{row['parameters'] / 1e6:.2f} M | {row['multiply_adds'] / 1e6:.1f} M"
        fd = f"{cell(scores['guided'])} | {cell(scores['plain'])}"
        lines.append(f"| {n} | {counts} | {fd} | {cell(scores['guided'], 'accuracy', 3)} |")
        for how in (how for how in scores if how not in ("guided", "plain")):
            pair = (cell(scores[how]), cell(scores[how], "accuracy", 3))
            fd = f" | {pair[0]} |" if how.startswith("internal") else f"{pair[0]} | | {pair[1]}"
            lines.append(f"| {n}: {how} | | | {fd} |")
    return lines


def main(args: Sequence[str] | None = None) -> None:
    kinds = (
        Annotated[Modern, tyro.conf.subcommand("modern")]
        | Annotated[FewSteps, tyro.conf.subcommand("few-steps")]
    )
    make(tyro.cli(kinds, args=args, prog="python -m experiments.train.tables", description=__doc__))


if __name__ == "__main__":
    sys.exit(run_main(main))
