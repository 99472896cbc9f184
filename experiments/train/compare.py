"""`python -m experiments.train.compare`: the comparison behind the defaults of MNIST's DiT.

Takes the classifier, the autoencoder and its latents of a finished run, trains the DiT anew for
each variant with a quarter of the images that the default run sees, samples, measures, and prints a
table. Every variant is a run folder of its own, so that the comparison resumes like any run.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from .commands import finished_config, train
from .job import Inputs
from .options import Range, Samples, check
from .presets import preset
from .run import CONFIG, RunFolder, as_dict, write_json
from .terminal import UserError, run_main, say

BASE = preset("mnist").config.diffusion
HALF = replace(BASE, steps=BASE.steps // 2)
VARIANTS = {
    "default": BASE,
    "flow, velocity": replace(BASE, path="flow", prediction="velocity"),
    "ddpm, eps": replace(BASE, path="ddpm", prediction="eps"),
    "learning rate 1e-3": replace(BASE, learning_rate=1e-3),
    "learning rate 2e-3": replace(BASE, learning_rate=2e-3),
    "batch 128": replace(HALF, batch_size=2 * BASE.batch_size),
    "time_mean 0.5": replace(BASE, time_mean=0.5),
    "192 wide": HALF,
}
WIDER = {"192 wide": {"width": 192, "num_heads": 6}}


@dataclass(frozen=True)
class Compare:
    """Compare variants of the DiT at equal budget."""

    # A finished run, whose classifier, autoencoder and latents serve all variants.
    run_dir: Path = Path("runs/mnist")
    out: Path = Path("runs/compare-mnist")  # A folder for the variants' run folders.
    images: Path | None = None  # As in training.
    share: Annotated[float, Range(0, 1, "(]")] = 0.25  # Of the default run's steps.
    samples: Samples = 2000  # Of each variant.
    only: tuple[str, ...] = tuple(VARIANTS)  # The variants to run.


def compare(options: Compare) -> None:
    check(options)
    base, rows = finished_config(RunFolder(options.run_dir)), []
    for name in options.only:
        if name not in VARIANTS:
            raise UserError(f"--only {name!r}: known are {', '.join(map(repr, VARIANTS))}.")
        variant = VARIANTS[name]
        variant = replace(variant, steps=max(2, int(variant.steps * options.share)))
        variant = replace(variant, warmup=min(variant.warmup, variant.steps - 1))
        config = replace(base, diffusion=variant, dit=replace(base.dit, **WIDER.get(name, {})))
        run = RunFolder(options.out / name.replace(", ", "-").replace(" ", "-"))
        if not (run.path / CONFIG).exists():
            shutil.rmtree(run.path, ignore_errors=True)
            stage = "checkpoints/classifier"
            shutil.copytree(options.run_dir / stage, run.path / stage)
            write_json(run.file(CONFIG), as_dict(config))
        say(f"--- {name}")
        inputs = Inputs(vae=options.run_dir, latents=options.run_dir / "latents")
        settings = {field: getattr(config, field) for field in config.__dataclass_fields__}
        train(
            replace(
                preset("mnist"), images=options.images, run_dir=run.path, inputs=inputs,
                samples=options.samples, **settings,
            )
        )  # fmt: skip
        rows.append((name, variant, (run.metrics() or {})["diffusion"]))
    say("\n| variant | steps x batch | FD | accuracy | precision | recall |")
    say("|---|---|---|---|---|---|")
    for name, variant, found in rows:
        budget = f"{variant.steps} x {variant.batch_size}"
        figures = (f"{found[k]:.3f}" for k in ("fd", "accuracy", "precision", "recall"))
        say(f"| {name} | {budget} | {' | '.join(figures)} |")


def main(args: Sequence[str] | None = None) -> None:
    compare(tyro.cli(Compare, args=args, prog="python -m experiments.train.compare"))


if __name__ == "__main__":
    sys.exit(run_main(main))
