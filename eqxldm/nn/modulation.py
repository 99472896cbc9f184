"""Adaptive layer norm: shift, scale and gate computed from a condition (Peebles & Xie 2023)."""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .linear import Linear, zeros


def modulate(
    x: Float[Array, "n d"], shift: Float[Array, " d"], scale: Float[Array, " d"]
) -> Float[Array, "n d"]:
    """`x (1 + scale) + shift`.

    >>> import jax.numpy as jnp
    >>> modulate(jnp.ones((2, 3)), jnp.zeros(3), jnp.zeros(3)).shape
    (2, 3)
    """
    return x * (1 + scale) + shift


class Modulation(eqx.Module):
    """`count` vectors `W silu(c) + b`, all zero at the start.

    `c` has `in_size` numbers, by default `width`, as the vectors do.

    >>> import jax.numpy as jnp
    >>> Modulation(8, 6, key=jax.random.key(0))(jnp.ones(8)).shape
    (6, 8)
    """

    linear: Linear
    count: int = eqx.field(static=True)

    def __init__(self, width: int, count: int, *, in_size: int | None = None, key):
        self.linear = Linear(in_size or width, count * width, init=zeros, key=key)
        self.count = count

    def __call__(self, c: Float[Array, " in"]) -> Float[Array, "count d"]:
        return self.linear(jax.nn.silu(c)).reshape(self.count, -1)
