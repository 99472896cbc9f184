"""Where an activation or a parameter lies on a mesh, inside a model."""

import re
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree, Shaped

# Which axis, counted from the last, is divided over `tensor`: what the end of a parameter's path
# says. First the layers whose outputs are heads or hidden units, then those that sum over them.
TENSOR_RULES: tuple[tuple[str, int], ...] = (
    (r"\w*attention\.qkv\.weight", -2),  # (3, heads * size, width)
    (r"\w*attention\.qkv\.bias", -1),
    (r"\w*attention\.(query|key|value)\.weight", -2),
    (r"fc1\.weight", -2),  # (hidden, width)
    (r"fc1\.bias", -1),
    (r"\w*attention\.proj\.weight", -1),  # (width, heads * size)
    (r"fc2\.weight", -1),  # (width, hidden)
)


def tensor_axis(path: str, shape: tuple[int, ...], size: int, first: int = 0) -> int | None:
    """The axis of a parameter that is divided over `tensor`, from 0; None if none is.

    >>> tensor_axis("blocks.fc1.weight", (28, 4608, 1152), 2)
    1
    """
    rule = next((axis for p, axis in TENSOR_RULES if re.search(rf"(^|\.){p}$", path)), None)
    if rule is None or size < 2 or len(shape) + rule < first or shape[rule] % size:
        return None
    return len(shape) + rule


def replicate_activation(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`x`, constrained to lie whole on each device that has its example: only batches are divided.

    Called at the boundaries of blocks, so that the compiler gathers a block's parameters and does
    not divide an activation to avoid it. The mesh is the one of `jax.set_mesh`; without one, with
    one of a single device, or with explicit axes, nothing happens. Under `jax.vmap` the batch axis
    is left as it is, or is divided over `spmd_axis_name`.

    >>> import jax.numpy as jnp
    >>> undivided(jnp.ones((2, 3))).shape
    (2, 3)
    """
    return _constrained(x, (None,) * x.ndim)


def gather_params(params: PyTree, dtype: Any) -> PyTree:
    """A block's or a layer's weights in `dtype`, whole on each device but for their `tensor` part.

    Called where they are used: cast first, so that half as many bytes travel, and gathered whole,
    so that the compiler neither divides an activation (a convolution's images by rows and
    channels) nor splits a product into one for each part of a weight, as it otherwise does on
    TPUs. Their gradients go back in `dtype` too. Vectors and what is smaller stay as they are.
    Without a mesh only the cast is done.

    >>> import jax.numpy as jnp
    >>> gathered({"weight": jnp.ones((2, 3)), "bias": jnp.ones(2)}, jnp.bfloat16)["weight"].dtype
    dtype(bfloat16)
    """
    tensor = dict(jax.sharding.get_abstract_mesh().shape).get("tensor", 1)

    def gather(path: Any, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not name.endswith("weight"):
            return leaf
        axis = tensor_axis(name, leaf.shape, tensor)
        spec = tuple("tensor" if i == axis else None for i in range(leaf.ndim))
        return _constrained(leaf.astype(dtype), spec)

    return jax.tree_util.tree_map_with_path(gather, params)


def _constrained(x: Array, spec: tuple[str | None, ...]) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    auto = all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    if mesh.size < 2 or not auto:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


@jax.custom_jvp
def fusion_barrier(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`x`, computed where it is made and not inside what reads it; its gradient is not affected.

    Between the linear layers of an MLP: a TPU's compiler otherwise makes one operation of both and
    computes the activation again for each part of the second.

    >>> import jax.numpy as jnp
    >>> apart(jnp.ones((2, 3))).shape
    (2, 3)
    """
    return jax.lax.optimization_barrier(x)


@fusion_barrier.defjvp
def _apart_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return fusion_barrier(*primals), tangents[0]
