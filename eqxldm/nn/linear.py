"""Affine maps on the last axis."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Initializer = Callable[[Key[Array, ""], tuple[int, int]], Float[Array, "out in"]]


def xavier_uniform(key: Key[Array, ""], shape: tuple[int, int]) -> Float[Array, "out in"]:
    """`U(-a, a)` with `a = sqrt(6 / (fan_in + fan_out))` (Glorot & Bengio 2010, eq. 16).

    >>> xavier_uniform(jax.random.key(0), (3, 2)).shape
    (3, 2)
    """
    bound = math.sqrt(6 / sum(shape))
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def normal(stddev: float) -> Initializer:
    """`N(0, stddev^2)`.

    >>> normal(0.02)(jax.random.key(0), (3, 2)).shape
    (3, 2)
    """
    return lambda key, shape: stddev * jax.random.normal(key, shape)


def zeros(key: Key[Array, ""], shape: tuple[int, int]) -> Float[Array, "out in"]:
    """All zero: the "Zero" of adaLN-Zero.

    >>> float(zeros(jax.random.key(0), (3, 2)).sum())
    0.0
    """
    return jnp.zeros(shape)


class Linear(eqx.Module):
    """`y = W x + b` on the last axis of `x`, for any leading axes.

    `weight` is stored (out, in), as PyTorch does, and computes in the dtype of `x`. Without
    `use_bias`, `b` is None.

    >>> Linear(2, 3, key=jax.random.key(0))(jnp.ones((5, 2))).shape
    (5, 3)
    """

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"] | None

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        init: Initializer = xavier_uniform,
        use_bias: bool = True,
        key,
    ):
        self.weight = init(key, (out_size, in_size))
        self.bias = jnp.zeros(out_size) if use_bias else None

    def __call__(self, x: Float[Array, "*leading in"]) -> Float[Array, "*leading out"]:
        y = x @ self.weight.T.astype(x.dtype)
        return y if self.bias is None else y + self.bias.astype(x.dtype)
