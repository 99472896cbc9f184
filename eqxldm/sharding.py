"""Meshes, and which part of each array lies where: data, fsdp and tensor parallel.

A mesh has three axes. A batch is divided over `data` and `fsdp`, each device's examples being its
own; parameters, their averages and the optimizer's state are divided over `fsdp` and gathered
where they are used (Zhao et al. 2023, fully sharded data parallel); attention heads and the
hidden units of the MLPs are divided over `tensor` (Shoeybi et al. 2019, section 3).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .nn.constraints import tensor_axis

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Blocks that a scan runs over have a leading axis, which no device may have a part of.
STACKED = re.compile(r"(^|\.)blocks\.[a-z_]")
# Smaller arrays of a layer, biases and norms, are copied: dividing them costs more than it saves.
SMALLEST_DIVIDED = 2**16


def parse_mesh(text: str) -> dict[str, int]:
    """The axes' sizes from `data=2,fsdp=4`; one may be -1: what the devices leave.

    Axes not named are 1, and of an empty text `data` is -1.

    **Raises** `ValueError` for anything else.

    >>> parse_mesh("fsdp=4,tensor=2")
    {'data': 1, 'fsdp': 4, 'tensor': 2}
    >>> parse_mesh("fsdp=0")
    Traceback (most recent call last):
        ...
    ValueError: mesh 'fsdp=0': fsdp must be a positive number, or -1 for what is left; got 0.
    """
    if not text.strip():
        return {"data": -1, "fsdp": 1, "tensor": 1}
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in AXES or name in sizes or not re.fullmatch(r"-?\d+", value):
            raise ValueError(
                f"mesh '{text}': need each of {', '.join(AXES)} at most once with a number, as in "
                f"data=2,fsdp=4; got '{part.strip()}'."
            )
        sizes[name] = int(value)
        if sizes[name] < 1 and sizes[name] != -1:
            raise ValueError(
                f"mesh '{text}': {name} must be a positive number, or -1 for what is left; "
                f"got {value}."
            )
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh '{text}': only one axis can be -1.")
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of these sizes, over all devices by default; None is all of them on `data`.

    A size of -1 takes what the others leave. `tensor` neighbours are next to each other, then
    `fsdp`: the axes that move the most bytes get the nearest devices.

    **Raises** `ValueError` unless the sizes multiply to the number of devices.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    wanted = {axis: (sizes or {"data": -1}).get(axis, 1) for axis in AXES}
    found = list(jax.devices() if devices is None else devices)
    given = math.prod(size for size in wanted.values() if size != -1)
    wanted = {axis: len(found) // given if n == -1 else n for axis, n in wanted.items()}
    if math.prod(wanted.values()) != len(found) or min(wanted.values()) < 1:
        shown = ",".join(f"{axis}={(sizes or {}).get(axis, 1)}" for axis in AXES)
        raise ValueError(
            f"mesh {shown}: its sizes must multiply to the {len(found)} "
            f"device{'s' * (len(found) > 1)} that {'are' if len(found) > 1 else 'is'} there."
        )
    shape, auto = tuple(wanted.values()), (AxisType.Auto,) * len(AXES)
    if devices is None:
        return jax.make_mesh(shape, AXES, axis_types=auto)  # follows the wiring of a TPU slice
    return Mesh(np.array(found).reshape(shape), AXES, axis_types=auto)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis divided over `data` and `fsdp`.

    >>> tuple(batch_sharding(make_mesh()).spec)
    (('data', 'fsdp'),)
    """
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def own_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that lie on this process's devices, ascending.

    They need not be contiguous, as a mesh follows the wiring of a slice; and processes that
    `tensor` divides the model between share theirs.

    **Raises** `ValueError` as `check_batch`.

    >>> own_rows(4, make_mesh()).tolist()
    [0, 1, 2, 3]
    """
    check_batch(batch_size, mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    parts = {index[0].indices(batch_size) for index in indices if index is not None}
    return np.concatenate([np.arange(*part) for part in sorted(parts)])


def batch_vmap(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.vmap` over a batch of examples, kept divided over `data` and `fsdp`.

    The mesh is the one of `jax.set_mesh`; without one this is `jax.vmap`. Constraints inside the
    function, such as `nn.replicate_activation`, then say where the whole batch lies.

    >>> batch_vmap(lambda x: x + 1)(np.zeros(2)).tolist()
    [1.0, 1.0]
    """
    names = jax.sharding.get_abstract_mesh().axis_names
    axes = tuple(axis for axis in BATCH_AXES if axis in names)
    return jax.vmap(function, **options, spmd_axis_name=axes or None)


def check_batch(batch_size: int, mesh: Mesh, grad_accum_steps: int = 1) -> None:
    """`ValueError` unless a global batch divides over the mesh and the parts of a step.

    >>> check_batch(8, make_mesh(devices=jax.devices()[:1]), grad_accum_steps=3)
    Traceback (most recent call last):
        ...
    ValueError: a batch of 8 does not divide by 3 (1 device shares a batch, in 3 parts).
    """
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % (count * grad_accum_steps):
        many = f"{count} devices share" if count > 1 else "1 device shares"
        parts = f", in {grad_accum_steps} parts" if grad_accum_steps > 1 else ""
        raise ValueError(
            f"a batch of {batch_size} does not divide by {count * grad_accum_steps} "
            f"({many} a batch{parts})."
        )


def partition_spec(
    path: str,
    shape: tuple[int, ...],
    mesh_shape: Mapping[str, int],
    *,
    smallest: int = SMALLEST_DIVIDED,
) -> PartitionSpec:
    """Where an array of this path and shape is divided.

    1. Over `tensor` as the first of `nn.constraints.TENSOR_RULES` says whose pattern ends the path,
       if that axis divides.
    2. Over `fsdp` the largest axis that divides and that rule 1 did not take, the last of equals,
       if a layer's part has at least `smallest` elements.
    3. The leading axis of scanned blocks is never divided, and over `data` nothing is.

    >>> tuple(partition_spec("blocks.fc1.weight", (28, 4608, 1152), {"fsdp": 4, "tensor": 2}))
    (None, 'tensor', 'fsdp')
    """
    axes: list[str | None] = [None] * len(shape)
    first = 1 if STACKED.search(path) else 0
    tensor, fsdp = mesh_shape.get("tensor", 1), mesh_shape.get("fsdp", 1)
    divided = tensor_axis(path, shape, tensor, first)
    if divided is not None:
        axes[divided] = "tensor"
    if fsdp > 1 and math.prod(shape[first:]) >= smallest:
        free = [i for i in range(first, len(shape)) if axes[i] is None and shape[i] % fsdp == 0]
        if free:
            axes[max(free, key=lambda i: (shape[i], i))] = "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def partition_specs(
    tree: PyTree, mesh_shape: Mapping[str, int], *, smallest: int = SMALLEST_DIVIDED
) -> PyTree:
    """`partition_spec` of every array of a tree; shapes are enough.

    A training state's averages and optimizer state end in the paths of the parameters, and so are
    divided like them.

    >>> tree = {"fc2": {"weight": jax.ShapeDtypeStruct((256, 1024), "float32")}}
    >>> tuple(partition_specs(tree, {"fsdp": 4})["fc2"]["weight"])
    (None, 'fsdp')
    """

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return partition_spec(name, tuple(leaf.shape), mesh_shape, smallest=smallest)

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(tree: PyTree, mesh: Mesh, *, smallest: int = SMALLEST_DIVIDED) -> PyTree:
    """`partition_specs` on a mesh, as `jax.jit` and checkpoints take them.

    >>> tuple(shardings({"w": np.ones(3)}, make_mesh())["w"].spec)
    ()
    """
    specs = partition_specs(tree, mesh.shape, smallest=smallest)
    named = lambda spec: NamedSharding(mesh, spec)
    return jax.tree.map(named, specs, is_leaf=lambda s: isinstance(s, PartitionSpec))


def place(tree: PyTree, mesh: Mesh, *, smallest: int = SMALLEST_DIVIDED) -> PyTree:
    """The tree's arrays divided over the mesh; each process must have the same arrays.

    Where an array already is on one of the devices the result may share its memory: what donates
    the one frees the other.

    >>> place({"w": np.ones(3)}, make_mesh())["w"].shape
    (3,)
    """
    return jax.tree.map(_put, tree, shardings(tree, mesh, smallest=smallest))


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def build_placed(
    build: Callable[[], PyTree], mesh: Mesh, *, smallest: int = SMALLEST_DIVIDED
) -> PyTree:
    """What `build()` gives, its arrays made on the mesh: none is ever whole on one device.

    >>> state = build_placed(lambda: {"w": jax.numpy.ones(3), "name": "ones"}, make_mesh())
    >>> tuple(state["w"].sharding.spec), state["name"]
    ((), 'ones')
    """
    arrays = lambda: eqx.filter(build(), eqx.is_array)
    static = eqx.filter(eqx.filter_eval_shape(build), lambda a: not _is_shape(a))
    placed = shardings(jax.eval_shape(arrays), mesh, smallest=smallest)
    # It runs once, and to optimise it takes XLA:CPU four times as long as not to.
    hasty = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else {}
    made = jax.jit(arrays, out_shardings=placed, compiler_options=hasty)()
    return eqx.combine(made, static)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def bytes_per_device(
    tree: PyTree, mesh_shape: Mapping[str, int], *, smallest: int = SMALLEST_DIVIDED
) -> int:
    """The bytes of a tree's arrays on one device of such a mesh; shapes are enough.

    >>> tree = {"fc2": {"weight": jax.ShapeDtypeStruct((256, 1024), "float32")}}
    >>> bytes_per_device(tree, {"fsdp": 4})
    262144
    """
    specs = partition_specs(tree, mesh_shape, smallest=smallest)

    def size(leaf: Any, spec: PartitionSpec) -> int:
        parts = math.prod(mesh_shape[axis] for axis in spec if axis is not None)
        return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize // parts

    return sum(jax.tree.leaves(jax.tree.map(size, tree, specs)))
