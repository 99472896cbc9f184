"""Where an activation lies on a mesh, and what the compiler may not fuse."""

import jax
from jaxtyping import Array, Shaped

from ..sharding import constrain


def replicate_activation(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`x`, constrained to lie whole on each device that has its example: only batches are divided.

    Called at the boundaries of blocks, so that the compiler gathers a block's parameters and does
    not divide an activation to avoid it. The mesh is the one of `jax.set_mesh`; without one, with
    one of a single device, or with explicit axes, nothing happens. Under `jax.vmap` the batch axis
    is left as it is, or is divided over `spmd_axis_name`.

    >>> import jax.numpy as jnp
    >>> replicate_activation(jnp.ones((2, 3))).shape
    (2, 3)
    """
    return constrain(x, (None,) * x.ndim)


def divide_tokens(x: Shaped[Array, "*shape"], axis: str | None) -> Shaped[Array, "*shape"]:
    """`x`, its first axis divided over an axis of the mesh: tokens, or the frames they make up.

    With None it is `replicate_activation`. For sequences that are too long for one device; a layer
    that needs the whole sequence, attention's keys, gathers it (Korthikanti et al. 2023).

    **Raises** `ValueError` if the mesh's axis does not divide the tokens.

    >>> import jax.numpy as jnp
    >>> divide_tokens(jnp.ones((2, 3)), "tensor").shape
    (2, 3)
    """
    if axis is None:
        return replicate_activation(x)
    size = dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)
    if x.shape[0] % size:
        raise ValueError(
            f"divide_tokens: {x.shape[0]} tokens do not divide over the {size} devices of the "
            f"mesh's axis {axis}. Take another number of frames, or another mesh."
        )
    return constrain(x, (axis if size > 1 else None, *(x.ndim - 1) * [None]))


@jax.custom_jvp
def fusion_barrier(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`x`, computed where it is made and not inside what reads it; its gradient is not affected.

    Between the linear layers of an MLP: a TPU's compiler otherwise makes one operation of both and
    computes the activation again for each part of the second.

    >>> import jax.numpy as jnp
    >>> fusion_barrier(jnp.ones((2, 3))).shape
    (2, 3)
    """
    return jax.lax.optimization_barrier(x)


@fusion_barrier.defjvp
def _barrier_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return fusion_barrier(*primals), tangents[0]
