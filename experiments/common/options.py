"""Configurations: dataclasses of numbers that are checked by name, and read back from JSON."""

import dataclasses
import typing
from typing import Any, TypeVar

from .terminal import UserError

POSITIVE = {
    "steps", "batch_size", "learning_rate", "patch_size", "blocks", "groups", "latent_channels",
    "depth", "width", "num_heads", "clip_norm", "time_stddev", "discriminator_channels",
    "discriminator_layers", "discriminator_learning_rate", "checkpoint_every", "samples", "n",
    "size", "num_classes", "features", "reference", "crop_from",
    "snapshot_every", "keep_every", "images_per_shard", "statistics",
}  # fmt: skip
NOT_NEGATIVE = {
    "pad", "kl_weight", "gan_weight", "gan_start", "warmup", "weight_decay", "seed",
    "perceptual_weight",
}  # fmt: skip
SHARES = {"ema_decay", "label_dropout", "ema_decays"}

T = TypeVar("T")


def check(config: Any, prefix: str = "") -> None:
    """Refuses numbers that make no sense, by the option's name."""
    found = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name, value in found.items():
        if dataclasses.is_dataclass(value):
            check(value, f"{prefix}{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)):
                _check_number(name, option(name, prefix), number)
    if "warmup" in found and found["warmup"] >= (found["steps"] or 10**9):
        raise UserError(
            f"{option('warmup', prefix)} {found['warmup']} must be below "
            f"{option('steps', prefix)} {found['steps']}."
        )


def _check_number(name: str, shown: str, value: float) -> None:
    if value != value:
        raise UserError(f"{shown} must be a number, got {value}.")
    if name in POSITIVE and not value > 0:
        raise UserError(f"{shown} must be positive, got {value}.")
    if name in NOT_NEGATIVE and value < 0:
        raise UserError(f"{shown} must not be negative, got {value}.")
    if name in SHARES and not 0 <= value < 1:
        raise UserError(f"{shown} must lie in [0, 1), got {value}.")


def check_count(option: str, count: int, *, least: int = 1) -> None:
    if count < least:
        raise UserError(f"{option} must be at least {least}, got {count}.")


def option(name: str, prefix: str = "") -> str:
    """How a field is written on the command line."""
    return f"--{prefix}{name}".replace("_", "-")


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """The configuration that a run folder's config.json describes."""
    try:
        return _built(kind, values)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"config.json was written by another version: {error}") from None


def _built(kind: type[T], values: dict[str, Any]) -> T:
    hints = typing.get_type_hints(kind)

    def converted(name: str, value: Any) -> Any:
        if dataclasses.is_dataclass(hints.get(name)):
            return _built(hints[name], value)
        return tuple(value) if isinstance(value, list) else value

    required = {name for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    missing = required - set(values)
    if missing:
        raise KeyError(*sorted(missing))
    return kind(**{name: converted(name, value) for name, value in values.items()})
