"""Which tensors of a file make up which leaf of a model, and the copying between the two.

A `Layout` is a table: for each array leaf of a module the tensors it is made of. It is data, so a
model and a file can be compared by names and shapes before anything is read.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

Transform = Callable[[np.ndarray], np.ndarray]
Shape = tuple[int, ...]
_PIECE = 2**26  # bytes
ShardingRule = Callable[[str, Shape], jax.sharding.Sharding]


class WeightsError(ValueError):
    """A file that cannot be read, or that is not what the model needs."""


class Tensor(NamedTuple):
    """A tensor of a file that is not read yet: its shape, whether it is floating, and `read()`."""

    shape: Shape
    floating: bool
    read: Callable[[], np.ndarray]


def identity(array: np.ndarray) -> np.ndarray:
    """The array itself.

    >>> identity(np.ones(2)).shape
    (2,)
    """
    return array


class Part(NamedTuple):
    """One tensor: `leaf[where] = read(tensor)` and `tensor = write(leaf[where])`.

    `read` and `write` are pure NumPy, inverses of each other, and only move values. `copies`
    names more tensors that hold the same values: they must be equal in a file that is read.

    `joined` is `(axis, place)` where the tensor holds several parts one after the other: along
    which axis, and the how-manieth this one is. There `read` takes its own out of the whole tensor,
    and `write` gives it alone.
    """

    name: str
    where: tuple[int | slice, ...] = ()
    read: Transform = identity
    write: Transform = identity
    copies: tuple[str, ...] = ()
    joined: tuple[int, int] | None = None


class Layout(NamedTuple):
    """`leaves`: the parts of each array leaf, by its path (`jax.tree_util.keystr`).

    `fixed`: tensors that are no parameters, with what they must hold. A file may lack them; where
    it has them they are compared and not loaded; `writes_fixed`: files of this layout have them.
    `aliases`: other names that files have for some tensors, `{alias: name}`.
    `ties`: tensors that some files have beside another one that holds the same values, `{copy:
    name}`: they must be equal where both are, and either alone will do. They are not written.
    """

    leaves: dict[str, tuple[Part, ...]]
    fixed: dict[str, Callable[[], np.ndarray]]
    aliases: Mapping[str, str] = MappingProxyType({})
    writes_fixed: bool = False
    ties: Mapping[str, str] = MappingProxyType({})

    def names(self) -> list[str]:
        """The tensors of all leaves, copies included."""
        parts = [part for parts in self.leaves.values() for part in parts]
        return [name for part in parts for name in (part.name, *part.copies)]


def array_leaves(model: PyTree) -> dict[str, Any]:
    """`{path: leaf}` of a module's arrays, in order; of the shapes, if that is what it holds.

    >>> list(array_leaves({"w": np.ones(2), "name": "no array"}))
    ["['w']"]
    """
    found = jax.tree_util.tree_leaves_with_path(model)
    return {jax.tree_util.keystr(path): leaf for path, leaf in found if _is_array(leaf)}


def own_layout(model: PyTree) -> Layout:
    """Our files: one tensor a leaf, named by its path, `blocks.fc1.weight`.

    >>> from eqxldm.nn import Linear
    >>> list(own_layout(Linear(2, 3, key=jax.random.key(0))).leaves.values())[0][0].name
    'weight'
    """
    return Layout({path: (Part(path.removeprefix(".")),) for path in array_leaves(model)}, {})


def tensor_shapes(model: PyTree, layout: Layout) -> dict[str, Shape]:
    """`{name: shape}` of every tensor of a model in a layout, the fixed ones left out.

    Works under `eqx.filter_eval_shape` too, using no memory.

    >>> from eqxldm.nn import Linear
    >>> linear = Linear(2, 3, key=jax.random.key(0))
    >>> tensor_shapes(linear, own_layout(linear))
    {'weight': (3, 2), 'bias': (3,)}

    **Raises** `WeightsError` if the layout leaves a part of the model out or names one twice.
    """
    leaves, shapes = array_leaves(model), {}
    if unknown := sorted(leaves.keys() ^ layout.leaves.keys()):
        raise WeightsError(f"{_name(model)}: not in both the model and its table: {unknown}.")
    for path, leaf in leaves.items():
        # Strides of zero: an array of the leaf's shape that takes no memory.
        whole, size = np.broadcast_to(np.zeros((), np.bool_), leaf.shape), 0
        for part in layout.leaves[path]:
            shape = part.write(whole[part.where]).shape
            size += math.prod(shape)
            if part.joined is not None and part.name in shapes:
                axis, so_far = part.joined[0], shapes[part.name]
                longer = so_far[axis] + shape[axis]
                shapes[part.name] = (*so_far[:axis], longer, *so_far[axis + 1 :])
                continue
            for name in (part.name, *part.copies):
                if name in shapes:
                    raise WeightsError(f"{_name(model)}: its table uses {name} twice.")
                shapes[name] = shape
        if size != math.prod(leaf.shape):
            raise WeightsError(f"{_name(model)}: the parts of {path} do not add up to its size.")
    return shapes


def fill(
    model: PyTree,
    layout: Layout,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    dtype: Any = jnp.float32,
    sharding: ShardingRule | None = None,
) -> PyTree:
    """The model with every array leaf replaced by what the tensors say.

    Names and shapes are compared before anything is read. Then one leaf after the other is put
    together on the host and placed, so that the memory needed is the model's and one leaf's.

    **Arguments**:

    - `model`: a module, or its shapes from `eqx.filter_eval_shape`.
    - `source`: the file's name, for the messages.
    - `dtype`: of the floating leaves; None keeps the file's.
    - `sharding`: `(path, shape) -> Sharding`; None is JAX's default device.

    **Raises** `WeightsError` with the list of all missing, unexpected and wrongly shaped tensors,
    and of all copies and fixed tensors that hold something else than they should, and of all with
    numbers that are not finite, or not in `dtype`.

    >>> from eqxldm.nn import Linear
    >>> linear = Linear(2, 3, key=jax.random.key(0))
    >>> fill(linear, own_layout(linear), {}, source="an empty file")
    Traceback (most recent call last):
    ...
    eqxldm.pretrained.layout.WeightsError: an empty file does not fit Linear:
      missing: weight (3, 2)
      missing: bias (3,)
    """
    expected, tensors = tensor_shapes(model, layout), _renamed(tensors, layout)
    ties = {copy: tensors.pop(copy) for copy in layout.ties if copy in tensors}
    _report(source, model, _mismatches(expected, layout, tensors))
    problems = [
        f"differs from {layout.ties[copy]}, must be equal: {copy}"
        for copy, tensor in ties.items()
        if not np.array_equal(tensor.read(), tensors[layout.ties[copy]].read())
    ]
    problems += [
        f"not the constant of the architecture: {name}"
        for name, value in layout.fixed.items()
        if name in tensors and not _is_constant(tensors[name], value())
    ]
    filled, paths = [], array_leaves(model)
    for path, leaf in paths.items():
        parts = layout.leaves[path]
        array = _assemble(leaf.shape, parts, tensors, dtype, problems)
        place = None if sharding is None else sharding(path, leaf.shape)
        # Waiting bounds the memory: the host's copy is let go before the next is made.
        filled.append(jax.block_until_ready(jax.device_put(array, place)))
        del array
    _report(source, model, problems)
    rest, treedef = jax.tree.flatten(model)
    new = iter(filled)
    return jax.tree.unflatten(treedef, [next(new) if _is_array(leaf) else leaf for leaf in rest])


def unfill(model: PyTree, layout: Layout) -> dict[str, np.ndarray]:
    """The tensors of a model in a layout, by name, on the host: `fill`'s inverse.

    With the fixed ones, if `layout.writes_fixed`.

    >>> from eqxldm.nn import Linear
    >>> linear = Linear(2, 3, key=jax.random.key(0))
    >>> unfill(linear, own_layout(linear))["bias"].tolist()
    [0.0, 0.0, 0.0]
    """
    tensor_shapes(model, layout)  # refuses an incomplete table
    tensors, pieces = {}, {}
    for path, leaf in array_leaves(model).items():
        array = np.asarray(jax.device_get(leaf))
        for part in layout.leaves[path]:
            value = np.ascontiguousarray(part.write(array[part.where]))
            if part.joined is not None:
                pieces.setdefault(part.name, {})[part.joined] = value
                continue
            tensors |= dict.fromkeys((part.name, *part.copies), value)
    for name, parts in pieces.items():  # of one axis, by their places
        order = sorted(parts)
        tensors[name] = np.concatenate([parts[at] for at in order], axis=order[0][0])
    fixed = layout.fixed if layout.writes_fixed else {}
    return tensors | {name: value() for name, value in fixed.items()}


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray | jax.ShapeDtypeStruct)


def _name(model: PyTree) -> str:
    return type(model).__name__


def _mismatches(
    expected: dict[str, Shape], layout: Layout, tensors: Mapping[str, Tensor]
) -> list[str]:
    """One line for each tensor that is missing, unexpected, of another shape or no float."""
    lines = [f"missing: {n} {shape}" for n, shape in expected.items() if n not in tensors]
    known = expected.keys() | layout.fixed.keys()
    lines += [f"unexpected: {n} {t.shape}" for n, t in tensors.items() if n not in known]
    for name, shape in expected.items():
        if name not in tensors:
            continue
        found = tensors[name]
        if tuple(found.shape) != shape:
            lines.append(f"wrong shape: {name} is {tuple(found.shape)}, the model needs {shape}")
        elif not found.floating:
            lines.append(f"wrong dtype: {name} is not floating point")
    return lines


def _renamed(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The tensors under their names; an alias whose name is there too stays, as unexpected."""
    aliases = {old: new for old, new in layout.aliases.items() if new not in tensors}
    found = {aliases.get(name, name): tensor for name, tensor in tensors.items()}
    alone = {copy: name for copy, name in layout.ties.items() if name not in found}
    return {alone.get(name, name): tensor for name, tensor in found.items()}


def _report(source: str, model: PyTree, problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - 100} more"] if len(problems) > 100 else []
        lines = "\n  ".join(problems[:100] + more)
        raise WeightsError(f"{source} does not fit {_name(model)}:\n  {lines}")


def _assemble(
    shape: Shape,
    parts: tuple[Part, ...],
    tensors: Mapping[str, Tensor],
    dtype: Any,
    problems: list[str],
) -> np.ndarray:
    """One leaf from its parts; what is wrong with copies is appended to `problems`."""
    leaf = None
    for part in parts:
        array = tensors[part.name].read()
        if leaf is None:
            # As JAX holds it: without 64 bits, unless they are enabled.
            kept = jax.dtypes.canonicalize_dtype(array.dtype if dtype is None else dtype)
            leaf = np.empty(shape, kept)
        with np.errstate(over="ignore", invalid="ignore"):  # what that leads to is found below
            leaf[part.where] = part.read(array)
        if not _finite(leaf[part.where]):
            found = "not finite" if not _finite(array) else f"beyond the range of {leaf.dtype}"
            problems.append(f"{found}: {part.name}")
        for copy in part.copies:
            if not np.array_equal(tensors[copy].read(), array):
                problems.append(f"differs from {part.name}, must be equal: {copy}")
    assert leaf is not None  # `tensor_shapes` has checked that the parts make up the leaf
    return leaf


def _finite(array: np.ndarray) -> bool:
    """Whether all numbers are finite; a part at a time, as the answers take memory, too."""
    if array.dtype.kind in "iub":
        return True
    parts = array if array.nbytes > _PIECE and array.ndim > 1 else (array,)
    return all(bool(np.isfinite(part).all()) for part in parts)


def _is_constant(tensor: Tensor, expected: np.ndarray) -> bool:
    """Integers exactly; floats to the rounding of the file's dtype, wherever it was computed.

    A sine of a position near 100, which float32 has to 4e-6, is no nearer than that.
    """
    if tensor.shape != expected.shape or tensor.floating != (expected.dtype.kind == "f"):
        return False
    found = tensor.read()
    if not tensor.floating:
        return np.array_equal(found, expected)
    tolerance = max(1e-5, float(jnp.finfo(found.dtype).eps))
    return np.allclose(found.astype(np.float32), expected, rtol=0, atol=tolerance)
