"""Embeddings of time, labels and positions."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .linear import Linear, normal


def sinusoidal(
    position: Float[Array, ""], size: int, max_period: float = 10_000.0
) -> Float[Array, " size"]:
    """`[cos(p w_0), ..., sin(p w_0), ...]`, `w_i = max_period^(-i / k)`, `k = size / 2`.

    The order, cosine first, is that of DiT and of guided-diffusion. Always float32: bfloat16
    cannot tell timestep 998 from 999.

    >>> sinusoidal(jnp.array(0.0), 4)
    Array([1., 1., 0., 0.], dtype=float32)
    """
    if size % 2:
        raise ValueError(f"sinusoidal: size must be even, got {size}.")
    half = size // 2
    frequencies = jnp.exp(-math.log(max_period) / half * jnp.arange(half, dtype=jnp.float32))
    angles = position.astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


def sincos_positions(height: int, width: int, size: int) -> Float[np.ndarray, "n size"]:
    """Fixed 2-D sin-cos positions of a `height x width` grid, row by row.

    The first half of the features encodes the column, the second half the row; in each half
    `[sin(p w_i), cos(p w_i)]` with `w_i = 10000^(-i / (size / 4))`, as in MAE and DiT.
    A constant of the architecture, computed in float64 in the call; not a parameter.

    >>> sincos_positions(2, 3, 8).shape
    (6, 8)
    """
    if size % 4:
        raise ValueError(f"sincos_positions: size must be a multiple of 4, got {size}.")
    frequencies = 10_000.0 ** -(np.arange(size // 4) / (size // 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    features = []
    for positions in (columns, rows):
        angles = positions.reshape(-1, 1) * frequencies
        features += [np.sin(angles), np.cos(angles)]
    return np.concatenate(features, axis=1)


class TimeEmbedding(eqx.Module):
    """`W2 silu(W1 sinusoidal(1000 t - 1) + b1) + b2` for a time `t` in [0, 1].

    `1000 t - 1` is the timestep of a table of 1000 at `t` (`paths.DiscreteVP`), which is what
    published networks were trained with: timestep `i` lies at `t = (i + 1) / 1000`. On other
    paths it is a time like any other. Computes in float32.

    >>> TimeEmbedding(16, key=jax.random.key(0))(jnp.array(0.5)).shape
    (16,)
    """

    linear1: Linear
    linear2: Linear
    frequencies: int = eqx.field(static=True)

    def __init__(self, width: int, *, frequencies: int = 256, key):
        k1, k2 = jax.random.split(key)
        self.linear1 = Linear(frequencies, width, init=normal(0.02), key=k1)
        self.linear2 = Linear(width, width, init=normal(0.02), key=k2)
        self.frequencies = frequencies

    def __call__(self, t: Float[Array, ""]) -> Float[Array, " d"]:
        return self.linear2(jax.nn.silu(self.linear1(sinusoidal(1000 * t - 1, self.frequencies))))


class LabelEmbedding(eqx.Module):
    """A table with one row a class and one more, row `num_classes`, for "no label".

    That last row is the learned null condition of classifier-free guidance.
    Labels must lie in `0 .. num_classes`; under jit nothing can be raised, so a label outside
    gives NaNs and not somebody else's row. `check_label` raises.

    >>> embedding = LabelEmbedding(10, 16, key=jax.random.key(0))
    >>> embedding(embedding.null).shape
    (16,)
    """

    table: Float[Array, "rows d"]

    def __init__(self, num_classes: int, width: int, *, key):
        if num_classes < 1:
            raise ValueError(f"LabelEmbedding: num_classes must be at least 1, got {num_classes}.")
        self.table = 0.02 * jax.random.normal(key, (num_classes + 1, width))

    @property
    def null(self) -> Int[Array, ""]:
        """The index of the null row: the number of classes."""
        return jnp.array(self.table.shape[0] - 1)

    def __call__(self, label: Int[Array, ""]) -> Float[Array, " d"]:
        label = jnp.where(label < 0, self.table.shape[0], label)  # -1 must not wrap around
        return self.table.at[label].get(mode="fill", fill_value=jnp.nan)


def check_label(label: Int[Array, "*batch"], num_classes: int) -> Int[Array, "*batch"]:
    """`label`; an error at run time unless every entry lies in `0 .. num_classes`.

    `num_classes` itself means "no label". Use what is returned, or the check does not happen. It
    costs a call to the host: for debugging and at the border, not for hot loops.

    >>> check_label(jnp.array([0, 9, 10]), num_classes=10)
    Array([ 0,  9, 10], dtype=int32)
    """
    inside = jnp.all((label >= 0) & (label <= num_classes))
    message = f"label must lie in 0 .. {num_classes}, where {num_classes} means no label."
    return eqx.error_if(label, ~inside, message)
