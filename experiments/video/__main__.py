"""`python -m experiments.video {train,sample}`; `--help` shows all options.

`--smoke` before all else takes everything tiny: all stages in about a minute; `--large` takes what
one GPU learns in twelve minutes.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import tyro

from ..train.processes import exit_with
from ..train.terminal import run_main
from .commands import sample, train
from .config import PRESETS, Sample, Train, preset


def main(args: Sequence[str] | None = None) -> None:
    args = list(sys.argv[1:] if args is None else args)
    default = Train()
    if args and args[0] in PRESETS:
        args, default = args[1:], preset(args[0], default)
    if any(arg.partition("=")[0] == "--videos" for arg in args):
        # Most files have colour, and captions of their own.
        clips = replace(default.clips, channels=3)
        diffusion = replace(default.diffusion, tokens="clip")
        default = replace(default, clips=clips, diffusion=diffusion)
    drawn = Sample(run_dir=default.run_dir, sampling=default.sampling)
    command: Any = (
        Annotated[Train, tyro.conf.subcommand("train", default=default)]
        | Annotated[Sample, tyro.conf.subcommand("sample", default=drawn)]
    )
    found = tyro.cli(command, args=args, prog="python -m experiments.video", description=__doc__)
    {Train: train, Sample: sample}[type(found)](found)


if __name__ == "__main__":
    exit_with(lambda: run_main(main))
