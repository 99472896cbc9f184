"""Changing an option of a module that is made."""

import dataclasses
from typing import TypeVar

import equinox as eqx

Module = TypeVar("Module", bound=eqx.Module)


def with_fields(module: Module, **changes) -> Module:
    """The same module with other values of some fields: what `eqx.tree_at` does for arrays.

    **Raises** `ValueError` for a name that is no field. Nothing else is checked.

    >>> from eqxldm.nn import GroupNorm
    >>> with_fields(GroupNorm(8, groups=4), norm_eps=1e-3).norm_eps
    0.001
    """
    values = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
    if unknown := sorted(changes.keys() - values.keys()):
        raise ValueError(f"{type(module).__name__} has no field {', '.join(unknown)}.")
    new = object.__new__(type(module))
    for name, value in (values | changes).items():
        object.__setattr__(new, name, value)
    return new
