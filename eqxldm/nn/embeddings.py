"""Embeddings of time, labels and positions."""

import math
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Shaped

from .dtypes import at_least_float32
from .linear import Initializer, Linear, normal
from .rope import grid_positions

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
    At least float32: bfloat16 cannot tell timestep 998 from 999.

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
    angles = position.astype(at_least_float32(position.dtype)) * frequencies
    waves = [jnp.cos(angles), jnp.sin(angles)]
    return jnp.concatenate(waves[::-1] if sin_first else waves)


def sincos_positions(grid: tuple[int, ...], size: int) -> Float[np.ndarray, "n size"]:
    """Fixed sin-cos positions of the cells of a grid, the last axis fastest.

    The features are shared by the axes, the last axis first: in two dimensions the first half
    encodes the column and the second half the row, as in MAE and DiT. In an axis's part of `2 k`
    features, `[sin(p w_i), cos(p w_i)]` with `w_i = 10000^(-i / k)`. Where the axes do not divide
    the pairs of features, the last axes have one pair more.
    A constant of the architecture, computed in float64 in the call; not a parameter.

    **Raises** `ValueError` for an odd size, and for one without a pair for each axis.

    >>> sincos_positions((2, 3), 8).shape, sincos_positions((2, 2, 3), 8).shape
    ((6, 8), (12, 8))
    """
    return sincos_features(grid_positions(grid), size)


def sincos_features(
    positions: Shaped[np.ndarray, "n axes"], size: int
) -> Float[np.ndarray, "n size"]:
    """`sincos_positions` of any positions, which need be neither whole numbers nor a grid.

    **Raises** `ValueError` as there.

    >>> sincos_features(np.array([[0.0, 0.0]]), 4).tolist()
    [[0.0, 1.0, 0.0, 1.0]]
    """
    axes = positions.shape[1]
    if size % 2 or size < 2 * axes:
        raise ValueError(
            f"sincos_positions: size must be even and at least {2 * axes} for {axes} axes, got "
            f"{size}."
        )
    features = []
    for i, along in enumerate(positions.T[::-1]):
        pairs = size // 2 // axes + (i < size // 2 % axes)
        angles = along[:, None] * 10_000.0 ** -(np.arange(pairs) / pairs)
        features += [np.sin(angles), np.cos(angles)]
    return np.concatenate(features, axis=1)


@dataclass(frozen=True)
class Sinusoid:
    """How a `TimeEmbedding` reads a time: `sinusoidal(scale t + offset)`.

    `1000 t - 1`, the default, is the timestep of a table of 1000 at `t` (`paths.DiscreteVP`), which
    is what published networks were trained with: timestep `i` lies at `t = (i + 1) / 1000`. On
    other paths it is a time like any other. Objectives that differentiate the network in `t` need
    `Sinusoid(scale=1.0, offset=0.0)`: the scale multiplies `d out / d t` (Geng et al. 2025).

    `size` is the number of features; `freq_shift` and `sin_first` are those of `sinusoidal`.

    >>> Sinusoid(size=4)(jnp.array(0.001))
    Array([1., 1., 0., 0.], dtype=float32)
    """

    scale: float = 1000.0
    offset: float = -1.0
    size: int = 256
    freq_shift: int = 0
    sin_first: bool = False

    def build(self, width: int, *, init: Initializer = SMALL_NORMAL, key) -> "TimeEmbedding":
        """The embedding that reads its time so.

        >>> Sinusoid().build(8, key=jax.random.key(0))(jnp.array(0.5)).shape
        (8,)
        """
        options: dict[str, Any] = dict(scale=self.scale, offset=self.offset, frequencies=self.size)
        options |= dict(freq_shift=self.freq_shift, sin_first=self.sin_first)
        return TimeEmbedding(width, **options, init=init, key=key)

    def __call__(self, t: Float[Array, ""]) -> Float[Array, " size"]:
        at = self.scale * t.astype(at_least_float32(t.dtype)) + self.offset
        return sinusoidal(at, self.size, freq_shift=self.freq_shift, sin_first=self.sin_first)


class TimeEmbedding(eqx.Module):
    """`W2 silu(W1 sinusoidal(scale t + offset) + b1) + b2` for a time `t` in [0, 1].

    Computes in float32. Arguments as in `Sinusoid`, which `config` is; `frequencies` is its size.
    `init` is of both weights, DiT's by default.

    >>> TimeEmbedding(16, key=jax.random.key(0))(jnp.array(0.5)).shape
    (16,)
    """

    linear1: Linear
    linear2: Linear
    config: Sinusoid = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        *,
        scale: float = 1000.0,
        offset: float = -1.0,
        frequencies: int = 256,
        freq_shift: int = 0,
        sin_first: bool = False,
        init: Initializer = SMALL_NORMAL,
        key,
    ):
        k1, k2 = jax.random.split(key)
        self.config = Sinusoid(scale, offset, frequencies, freq_shift, sin_first)
        self.linear1 = Linear(frequencies, width, init=init, key=k1)
        self.linear2 = Linear(width, width, init=init, key=k2)

    def __call__(self, t: Float[Array, ""]) -> Float[Array, " d"]:
        return self.linear2(jax.nn.silu(self.linear1(self.config(t))))


@dataclass(frozen=True)
class Vector:
    """How a `VectorEmbedding` was made: its sizes.

    >>> Vector(4, 16).build(key=jax.random.key(0)).linear1.weight.shape
    (16, 4)
    """

    in_size: int
    width: int

    def build(self, *, key) -> "VectorEmbedding":
        """The embedding, with random weights."""
        return VectorEmbedding(self.in_size, self.width, key=key)


class VectorEmbedding(eqx.Module):
    """`W2 silu(W1 x + b1) + b2` of a vector that joins the time: a text's pooled vector, say.

    In the dtype of `x`. `init` is of both weights. `config` is its `Vector`.

    >>> VectorEmbedding(4, 16, key=jax.random.key(0))(jnp.ones(4)).shape
    (16,)
    """

    linear1: Linear
    linear2: Linear
    config: Vector = eqx.field(static=True)

    def __init__(self, in_size: int, width: int, *, init: Initializer = SMALL_NORMAL, key):
        k1, k2 = jax.random.split(key)
        self.config = Vector(in_size, width)
        self.linear1 = Linear(in_size, width, init=init, key=k1)
        self.linear2 = Linear(width, width, init=init, key=k2)

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " d"]:
        return self.linear2(jax.nn.silu(self.linear1(x)))


@dataclass(frozen=True)
class Labels:
    """How a `LabelEmbedding` was made: its arguments.

    >>> Labels(10, 16).build(key=jax.random.key(0)).table.shape
    (11, 16)
    """

    num_classes: int
    width: int
    has_null: bool = True
    stddev: float = 0.02

    def build(self, *, key) -> "LabelEmbedding":
        """The embedding, with random weights."""
        options: dict[str, Any] = dict(has_null=self.has_null, stddev=self.stddev)
        return LabelEmbedding(self.num_classes, self.width, **options, key=key)


class LabelEmbedding(eqx.Module):
    """A table with one row a class and one more, row `num_classes`, for "no label".

    That last row is the learned null condition of classifier-free guidance; `has_null=False`
    leaves it out. Rows start as `N(0, stddev^2)`, as DiT's do by default.

    **Raises** `ValueError` for a label that has no row. Where the label is traced nothing can be
    raised, so one outside gives NaNs and not somebody else's row; `check_label` raises there too.

    >>> embedding = LabelEmbedding(10, 16, key=jax.random.key(0))
    >>> embedding(embedding.null).shape
    (16,)
    """

    table: Float[Array, "rows d"]
    config: Labels = eqx.field(static=True)

    def __init__(
        self, num_classes: int, width: int, *, has_null: bool = True, stddev: float = 0.02, key
    ):
        if num_classes < 1:
            raise ValueError(f"LabelEmbedding: num_classes must be at least 1, got {num_classes}.")
        self.table = stddev * jax.random.normal(key, (num_classes + has_null, width))
        self.config = Labels(num_classes, width, has_null, stddev)

    @property
    def num_classes(self) -> int:
        """The number of real classes."""
        return self.config.num_classes

    @property
    def null(self) -> Int[Array, ""]:
        """The index of the null row: the number of classes. `ValueError` without such a row."""
        if not self.config.has_null:
            raise ValueError(
                "LabelEmbedding: this table has no row for 'no label'; all its rows are classes. "
                "If it was trained with one of them as the null label, pass that number yourself."
            )
        return jnp.array(self.num_classes)

    def __call__(self, label: Int[Array, ""]) -> Float[Array, " d"]:
        rows = self.table.shape[0]
        if not isinstance(label, Tracer) and not 0 <= int(label) < rows:
            null = f", where {self.num_classes} means no label" if self.config.has_null else ""
            raise ValueError(f"label must lie in 0 .. {rows - 1}{null}; got {int(label)}.")
        label = jnp.where(label < 0, rows, label)  # -1 must not wrap around
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
