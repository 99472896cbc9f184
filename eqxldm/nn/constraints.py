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
