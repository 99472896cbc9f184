"""Embeddings of time, labels and positions."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .linear import Initializer, Linear, normal

SMALL_NORMAL = normal(0.02)


def sinusoidal(
    position: Float[Array, ""],
    size: int,
    max_period: float = 10_000.0,
    *,
    freq_shift: int = 0,
    sin_first: bool = False,
) -> Float[Array, " size"]:
    """`[cos(p w_0), ..., sin(p w_0), ...]`, `w_i = max_period^(-i / (k - freq_shift))`, `i < k`.

    `k = size / 2`. Cosine first and no shift, the default, is what DiT, guided-diffusion and
    Stable Diffusion do; sine first and a shift of 1 is DDPM's; diffusers' DiT has the shift alone.
    Always float32: bfloat16 cannot tell timestep 998 from 999.

    **Raises** `ValueError` for an odd size and for one without two frequencies where `freq_shift`
    needs them.

    >>> sinusoidal(jnp.array(0.0), 4)
    Array([1., 1., 0., 0.], dtype=float32)
    """
    half = size // 2
    if size % 2:
        raise ValueError(f"sinusoidal: size must be even, got {size}.")
    if half <= freq_shift:
        raise ValueError(
            f"sinusoidal: size must be above {2 * freq_shift} with freq_shift {freq_shift}, "
            f"got {size}."
        )
    # Timesteps go to 1000, so the last bit of a frequency shows in the angle: it is rounded once.
    exponents = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32)
    exponents = exponents / np.float32(half - freq_shift)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = position.astype(jnp.float32) * frequencies
    waves = [jnp.cos(angles), jnp.sin(angles)]
    return jnp.concatenate(waves[::-1] if sin_first else waves)


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
    paths it is a time like any other. Computes in float32. `frequencies` is the size of the
    sinusoidal part, `freq_shift` and `sin_first` are its options. `init` is of both weights, DiT's
    by default.

    >>> TimeEmbedding(16, key=jax.random.key(0))(jnp.array(0.5)).shape
    (16,)
    """

    linear1: Linear
    linear2: Linear
    frequencies: int = eqx.field(static=True)
    freq_shift: int = eqx.field(static=True)
    sin_first: bool = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        *,
        frequencies: int = 256,
        freq_shift: int = 0,
        sin_first: bool = False,
        init: Initializer = SMALL_NORMAL,
        key,
    ):
        k1, k2 = jax.random.split(key)
        self.linear1 = Linear(frequencies, width, init=init, key=k1)
        self.linear2 = Linear(width, width, init=init, key=k2)
        self.frequencies, self.freq_shift, self.sin_first = frequencies, freq_shift, sin_first

    def __call__(self, t: Float[Array, ""]) -> Float[Array, " d"]:
        waves = sinusoidal(
            1000 * t.astype(jnp.float32) - 1,
            self.frequencies,
            freq_shift=self.freq_shift,
            sin_first=self.sin_first,
        )
        return self.linear2(jax.nn.silu(self.linear1(waves)))


class LabelEmbedding(eqx.Module):
    """A table with one row a class and one more, row `num_classes`, for "no label".

    That last row is the learned null condition of classifier-free guidance; `has_null=False`
    leaves it out. Rows start as `N(0, stddev^2)`, as DiT's do by default. Labels must lie in
    `0 .. num_classes`; under jit nothing can be raised, so a label outside gives NaNs and not
    somebody else's row. `check_label` raises.

    >>> embedding = LabelEmbedding(10, 16, key=jax.random.key(0))
    >>> embedding(embedding.null).shape
    (16,)
    """

    table: Float[Array, "rows d"]
    has_null: bool = eqx.field(static=True)

    def __init__(
        self, num_classes: int, width: int, *, has_null: bool = True, stddev: float = 0.02, key
    ):
        if num_classes < 1:
            raise ValueError(f"LabelEmbedding: num_classes must be at least 1, got {num_classes}.")
        self.table = stddev * jax.random.normal(key, (num_classes + has_null, width))
        self.has_null = has_null

    @property
    def num_classes(self) -> int:
        """The number of real classes."""
        return self.table.shape[0] - self.has_null

    @property
    def null(self) -> Int[Array, ""]:
        """The index of the null row: the number of classes. `ValueError` without such a row."""
        if not self.has_null:
            raise ValueError(
                "LabelEmbedding: this table has no row for 'no label'; all its rows are classes. "
                "If it was trained with one of them as the null label, pass that number yourself."
            )
        return jnp.array(self.num_classes)

    def __call__(self, label: Int[Array, ""]) -> Float[Array, " d"]:
        label = jnp.where(label < 0, self.table.shape[0], label)  # -1 must not wrap around
        return self.table.at[label].get(mode="fill", fill_value=jnp.nan)


def condition_vector(
    name: str,
    time: Float[Array, " d"],
    embed: Callable[..., Any] | None,
    cond: PyTree,
) -> Float[Array, " d"]:
    """`time + embed(cond)`; `time` itself where `embed` is None, which needs `cond` None.

    **Raises** `ValueError`, with the network's `name`, for a missing or a needless condition and
    for a vector of another shape.

    >>> condition_vector("DiT", jnp.zeros(2), None, None)
    Array([0., 0.], dtype=float32)
    """
    if embed is None:
        if cond is not None:
            raise ValueError(
                f"{name}: the network is unconditional, so cond must be None. "
                "Make it with num_classes or embed_cond."
            )
        return time
    if cond is None:
        raise ValueError(f"{name}: the network is conditional, but cond is None.")
    vector = embed(cond)
    if vector.shape != time.shape:
        raise ValueError(
            f"{name}: embed_cond must give a vector of shape {time.shape}, got {vector.shape}."
        )
    return time + vector.astype(time.dtype)


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
