"""Scaled dot-product attention and the multi-head layer around it."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .linear import Linear


def attend(
    query: Float[Array, "n heads d"],
    key: Float[Array, "m heads d"],
    value: Float[Array, "m heads d"],
) -> Float[Array, "n heads d"]:
    """`softmax(q k^T / sqrt(d)) v` for every head (Vaswani et al. 2017, eq. 1).

    The softmax is float32 whatever the inputs are.

    >>> attend(jnp.ones((4, 2, 8)), jnp.ones((6, 2, 8)), jnp.ones((6, 2, 8))).shape
    (4, 2, 8)
    """
    scores = jnp.einsum("nhd,mhd->hnm", query, key).astype(jnp.float32)
    weights = jax.nn.softmax(scores / math.sqrt(query.shape[-1]), axis=-1)
    return jnp.einsum("hnm,mhd->nhd", weights.astype(value.dtype), value)


class SelfAttention(eqx.Module):
    """Multi-head self-attention over tokens `(n, d)`, with biases (Vaswani et al. 2017).

    **Arguments**: `width` must be a multiple of `heads`.

    >>> SelfAttention(8, 2, key=jax.random.key(0))(jnp.ones((5, 8))).shape
    (5, 8)
    """

    qkv: Linear
    proj: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int, *, key):
        if width % heads:
            raise ValueError(f"SelfAttention: width {width} does not divide into {heads} heads.")
        k1, k2 = jax.random.split(key)
        self.qkv = Linear(width, 3 * width, key=k1)
        self.proj = Linear(width, width, key=k2)
        self.heads = heads

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        n, d = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(n, 3, self.heads, d // self.heads), 1, 0)
        return self.proj(attend(q, k, v).reshape(n, d))
