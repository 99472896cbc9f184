"""`python -m experiments.serve serve|bench|soak --run runs/mnist`; `make serve` calls it."""

from collections.abc import Sequence
from typing import Annotated

import tyro

from ..train.processes import exit_with
from ..train.terminal import run_main
from .bench import Bench, bench
from .options import Serve, start
from .soak import Soak, soak

COMMANDS = (
    Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Soak, tyro.conf.subcommand("soak")]
)


def main(args: Sequence[str] | None = None) -> None:
    command = tyro.cli(COMMANDS, args=args, prog="python -m experiments.serve", description=__doc__)
    run = {Serve: start, Bench: bench, Soak: soak}
    run[type(command)](command)


if __name__ == "__main__":
    exit_with(lambda: run_main(main))
