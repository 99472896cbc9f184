"""Options: dataclasses whose ranges stand beside their fields, and the way back from JSON."""

import dataclasses
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from beartype.door import is_bearable

from .run import CONFIG, RunFolder, as_dict
from .terminal import UserError

T = TypeVar("T")
REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")  # of gs://bucket a Path leaves one slash


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; a round bracket leaves that end out.

    >>> 0.0 in Range(0, 1, "(]"), float("nan") in Range(0, 1)
    (False, False)
    """

    low: float
    high: float
    ends: str = "[]"

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        below = value < self.high if self.ends[1] == ")" else value <= self.high
        return above and below

    def __str__(self) -> str:
        shown = (
            f"{n:,}".replace(",", "_") if n >= 1e4 else f"{n:g}" for n in (self.low, self.high)
        )
        return f"{self.ends[0]}{', '.join(shown)}{self.ends[1]}"


Steps = Annotated[int, Range(1, 10**9)]
MaybeSteps = Annotated[int, Range(0, 10**9)]
Batch = Annotated[int, Range(1, 10**6)]
Width = Annotated[int, Range(1, 2**16)]
Depth = Annotated[int, Range(1, 1000)]
Few = Annotated[int, Range(1, 64)]
Share = Annotated[float, Range(0, 1, "[)")]
Rate = Annotated[float, Range(0, 10, "(]")]
Weight = Annotated[float, Range(0, 1e6)]
Count = Annotated[int, Range(1, 10**6)]
Seed = Annotated[int, Range(0, 2**64 - 1)]
Samples = Annotated[int, Range(10, 10**8)]  # of fewer no distance and no neighbours are measured
Side = Annotated[int, Range(8, 8192)]
OptimizerName = Literal["adamw", "muon"]


def check(options: Any, prefix: str = "") -> None:
    """Refuses values outside their fields' ranges, by the option's name.

    A tuple may be empty only if it is so by default; a path must be a local one.
    """
    hints = typing.get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        value, shown = getattr(options, field.name), option(field.name, prefix)
        if dataclasses.is_dataclass(value):
            plain = hasattr(hints[field.name], "__metadata__")  # OmitArgPrefixes: no group's name
            check(value, prefix if plain else f"{prefix}{field.name}.")
            continue
        if value == () and field.default != ():
            raise UserError(f"{shown} needs at least one value.")
        if isinstance(value, Path) and REMOTE.match(str(value)):
            raise UserError(
                f"{shown} {value}: a remote path; only local files are read and written. Mount it, "
                "or copy it."
            )
        allowed = range_of(hints[field.name])
        for number in value if isinstance(value, tuple) else (value,):
            if allowed is None or number is None:
                continue
            if not isinstance(number, (int, float)) or number not in allowed:
                raise UserError(f"{shown} must lie in {allowed}, got {number}.")


def range_of(hint: Any) -> Range | None:
    """The range in a field's type, also of a tuple's or an optional field's numbers.

    >>> str(range_of(tuple[Share, ...] | None))
    '[0, 1)'
    """
    for part in getattr(hint, "__metadata__", ()):
        if isinstance(part, Range):
            return part
    found = map(range_of, typing.get_args(hint))
    return next((allowed for allowed in found if allowed is not None), None)


def option(name: str, prefix: str = "") -> str:
    """How a field is written on the command line."""
    return f"--{prefix}{name}".replace("_", "-")


def from_dict(kind: type[T], values: Any, where: Path) -> T:
    """The options that a JSON file holds, checked like those of a command line."""
    try:
        built = _built(kind, values)
        check(built)
    except (KeyError, TypeError) as error:
        raise UserError(f"{where} was written by another version, or is damaged: {error}") from None
    except UserError as error:
        raise UserError(f"{where} is damaged: {error}") from None
    return built


def read_options(
    kind: type[T], run: RunFolder, *others: str, earlier: Callable[[], T] | None = None
) -> T:
    """The options that a run folder belongs to; `others` are what else is noted beside them.

    Options that the run's version did not have are those of `earlier()`, by default the defaults.
    """
    found = run.config(as_dict((earlier or kind)()))
    options = {name: value for name, value in found.items() if name not in others}
    return from_dict(kind, options, run.path / CONFIG)


def _built(kind: Any, values: Any) -> Any:
    hints, found = typing.get_type_hints(kind), {}
    if not isinstance(values, dict) or values.keys() != hints.keys():
        raise KeyError(f"{kind.__name__} has other options")
    for name, hint in hints.items():
        value = tuple(values[name]) if isinstance(values[name], list) else values[name]
        if dataclasses.is_dataclass(hint):
            value = _built(hint, value)
        elif not is_bearable(value, hint) or not _all_are(value, hint):
            raise TypeError(f"{name} is {value!r}")
        found[name] = value
    return kind(**found)


def _all_are(value: Any, hint: Any) -> bool:
    """Whether each entry of a tuple of any length has its type: beartype looks at one of them."""
    args = typing.get_args(hint)
    if not isinstance(value, tuple) or args[1:] != (...,):
        return True
    return all(is_bearable(entry, args[0]) for entry in value)
