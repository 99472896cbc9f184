"""`python -m experiments.generate --model FOLDER --prompt "..."`; `make generate` calls it."""

from collections.abc import Sequence

import tyro

from ..train.processes import exit_with
from ..train.terminal import run_main
from .options import Generate
from .run import generate


def main(args: Sequence[str] | None = None) -> None:
    generate(tyro.cli(Generate, args=args, prog="python -m experiments.generate"))


if __name__ == "__main__":
    exit_with(lambda: run_main(main))
