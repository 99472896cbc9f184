"""`python -m experiments.mnist.compare`: the comparison behind the DiT's defaults.

Takes the autoencoder, its latents and the judge of a finished run, trains the DiT anew for each
variant with a quarter of the images that the default run sees, samples, measures, and prints a
table. Every variant is a run folder of its own, so that the comparison resumes like any run.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from ..common.run import RunFolder, as_dict, write_json
from ..common.terminal import UserError, console, run_main
from . import __main__ as program, config as cfg
from .config import Config, DiffusionConfig, DiTConfig

BASE = cfg.resolved(Config()).diffusion
HALF = replace(BASE, steps=BASE.steps and BASE.steps // 2)
VARIANTS: dict[str, DiffusionConfig] = {
    "default": BASE,
    "flow, velocity": replace(BASE, path="flow", prediction="velocity"),
    "ddpm, eps": replace(BASE, path="ddpm", prediction="eps"),
    "learning rate 1e-3": replace(BASE, learning_rate=1e-3),
    "learning rate 2e-3": replace(BASE, learning_rate=2e-3),
    "batch 128": replace(HALF, batch_size=2 * BASE.batch_size),
    "time_mean 0.5": replace(BASE, time_mean=0.5),
    "192 wide": HALF,
}
SIZES = {"192 wide": DiTConfig(width=192, num_heads=6)}


@dataclass(frozen=True)
class Compare:
    """Compare variants of the DiT at equal budget."""

    run_dir: Path = Path("runs/mnist")
    """A finished run, whose autoencoder and latents serve all variants."""
    out: Path = Path("runs/compare-mnist")
    data_dir: Path | None = None
    share: float = 0.25
    """Of the default run's steps."""
    samples: int = 2000
    only: tuple[str, ...] = tuple(VARIANTS)
    """The variants to run."""


def compare(options: Compare) -> None:
    base = cfg.from_dict(RunFolder(options.run_dir).config())
    rows = []
    for name in options.only:
        if name not in VARIANTS:
            raise UserError(f"--only {name!r}: known are {', '.join(map(repr, VARIANTS))}.")
        variant = VARIANTS[name]
        variant = replace(variant, steps=max(2, int((variant.steps or 0) * options.share)))
        config = replace(base, diffusion=variant, dit=SIZES.get(name, base.dit))
        config = cfg.resolved(config)
        run = RunFolder(options.out / name.replace(", ", "-").replace(" ", "-"))
        if not (run.path / "config.json").exists():
            shutil.rmtree(run.path, ignore_errors=True)
            stage = "checkpoints/autoencoder"
            shutil.copytree(options.run_dir / stage, run.path / stage)
            for file in ("latents.npz", "autoencoder.json"):
                shutil.copy(options.run_dir / file, run.path / file)
            write_json(run.path / "config.json", as_dict(config))
        console.print(f"--- {name}")
        place = program.Place(run_dir=run.path, data_dir=options.data_dir)
        program.train(program.Train(config=config, place=place, samples=options.samples))
        metrics = run.metrics()
        assert metrics is not None
        rows.append((name, variant, metrics["diffusion"]))
    console.print("\n| variant | steps x batch | FD | accuracy | precision | recall |")
    console.print("|---|---|---|---|---|---|")
    for name, variant, found in rows:
        budget = f"{variant.steps} x {variant.batch_size}"
        figures = (f"{found[k]:.3f}" for k in ("fd", "accuracy", "precision", "recall"))
        console.print(f"| {name} | {budget} | {' | '.join(figures)} |")


def main(args: Sequence[str] | None = None) -> None:
    compare(tyro.cli(Compare, args=args, prog="python -m experiments.mnist.compare"))


if __name__ == "__main__":
    sys.exit(run_main(main))
