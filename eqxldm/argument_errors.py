"""What is said of an argument that a function cannot take."""

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from beartype import BeartypeConf
from beartype.door import is_bearable
from jax.core import Tracer
from jaxtyping import AbstractArray, Float, Int, Key, TypeCheckError, jaxtyped

_CONF = BeartypeConf(is_pep484_tower=True)  # an int is taken for a float
_KINDS = {"Float": "float", "Int": "integer", "Key": "random key", "Shaped": ""}
_NUMBERS = int | float | np.generic
_TIMES = ("t", "s")


class ArgumentError(TypeCheckError, ValueError):
    """An argument does not fit: what was given, what is needed, and how to fix it.

    Raised by every function of the package, under `jit` while it is traced. An array is written
    as its dtype and shape, a model by the name of its class.

    >>> import jax.numpy as jnp
    >>> from eqxldm import Diffusion, LinearFlow, predict_velocity
    >>> Diffusion(LinearFlow(), predict_velocity).noise(jnp.zeros(2), 0.5, jnp.zeros(3))
    Traceback (most recent call last):
    eqxldm.ArgumentError: Diffusion.noise: wrong argument for parameter 'eps'.
      given:  f32[3]
      needed: float array like that of x0, (2,)
      fix:    give the shape that is needed; a batch goes through jax.vmap
    """


ArgumentError.__module__ = "eqxldm"  # where it is exported


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation asks for; binds the names of an array's axes."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return isinstance(value, hint)
    return is_bearable(value, hint, conf=_CONF)


def as_array(value: Any, hint: Any) -> Any:
    """The value as the kind of array that an annotation names; other values as they are.

    NumPy arrays and numbers become JAX arrays, or NumPy arrays where only those are asked for; a
    key in the old style (`jax.random.PRNGKey`) becomes one in the new. A Python int becomes a
    float where that is needed; no other dtype is changed.
    """
    leaves = list(_array_hints(hint))
    if not leaves:
        return value
    if any(leaf.dtype is Key for leaf in leaves) and _is_old_key(value):
        return jax.random.wrap_key_data(jnp.asarray(value), impl="threefry2x32")
    if all(leaf.array_type is np.ndarray for leaf in leaves):
        concrete = isinstance(value, jax.Array) and not isinstance(value, Tracer)
        return np.asarray(value) if concrete or isinstance(value, _NUMBERS) else value
    if isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if all(leaf.dtype is Float for leaf in leaves) else value
    if isinstance(value, _NUMBERS):
        with jax.ensure_compile_time_eval():  # under jit a number stays one that can be looked at
            return jnp.asarray(value)
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def explain_argument(
    function: Callable[..., Any],
    hints: Mapping[str, Any],
    name: str,
    value: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str:
    """The message for the first argument that does not fit: `value`, of the parameter `name`."""
    left_out = _left_out(function, hints, name, args)
    if left_out is not None:
        return _missing(function, hints, left_out, args, kwargs)
    given = _bind(function, args, kwargs)
    hint = hints[name]
    with jaxtyped("context"):
        sizes = _sizes(given, hints, name)
        needed = describe_hint(hint, sizes)
        fixes = list(_fixes(function, given, name, value, hint))
    first = f"{_title(function)}: wrong argument for parameter '{name}'."
    return _lines(first, describe_value(value), needed, *(fixes or [_help(function)]))


def explain_binding(
    function: Callable[..., Any],
    hints: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str | None:
    """The message for arguments that are missing, unknown or too many; None if none is."""
    parameters = inspect.signature(function).parameters
    try:
        inspect.signature(function).bind(*args, **kwargs)
        return None
    except TypeError as error:
        reason = str(error)
    given = _bind(function, args, kwargs)
    rest = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in kwargs:
        if name not in parameters and not rest:
            alike = difflib.get_close_matches(name, parameters, 1)
            return _lines(
                f"{_title(function)}: there is no parameter '{name}'.",
                f"{name}={describe_value(kwargs[name])}",
                "one of " + ", ".join(p for p in parameters if p != "self"),
                f"did you mean {alike[0]}?" if alike else _help(function),
            )
    for name in _required(function):
        if name not in given:
            return _missing(function, hints, name, args, kwargs)
    passed = [*args[list(parameters)[:1] == ["self"] :], *kwargs.values()]
    values = ", ".join(map(describe_value, passed))
    needed = ", ".join(p for p in parameters if p != "self")
    return _lines(f"{_title(function)}: {reason}.", values, needed, _help(function))


def explain_result(function: Callable[..., Any], hint: Any, result: Any) -> str:
    """The message for a result that is not what the function promises."""
    first = f"{_title(function)}: the result is not what it should be."
    return _lines(first, describe_value(result), describe_hint(hint, {}), _help(function))


def describe_value(value: Any, room: int = 100) -> str:
    """A value in a few words: arrays as `f32[4,8,8]`, modules and functions by name.

    >>> describe_value((jnp.zeros((4, 8)), None))
    '(f32[4,8], None)'
    """
    if isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return eqx.tree_pformat(value, struct_as_array=True).removeprefix("weak_")
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        text = repr(value)
    elif isinstance(value, dict):
        text = ", ".join(f"{k!r}: {describe_value(v, 30)}" for k, v in list(value.items())[:4])
        text = "{" + text + (", ..." if len(value) > 4 else "") + "}"
    elif isinstance(value, tuple | list):
        text = ", ".join([describe_value(v, 30) for v in value[:4]] + ["..."] * (len(value) > 4))
        text = f"[{text}]" if isinstance(value, list) else f"({text})"
    elif isinstance(value, type):
        text = f"the class {value.__name__}"
    elif callable(value) and hasattr(value, "__qualname__"):
        text = f"the function {value.__qualname__}"
    else:
        text = f"{type(value).__name__}(...)"
    return text if len(text) <= room else text[: room - 4] + " ..."


def describe_hint(hint: Any, sizes: Mapping[str, Any]) -> str:
    """An annotation in a few words, with the sizes of its axes that other arguments fix.

    >>> describe_hint(Float[jax.Array, "c h w"] | None, {})
    'float array of shape (c, h, w), or None'
    """
    if hint is None or hint is type(None):
        return "None"
    if _is_union(hint):
        parts = dict.fromkeys(describe_hint(part, sizes) for part in typing.get_args(hint))
        return ", or ".join(parts)
    if not (isinstance(hint, type) and issubclass(hint, AbstractArray)):
        origin = typing.get_origin(hint)
        if origin is not None and origin.__name__ == "Callable":
            return "function"
        plain = isinstance(hint, type) and origin is None
        return (
            (hint.__name__ if plain else str(hint)).replace("typing.", "").replace("jaxtyping.", "")
        )
    kind = _KINDS.get(hint.dtype.__name__, hint.dtype.__name__.lower())
    axes = hint.dim_str.split()
    if not axes:
        return f"one {kind}" if hint.dtype is Key else f"{kind} scalar, shape ()".strip()
    known = {axis: sizes[axis] for axis in axes if axis in sizes}
    if len(axes) == 1 and axes[0].startswith(("*", "...")):
        shape = " like that of {1}, {0}".format(*known[axes[0]]) if known else ""
        return f"{kind} array".strip() + shape
    shape = "(" + ", ".join(axes) + ("," if len(axes) == 1 else "") + ")"
    fixed = ", ".join(f"{axis} = {size} as in {where}" for axis, (size, where) in known.items())
    return f"{kind} array of shape {shape}".strip() + (f" with {fixed}" if fixed else "")


def _fixes(function, given, name: str, value: Any, hint: Any) -> Iterator[str]:
    """What to do about it, as far as the value tells."""
    leaves = list(_array_hints(hint))
    if isinstance(value, type) and isinstance(hint, type) and issubclass(value, hint):
        yield f"make one: {value.__name__}(...)"
    if not leaves:
        return
    leaf = leaves[0]
    if not hasattr(value, "dtype"):
        if leaf.dtype is Key:
            seed = value if isinstance(value, int) else 0
            yield f"{name}=jax.random.key({seed})"
        elif isinstance(value, list | tuple):
            yield f"jnp.asarray({name})"
        return
    is_float, is_integer = (
        jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer)
    )
    dtype = value.dtype
    if leaf.dtype is Float and not is_float:
        dtype = jnp.float32
        if value.dtype == jnp.uint8:
            yield "bytes become floats in [-1, 1], channels first, by eqxldm.data.to_float(images)"
        elif name in _TIMES and is_integer:
            yield f"{name} is a time in [0, 1]: timestep i of T is t = (i + 1) / T"
        else:
            yield f"{name}.astype(jnp.float32)"
    elif leaf.dtype is Int and is_float:
        dtype = jnp.int32
        yield f"{name}.astype(jnp.int32)"
    elif leaf.dtype is Key and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        yield f"{name}=jax.random.key(0)"
        return
    one = lambda shape: fits(jax.ShapeDtypeStruct(shape, dtype), leaf.dtype[Any, leaf.dim_str])
    if value.ndim and not one(value.shape) and one(value.shape[1:]):
        if leaf.dtype is Key:
            yield f"one key a call: {name}[0], or jax.vmap over all of them"
        else:
            yield f"a batch? This takes one example: {_vmapped(function, given, name)}"
    elif not one(value.shape) and one((1, *value.shape)):
        yield f"an axis is missing: {name}[None] has the shape {(1, *value.shape)}"
    elif not one(value.shape):
        yield "give the shape that is needed; a batch goes through jax.vmap"


def _vmapped(function: Callable[..., Any], given: Mapping[str, Any], name: str) -> str:
    """How `jax.vmap` calls a function or a method on a batch."""
    if "self" not in given:
        return f"jax.vmap(lambda {name}: {_title(function)}(..., {name}, ...))({name})"
    method = "" if function.__name__ == "__call__" else f".{function.__name__}"
    arrays = [k for k, v in given.items() if k != "self" and v is not None]
    return f"jax.vmap(model{method})({', '.join(arrays)})"


def _left_out(function, hints: Mapping[str, Any], name: str, args: tuple[Any, ...]) -> str | None:
    """`name`, if its argument was left out: what follows fits the parameters after it."""
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind <= 1]
    i = names.index(name) if name in names else len(args)
    shifted = list(zip(names[i + 1 :], args[i:], strict=False))
    if not shifted or len(args) >= len(names) or shifted[0][0] not in hints:
        return None
    with jaxtyped("context"):
        alike = all(k not in hints or fits(value, hints[k]) for k, value in shifted)
    return name if alike else None


def _missing(function, hints, name: str, args, kwargs) -> str:
    given = [describe_value(v) for k, v in _bind(function, args, kwargs).items() if k != "self"]
    parameters = inspect.signature(function).parameters
    call = [
        f"{k}=..." if parameters[k].kind is inspect.Parameter.KEYWORD_ONLY else k
        for k in _required(function)
        if k != "self"
    ]
    return _lines(
        f"{_title(function)}: no argument for parameter '{name}'.",
        ", ".join(given) or "nothing",
        f"{name}: {describe_hint(hints[name], {})}" if name in hints else name,
        f"{_title(function)}({', '.join(call)})",
    )


def _required(function: Callable[..., Any]) -> list[str]:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.items()
    return [k for k, p in parameters if p.default is p.empty and p.kind not in variable]


def _bind(function, args, kwargs) -> dict[str, Any]:
    """The arguments by name, as far as they have one."""
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind <= 1]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _sizes(given: Mapping[str, Any], hints: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`{axis: (size, the argument it was read from)}` of the arguments before `name`."""
    sizes: dict[str, Any] = {}
    for other, value in given.items():
        if other == name:
            break
        for leaf in _array_hints(hints.get(other)):
            if not fits(value, leaf):
                continue
            axes = leaf.dim_str.split()
            if len(axes) == 1 and axes[0].startswith("*"):
                sizes.setdefault(axes[0], (value.shape, other))
            elif len(axes) == value.ndim:
                for axis, size in zip(axes, value.shape, strict=True):
                    sizes.setdefault(axis, (size, other))
    return sizes


def _array_hints(hint: Any) -> Iterator[Any]:
    """The arrays of an annotation, which is one or a union of some."""
    if _is_union(hint):
        for part in typing.get_args(hint):
            yield from _array_hints(part)
    elif isinstance(hint, type) and issubclass(hint, AbstractArray):
        yield hint


def _is_union(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def _is_old_key(value: Any) -> bool:
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", ())
    return dtype == jnp.uint32 and shape[-1:] == (2,)


def _title(function: Callable[..., Any]) -> str:
    """`DiT` for its `__init__` and its `__call__`, `DiTBlock.f` for a method."""
    name = function.__qualname__.rsplit("<locals>.", 1)[-1]
    return name.removesuffix(".__init__").removesuffix(".__call__")


def _help(function: Callable[..., Any]) -> str:
    return f"help({function.__module__}.{_title(function)}) says what it takes"


def _lines(first: str, given: str, needed: str, *fixes: str) -> str:
    cut = lambda text: text if len(text) <= 160 else text[:156] + " ..."
    lines = [first, f"  given:  {cut(given)}", f"  needed: {cut(needed)}"]
    return "\n".join(lines + [f"  fix:    {fix}" for fix in fixes[:2]])
