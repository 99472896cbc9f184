"""Rotary positions: queries and keys turned by angles that grow with their positions."""

from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, Shaped

from .dtypes import at_least_float32


class Rotation(eqx.Module):
    """Turns pairs of features of every head by the angles of their token.

    A pair `(a, b)` becomes `(a cos - b sin, a sin + b cos)`. The first `2 pairs` features of a head
    are turned, the others stay. In float32, and given back in the dtype of `x`.
    """

    cos: Float[Array, "*batch n pairs"]
    sin: Float[Array, "*batch n pairs"]
    halves: bool = eqx.field(static=True, default=False)

    def __call__(self, x: Float[Array, "n heads size"]) -> Float[Array, "n heads size"]:
        pairs = self.cos.shape[-1]
        if 2 * pairs > x.shape[-1]:
            raise ValueError(
                f"Rotation: it turns {2 * pairs} features, but heads have {x.shape[-1]}. Choose "
                f"RoPE sizes that add up to at most width / num_heads."
            )
        turned, rest = x[..., : 2 * pairs].astype(at_least_float32(x.dtype)), x[..., 2 * pairs :]
        cos, sin = self.cos[:, None], self.sin[:, None]
        if self.halves:
            a, b = turned[..., :pairs], turned[..., pairs:]
            parts = [a * cos - b * sin, a * sin + b * cos]
            turned = jnp.concatenate(parts, axis=-1)
        else:
            a, b = turned[..., 0::2], turned[..., 1::2]
            parts = [a * cos - b * sin, a * sin + b * cos]
            turned = jnp.stack(parts, axis=-1).reshape(turned.shape)
        return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


@dataclass(frozen=True)
class RoPE:
    """Rotary position embedding over any number of axes (Su et al. 2021, section 3.2).

    Pair `i` of axis `j` is turned by `p_j theta^(-2 i / sizes[j])` at the position `p`; scores then
    depend on differences of positions alone.

    **Arguments**:

    - `sizes`: how many features of a head each axis turns, all even: FLUX has (16, 56, 56) for
      three axes. What they leave of the head stays as it is.
    - `theta`: the base, 10,000 in most networks.
    - `halves`: which features are a pair. False: neighbours, `(2 i, 2 i + 1)`, as in FLUX and Wan.
      True: `(i, i + sum(sizes) / 2)`, as in LLaMA. The same function of permuted weights.

    Called with positions `(n, axes)`, or `(n,)` of one axis, it gives the `Rotation` that the
    attention layers take: once a network, not once a layer. Positions may be any numbers. Those of
    a NumPy array are turned into angles in float64.

    **Raises** `ValueError` for odd sizes and for another number of axes.

    >>> rotation = RoPE((4, 4))(np.array([[0, 0], [0, 1], [1, 0]]))
    >>> rotation(jnp.ones((3, 2, 8))).shape
    (3, 2, 8)
    """

    sizes: tuple[int, ...]
    theta: float = 10_000.0
    halves: bool = False

    def __post_init__(self):
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if not self.sizes or any(size < 2 or size % 2 for size in self.sizes):
            raise ValueError(f"RoPE: sizes must be even and at least 2, got {self.sizes}.")

    def __call__(
        self,
        positions: Num[Array, "n axes"]
        | Num[Array, " n"]
        | Shaped[np.ndarray, "n axes"]
        | Shaped[np.ndarray, " n"],
    ) -> Rotation:
        positions = positions[:, None] if positions.ndim == 1 else positions
        if positions.shape[1] != len(self.sizes):
            raise ValueError(
                f"RoPE: positions must have {len(self.sizes)} axes, as sizes {self.sizes} have, "
                f"got {positions.shape[1]}."
            )
        on_host = isinstance(positions, np.ndarray)
        number = np.float64 if on_host else jnp.float32
        parts = []
        for axis, size in enumerate(self.sizes):
            frequencies = self.theta ** -(np.arange(0, size, 2) / size)
            parts.append(positions[:, axis, None].astype(number) * frequencies.astype(number))
        if on_host:
            angles = np.concatenate(parts, axis=-1)
            table = lambda f: jnp.asarray(f(angles), jnp.float32)
            return Rotation(table(np.cos), table(np.sin), self.halves)
        angles = jnp.concatenate(parts, axis=-1)
        return Rotation(jnp.cos(angles), jnp.sin(angles), self.halves)


def grid_positions(grid: tuple[int, ...]) -> Float[np.ndarray, "n axes"]:
    """The positions of the cells of a grid, the last axis fastest: what `patchify` orders.

    >>> grid_positions((2, 2)).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    axes = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    return np.stack([axis.reshape(-1) for axis in axes], axis=-1).astype(np.float64)
