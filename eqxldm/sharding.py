"""Meshes, and which part of each array lies where: data, fsdp and tensor parallel.

A mesh has three axes. A batch is divided over `data` and `fsdp`, each device's examples being its
own; parameters, their averages and the optimizer's state are divided over `fsdp` and gathered
where they are used (Zhao et al. 2023, fully sharded data parallel); attention heads and the
hidden units of the MLPs are divided over `tensor` (Shoeybi et al. 2019, section 3).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Smaller arrays of a layer, biases and norms, are copied: dividing them costs more than it saves.
SMALLEST_DIVIDED = 2**16
# The blocks of an `nn.Stack` have a leading axis, which no device may have a part of.
STACKED = re.compile(r"(^|\.)stacked\.")


class Rule(NamedTuple):
    """What holds for the parameters whose paths end in `pattern`, a regular expression.

    `tensor`: the axis, counted from the last, that is divided over `tensor`; None: none is.
    `is_weight`: a matrix or a kernel. Weight decay is for these alone, and they are what is cast to
    the compute dtype and gathered before use (`gather_params`).
    """

    pattern: str
    tensor: int | None = None
    is_weight: bool = False


# The first rule that fits counts. A parameter that none fits is copied, and is a weight if it is
# called so: models of users need no rule. Those of the library have one each (a test holds it), so
# that a renamed field cannot silently lose what is said here of the old name.
RULES: tuple[Rule, ...] = (
    # Attention by heads and MLPs by hidden units: first the layers whose outputs these are, then
    # those that sum over them.
    Rule(r"attention\.qkv\.weight", -2, True),  # (3, heads * size, width)
    Rule(r"attention\.qkv\.bias", -1),
    Rule(r"attention\.(query|key|value)\.weight", -2, True),  # (heads * size, width)
    Rule(r"attention\.(query|key|value)\.bias", -1),
    Rule(r"(fc1|gate|lm_head)\.weight", -2, True),  # (hidden, width), (vocabulary, width)
    Rule(r"(fc1|gate|lm_head)\.bias", -1),
    Rule(r"token_table", -1),  # (vocabulary, width): looking up needs no other device's rows
    Rule(r"attention\.proj\.weight", -1, True),  # (width, heads * size)
    Rule(r"fc2\.weight", -1, True),  # (width, hidden)
    Rule(r"(attention\.proj|fc2)\.bias"),
    # The same in 8 bits (`quantization`), with a scale for each output. They are neither cast nor
    # gathered before use: their product is.
    Rule(r"(attention\.(qkv|query|key|value)|fc1|gate)\.weight\.(values|scale)", -2),
    Rule(r"(attention\.proj|fc2)\.weight\.values", -1),
    Rule(r"weight\.(values|scale)"),
    # Layers that `tensor` does not divide.
    Rule(
        r"(patch_bottleneck|patch_embedding|context_embedding|final_linear|cell_map|pooled|project|project_layer)\.weight",
        None,
        True,
    ),
    Rule(
        r"(patch_embedding|context_embedding|final_linear|cell_map|pooled|project|project_layer)\.bias"
    ),
    Rule(
        r"(time|step|pooled|guidance|added|strength|low|high)_embedding\.linear[12]\.weight",
        None,
        True,
    ),
    Rule(r"(time|step|pooled|guidance|added|strength|low|high)_embedding\.linear[12]\.bias"),
    Rule(r"weight_head\.weight", None, True),
    Rule(r"weight_head\.bias"),
    Rule(r"modulation\.linear\.weight", None, True),
    Rule(r"modulation\.linear\.bias"),
    Rule(r"(attentions|middle|levels)(\.\d+)+\.(query|key|value|out)\.weight", None, True),
    Rule(r"(attentions|middle|levels)(\.\d+)+\.(query|key|value|out)\.bias"),
    Rule(r"(stem|head|quant)(\.first|\.second|\.conv)?\.weight", None, True),
    Rule(r"(stem|head|quant)(\.first|\.second|\.conv)?\.bias"),
    Rule(r"(conv[12]|time\.conv|shortcut|shift|resample|proj_in|proj_out)\.weight", None, True),
    Rule(r"(conv[12]|time\.conv|shortcut|shift|resample|proj_in|proj_out)\.bias"),
    Rule(r"(convs|downs|ups|resample|blocks)(\.\d+)+(\.conv)?\.weight", None, True),
    Rule(r"(convs|downs|ups|blocks)(\.\d+)+(\.conv)?\.bias"),
    # Norms, tables and the weights of channels.
    Rule(r"(\w*norm[12345]?|norms\.\d+)\.(scale|bias)"),
    Rule(r"table"),
    Rule(r"positions"),
    Rule(r"gates"),
    Rule(r"(class|mask)_token"),
    Rule(r"layer_scale[12]"),
    # Convolutions with the fixed moments of their norms.
    Rule(r"units\.[\w.]+\.weight", None, True),
    Rule(r"units\.[\w.]+\.(scale|bias|mean|variance)"),
    Rule(r"fc\.(weight|bias)"),
    Rule(r"heads\.\d+"),
)


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


def path_name(path: Sequence[Any]) -> str:
    """A path of JAX's trees as the rules read it, such as `blocks.stacked.fc1.weight`.

    >>> path_name(jax.tree_util.tree_leaves_with_path({"fc1": [0]})[0][0])
    'fc1.0'
    """
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".")


@cache
def parameter_rule(path: str) -> Rule | None:
    """The first of `RULES` whose pattern ends the path; None for a parameter of no known layer.

    >>> parameter_rule("blocks.stacked.self_attention.proj.weight").tensor
    -1
    """
    fits = lambda rule: re.search(rf"(^|\.|_){rule.pattern}$", path)
    return next((rule for rule in RULES if fits(rule)), None)


def is_weight(path: str) -> bool:
    """Whether a parameter is a matrix or a kernel: what is decayed, and gathered before use.

    >>> is_weight("blocks.stacked.fc1.weight"), is_weight("norm.scale")
    (True, False)
    """
    rule = parameter_rule(path)
    return path.rpartition(".")[2] == "weight" if rule is None else rule.is_weight


def stack_name(path: str) -> str | None:
    """The stack that a parameter belongs to, whose arrays have a leading axis; None if to none.

    >>> stack_name("blocks.stacked.fc1.weight"), stack_name("final_linear.weight")
    ('blocks', None)
    """
    found = STACKED.search(path)
    return None if found is None else path[: found.start()]


def tensor_axis(path: str, shape: tuple[int, ...], size: int) -> int | None:
    """The axis of a parameter that `size` devices of `tensor` divide, from 0; None if none is.

    >>> tensor_axis("blocks.stacked.fc1.weight", (28, 4608, 1152), 2)
    1
    """
    rule = parameter_rule(path)
    if rule is None or rule.tensor is None or size < 2:
        return None
    first, axis = 0 if stack_name(path) is None else 1, len(shape) + rule.tensor
    return None if axis < first or shape[axis] % size else axis


def constrain(x: Array, spec: Sequence[str | None]) -> Array:
    """`x`, whose axes the compiler is to divide as `spec` says; None leaves an axis whole.

    The mesh is the one of `jax.set_mesh`; without one, with one of a single device, or with
    explicit axes, nothing happens.

    >>> constrain(jax.numpy.ones(2), (None,)).shape
    (2,)
    """
    mesh = jax.sharding.get_abstract_mesh()
    auto = all(kind == AxisType.Auto for kind in mesh.axis_types)
    if mesh.size < 2 or not auto:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def gather_params(params: PyTree, dtype: Any) -> PyTree:
    """A block's or a layer's weights in `dtype`, whole on each device but for their `tensor` part.

    Called where they are used: cast first, so that half as many bytes travel, and gathered whole,
    so that the compiler neither divides an activation (a convolution's images by rows and
    channels) nor splits a product into one for each part of a weight, as it otherwise does on
    TPUs. Their gradients go back in `dtype` too. All that `is_weight` does not name stays as it is.
    Without a mesh only the cast is done.

    >>> params = {"weight": jax.numpy.ones((2, 3)), "bias": jax.numpy.ones(2)}
    >>> gather_params(params, jax.numpy.bfloat16)["weight"].dtype
    dtype(bfloat16)
    """
    tensor = dict(jax.sharding.get_abstract_mesh().shape).get("tensor", 1)

    def gather(path: Any, leaf: Array) -> Array:
        name = path_name(path)
        if not is_weight(name):
            return leaf
        axis = tensor_axis(name, leaf.shape, tensor)
        spec = tuple("tensor" if i == axis else None for i in range(leaf.ndim))
        return constrain(leaf.astype(dtype), spec)

    return jax.tree_util.tree_map_with_path(gather, params)


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
    path: str, shape: tuple[int, ...], mesh_shape: Mapping[str, int]
) -> PartitionSpec:
    """Where an array of this path and shape is divided.

    1. Over `tensor` as the first of `RULES` says whose pattern ends the path, if that axis divides.
    2. Over `fsdp` the largest axis that divides and that rule 1 did not take, the last of equals,
       if a layer's part has at least `SMALLEST_DIVIDED` elements.
    3. The leading axis of a stack is never divided, and over `data` nothing is.

    >>> mesh = {"fsdp": 4, "tensor": 2}
    >>> tuple(partition_spec("blocks.stacked.fc1.weight", (28, 4608, 1152), mesh))
    (None, 'tensor', 'fsdp')
    """
    axes: list[str | None] = [None] * len(shape)
    first = 0 if stack_name(path) is None else 1
    tensor, fsdp = mesh_shape.get("tensor", 1), mesh_shape.get("fsdp", 1)
    divided = tensor_axis(path, shape, tensor)
    if divided is not None:
        axes[divided] = "tensor"
    if fsdp > 1 and math.prod(shape[first:]) >= SMALLEST_DIVIDED:
        free = [i for i in range(first, len(shape)) if axes[i] is None and shape[i] % fsdp == 0]
        if free:
            axes[max(free, key=lambda i: (shape[i], i))] = "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def partition_specs(tree: PyTree, mesh_shape: Mapping[str, int]) -> PyTree:
    """`partition_spec` of every array of a tree; shapes are enough.

    A training state's averages and optimizer state end in the paths of the parameters, and so are
    divided like them.

    >>> tree = {"fc2": {"weight": jax.ShapeDtypeStruct((256, 1024), "float32")}}
    >>> tuple(partition_specs(tree, {"fsdp": 4})["fc2"]["weight"])
    (None, 'fsdp')
    """

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        name = path_name(path)
        return partition_spec(name, tuple(leaf.shape), mesh_shape)

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """`partition_specs` on a mesh, as `jax.jit` and checkpoints take them.

    >>> tuple(shardings({"w": np.ones(3)}, make_mesh())["w"].spec)
    ()
    """
    specs = partition_specs(tree, mesh.shape)
    named = lambda spec: NamedSharding(mesh, spec)
    return jax.tree.map(named, specs, is_leaf=lambda s: isinstance(s, PartitionSpec))


def leaf_sharding(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Where each leaf lies on a mesh by its path: what `pretrained.load(sharding=)` takes.

    >>> tuple(leaf_sharding(make_mesh())(".lm_head.weight", (8, 4)).spec)
    ()
    """

    def rule(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(path.removeprefix("."), shape, mesh.shape))

    return rule


def place(tree: PyTree, mesh: Mesh) -> PyTree:
    """The tree's arrays divided over the mesh; each process must have the same arrays.

    Where an array already is on one of the devices the result may share its memory: what donates
    the one frees the other.

    >>> place({"w": np.ones(3)}, make_mesh())["w"].shape
    (3,)
    """
    return jax.tree.map(_put, tree, shardings(tree, mesh))


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def build_placed(build: Callable[[], PyTree], mesh: Mesh) -> PyTree:
    """What `build()` gives, its arrays made on the mesh: none is ever whole on one device.

    >>> state = build_placed(lambda: {"w": jax.numpy.ones(3), "name": "ones"}, make_mesh())
    >>> tuple(state["w"].sharding.spec), state["name"]
    ((), 'ones')
    """
    arrays = lambda: eqx.filter(build(), eqx.is_array)
    static = eqx.filter(eqx.filter_eval_shape(build), lambda a: not _is_shape(a))
    placed = shardings(jax.eval_shape(arrays), mesh)
    # It runs once: XLA:CPU takes four times as long with its optimisations as without them.
    options = (
        {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else {}
    )
    made = jax.jit(arrays, out_shardings=placed, compiler_options=options)()
    return eqx.combine(made, static)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def bytes_per_device(tree: PyTree, mesh_shape: Mapping[str, int]) -> int:
    """The bytes of a tree's arrays on one device of such a mesh; shapes are enough.

    >>> tree = {"fc2": {"weight": jax.ShapeDtypeStruct((256, 1024), "float32")}}
    >>> bytes_per_device(tree, {"fsdp": 4})
    262144
    """
    specs = partition_specs(tree, mesh_shape)

    def size(leaf: Any, spec: PartitionSpec) -> int:
        parts = math.prod(mesh_shape[axis] for axis in spec if axis is not None)
        return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize // parts

    return sum(jax.tree.leaves(jax.tree.map(size, tree, specs)))
