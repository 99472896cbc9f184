"""Records of how a model was made: what its `config` holds."""

import dataclasses
from typing import Any, TypeVar

import equinox as eqx

Record = TypeVar("Record")


@dataclasses.dataclass(frozen=True)
class Undescribed:
    """Stands in a record for a part that has none itself: a function or module of the user.

    >>> str(Undescribed("Linear"))
    'Linear'
    """

    what: str

    def __str__(self) -> str:
        return self.what


def make_record(kind: type[Record], model: str, values: dict[str, Any]) -> Record:
    """The record of these arguments, lists made tuples and modules replaced by their own records.

    **Raises** `TypeError` for an argument that `model` does not have.

    >>> from eqxldm.models import LPIPSConfig
    >>> make_record(LPIPSConfig, "LPIPS", {"channels": [4, 4, 4, 4, 4]})
    LPIPSConfig(channels=(4, 4, 4, 4, 4))
    >>> make_record(LPIPSConfig, "LPIPS", {"width": 4})
    Traceback (most recent call last):
    TypeError: LPIPS: no option named width. There are: channels.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - set(names)):
        raise TypeError(
            f"{model}: no option named {', '.join(unknown)}. There are: {', '.join(names)}."
        )
    return kind(**{name: describe(value) for name, value in values.items()})


def describe(part: Any) -> Any:
    """What a record says of an argument: itself, or how it was made.

    >>> describe([1, 2]), describe(3)
    ((1, 2), 3)
    """
    if isinstance(part, list | tuple):
        return tuple(describe(item) for item in part)
    if isinstance(part, eqx.Module):  # holds arrays, which a static field cannot
        return getattr(part, "config", Undescribed(type(part).__name__))
    return part


def arguments(record: Any) -> dict[str, Any]:
    """A record's fields by name, as a constructor takes them.

    >>> from eqxldm.nn import Labels
    >>> arguments(Labels(10, 16))["num_classes"]
    10
    """
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def build_part(part: Any, *args: Any, key: Any) -> Any:
    """A part from its record; any other part as it is.

    >>> build_part(len, key=None) is len
    True
    """
    return part.build(*args, key=key) if hasattr(part, "build") else part
