"""`python -m experiments.evaluate --samples a.npz --reference b.npz`; `make evaluate` calls it."""

from collections.abc import Sequence

import tyro

from ..train.processes import exit_with
from ..train.terminal import run_main
from .options import Evaluate
from .run import evaluate


def main(args: Sequence[str] | None = None) -> None:
    evaluate(tyro.cli(Evaluate, args=args, prog="python -m experiments.evaluate"))


if __name__ == "__main__":
    exit_with(lambda: run_main(main))
