"""Where an activation lies on a mesh."""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped


def undivided(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`x`, constrained to lie whole on each device that has its example: only batches are divided.

    Called at the boundaries of blocks, so that the compiler gathers a block's parameters and does
    not divide an activation to avoid it. The mesh is the one of `jax.set_mesh`; without one, with
    one of a single device, or with explicit axes, nothing happens. Under `jax.vmap` the batch axis
    is left as it is, or is divided over `spmd_axis_name`.

    >>> import jax.numpy as jnp
    >>> undivided(jnp.ones((2, 3))).shape
    (2, 3)
    """
    mesh = jax.sharding.get_abstract_mesh()
    auto = all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    if mesh.size < 2 or not auto:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(None for _ in x.shape)))
