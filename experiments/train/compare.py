"""`python -m experiments.train.compare`: what the networks of two presets are compared with.

With `--preset mnist` the variants behind the defaults of MNIST's DiT, with `--preset text` the two
ways in which its DiT can look at a caption, and, with `--text-encoder`, a frozen encoder in place
of the one that is trained along. Takes the classifier, the autoencoder and its latents of a
finished run, trains the DiT anew for each variant with a share of the run's steps, samples,
measures, and prints a table. Every variant is a run folder of its own, so that the comparison
resumes like any run.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import tyro

from eqxldm.models import multiply_adds

from .commands import train
from .conditions import make_condition
from .config import Config
from .job import Inputs
from .networks import make_autoencoder, make_denoiser
from .options import Range, Samples, check, read_options
from .presets import preset
from .run import CONFIG, RunFolder, as_dict, write_json
from .terminal import UserError, run_main, say

Variant = Callable[[Config], Config]


def other(**changes: Any) -> Variant:
    """The same network with these options of the diffusion."""
    return lambda config: replace(config, diffusion=replace(config.diffusion, **changes))


def half(config: Config) -> Config:
    """Half of the steps, for what costs twice as much a step."""
    return other(steps=config.diffusion.steps // 2)(config)


def wider(config: Config) -> Config:
    return replace(half(config), dit=replace(config.dit, width=192, num_heads=6))


def twice_the_batch(config: Config) -> Config:
    return other(batch_size=2 * config.diffusion.batch_size)(half(config))


def looking(cross_attention: bool) -> Variant:
    """Captions by cross-attention or as joint tokens, in as many multiply-adds as the run's own."""

    def variant(config: Config) -> Config:
        changed = replace(config, text=replace(config.text, cross_attention=cross_attention))
        steps = config.diffusion.steps * step_cost(config) / step_cost(changed)
        return other(steps=round(steps))(changed)

    return variant


def frozen(config: Config) -> Config:
    """Captions by a published encoder and cross-attention: as many steps as with one's own.

    The DiT is the same. What its own encoder costs a step is not made up for.
    """
    config = looking(True)(config)
    return replace(config, text=replace(config.text, tokens="frozen"))


def step_cost(config: Config) -> int:
    """Multiply-adds of the DiT of captions, of one example, without the encoder of captions."""
    condition = make_condition(config, "text", 0)
    shape = eqx.filter_eval_shape(lambda: make_autoencoder(config)).latent_shape(*config.padded)
    network = eqx.filter_eval_shape(lambda: make_denoiser(config, shape, condition))
    return multiply_adds(network, config.text.max_length)


FROZEN = "frozen encoder"
VARIANTS: dict[str, dict[str, Variant]] = {
    "mnist": {
        "default": other(),
        "flow, velocity": other(path="flow", prediction="velocity"),
        "ddpm, eps": other(path="ddpm", prediction="eps"),
        "learning rate 1e-3": other(learning_rate=1e-3),
        "learning rate 2e-3": other(learning_rate=2e-3),
        "batch 128": twice_the_batch,
        "time_mean 0.5": other(time_mean=0.5),
        "192 wide": wider,
    },
    "text": {
        "joint tokens": looking(False),
        "cross-attention": looking(True),
        FROZEN: frozen,
    },
}
COLUMNS = (
    "fd", "accuracy", "accuracy_known", "accuracy_part_1", "accuracy_part_2", "precision", "recall",
)  # fmt: skip


@dataclass(frozen=True)
class Compare:
    """Compare variants of the DiT at equal budget."""

    preset: Literal["mnist", "text"] = "mnist"  # Of which run, and so which variants.
    # A finished run, whose classifier, autoencoder and latents serve all variants; by default the
    # preset's.
    run_dir: Path | None = None
    # A folder for the variants' run folders; by default in runs/, with the preset's name.
    out: Path | None = None
    images: Path | None = None  # As in training.
    # A folder with a published sentence encoder, for the variant "frozen encoder" of text.
    text_encoder: Path | None = None
    share: Annotated[float, Range(0, 1, "(]")] = 0.25  # Of the default run's steps.
    samples: Samples = 2000  # Of each variant.
    only: tuple[str, ...] = ()  # The variants to run; by default all.


def compare(options: Compare) -> None:
    check(options)
    variants, start = VARIANTS[options.preset], preset(options.preset)
    finished = options.run_dir or Path("runs") / options.preset
    out = options.out or Path("runs") / f"compare-{options.preset}"
    base, rows = read_options(Config, RunFolder(finished)), []
    base = replace(base, diffusion=start.diffusion)
    left_out = {FROZEN} if options.text_encoder is None else set()
    if left_out & set(options.only):
        raise UserError(f"--only {FROZEN!r}: needs --text-encoder, a folder of one.")
    for name in options.only or [name for name in variants if name not in left_out]:
        if name not in variants:
            raise UserError(f"--only {name!r}: known are {', '.join(map(repr, variants))}.")
        config = variants[name](base)
        steps = max(2, int(config.diffusion.steps * options.share))
        config = other(steps=steps, warmup=min(config.diffusion.warmup, steps - 1))(config)
        run = RunFolder(out / name.replace(", ", "-").replace(" ", "-"))
        if not (run.path / CONFIG).exists():
            shutil.rmtree(run.path, ignore_errors=True)
            stage = "checkpoints/classifier"
            shutil.copytree(finished / stage, run.path / stage)
            write_json(run.file(CONFIG), as_dict(config))
        say(f"--- {name}")
        inputs = Inputs(vae=finished, latents=finished / "latents")
        if name == FROZEN:  # whose conditions stand in a cache of its own
            inputs = Inputs(vae=finished, text_encoder=options.text_encoder)
        settings = {field: getattr(config, field) for field in config.__dataclass_fields__}
        train(
            replace(
                start, images=options.images, run_dir=run.path, inputs=inputs,
                samples=options.samples, **settings,
            )
        )  # fmt: skip
        rows.append((name, config.diffusion, (run.metrics() or {})["diffusion"]))
    columns = [column for column in COLUMNS if all(column in found for _, _, found in rows)]
    say(f"\n| variant | steps x batch | {' | '.join(columns)} |")
    say("|---|---|" + "---|" * len(columns))
    for name, variant, found in rows:
        figures = " | ".join(f"{found[column]:.3f}" for column in columns)
        say(f"| {name} | {variant.steps} x {variant.batch_size} | {figures} |")


def main(args: Sequence[str] | None = None) -> None:
    compare(tyro.cli(Compare, args=args, prog="python -m experiments.train.compare"))


if __name__ == "__main__":
    sys.exit(run_main(main))
