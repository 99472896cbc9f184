"""`python -m experiments.train {train,autoencoder,sample,evaluate}`; `--help` shows all options.

`--preset mnist|fashion-mnist|cifar10|imagenet256|images|smoke` chooses the defaults, which `--help`
then shows.
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from eqxldm.data import DataError

from .commands import (
    Autoencoder,
    Evaluate,
    Sample,
    Train,
    Which,
    evaluate,
    sample,
    train,
    train_autoencoder,
)
from .config import FormName, ObjectiveName, PresetName, default_form
from .data import open_folder
from .presets import preset
from .processes import exit_with
from .terminal import run_main

T = TypeVar("T", bound=Which)
PRESETS: tuple[str, ...] = PresetName.__args__
OBJECTIVES: tuple[str, ...] = ObjectiveName.__args__
FORMS: tuple[str, ...] = FormName.__args__
SAME = ("preset", "space", "denoiser", "form", "objective", "sampling")


def commands(found: Train) -> Any:
    """The program's commands with the defaults of a preset."""
    same = {f.name: getattr(found, f.name) for f in fields(found)}
    which = {name: same[name] for name in SAME}
    count = 10_000 if "mnist" in found.preset else found.samples
    defaults: dict[str, Any] = {
        "train": found,
        "autoencoder": Autoencoder(**same),
        "sample": Sample(**which),
        "evaluate": Evaluate(**which, n=count),
    }
    kinds = [
        Annotated[type(default), tyro.conf.subcommand(command, default=default)]
        for command, default in defaults.items()
    ]
    union: Any = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    return union


def given(args: Sequence[str], option: str, count: int = 1) -> list[str]:
    """The values that the arguments give an option, which other defaults start from.

    >>> given(["train", "--size", "64", "96", "--space=pixel"], "--size", 2)
    ['64', '96']
    """
    for i, arg in reversed(list(enumerate(args))):  # of an option that comes twice the last counts
        name, _, value = arg.partition("=")
        if name == option:
            return [value] if value else list(args[i + 1 : i + 1 + count])
    return []


def chosen_preset(args: Sequence[str]) -> Train:
    """The preset that the arguments name, for the space, network and images that they name.

    Values that are none are left for the parser to refuse.
    """

    def one(option: str, known: Sequence[str], default: str) -> Any:
        return next((value for value in given(args, option) if value in known), default)

    name = one("--preset", PRESETS, "images")
    size = [int(n) for n in given(args, "--size", 2) if n.isdecimal() and 0 < int(n) <= 8192]
    space = one("--space", ("latent", "pixel"), "latent")
    denoiser = one("--denoiser", ("dit", "unet"), "dit")
    options: dict[str, Any] = {
        "space": space,
        "denoiser": denoiser,
        "form": one("--form", FORMS, default_form(name, space, denoiser)),
        "objective": one("--objective", OBJECTIVES, "denoising"),
        "started": bool(given(args, "--start-from")),
    }
    options |= {"size": (size[0], size[1])} if len(size) == 2 else {}
    images = given(args, "--images")
    if name == "images" and images and "train" in args:
        with contextlib.suppress(DataError):  # which it raises again when it is used
            options["count"] = len(open_folder(Path(images[0])))
    return preset(name, **options)


def parsed(kind: type[T], args: Sequence[str], **options: Any) -> T:
    """What the arguments say of a command on a finished run, with the defaults of its preset.

    `options` are those of `tyro.cli`.
    """
    found = chosen_preset(args)
    default = kind(**{name: getattr(found, name) for name in SAME})
    return tyro.cli(kind, default=default, args=args, **options)


def main(args: Sequence[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else args
    open_folder.cache_clear()
    command = tyro.cli(
        commands(chosen_preset(args)),
        args=args,
        prog="python -m experiments.train",
        description=__doc__,
    )
    run = {Train: train, Autoencoder: train_autoencoder, Sample: sample, Evaluate: evaluate}
    run[type(command)](command)


if __name__ == "__main__":
    exit_with(lambda: run_main(main))
