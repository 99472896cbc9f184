"""`python -m experiments.words {train,generate}`; `--help` shows all options."""

from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from ..train.processes import exit_with
from ..train.terminal import run_main
from .commands import generate, train
from .config import Generate, Train

Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
)


def main(args: Sequence[str] | None = None) -> None:
    kind: Any = Command
    command = tyro.cli(kind, args=args, prog="python -m experiments.words", description=__doc__)
    {Train: train, Generate: generate}[type(command)](command)


if __name__ == "__main__":
    exit_with(lambda: run_main(main))
