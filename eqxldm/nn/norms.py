"""Normalisation layers; statistics are always float32."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .constraints import fusion_barrier
from .dtypes import at_least_float32


def layer_norm(x: Float[Array, "*leading d"], norm_eps: float = 1e-6) -> Float[Array, "*leading d"]:
    """`(x - mean) / sqrt(var + norm_eps)` over the last axis, without affine parameters.

    >>> layer_norm(jnp.array([1.0, 3.0])).round(4)
    Array([-1.,  1.], dtype=float32)
    """
    centred, variance = _centre(x, lambda values: jnp.mean(values, -1, keepdims=True))
    return (centred * jax.lax.rsqrt(variance + norm_eps)).astype(x.dtype)


class LayerNorm(eqx.Module):
    """`scale layer_norm(x) + bias`: with affine parameters (Ba et al. 2016).

    >>> LayerNorm(2)(jnp.array([1.0, 3.0])).shape
    (2,)
    """

    scale: Float[Array, " d"]
    bias: Float[Array, " d"]
    norm_eps: float = eqx.field(static=True)

    def __init__(self, size: int, norm_eps: float = 1e-5):
        self.scale = jnp.ones(size)
        self.bias = jnp.zeros(size)
        self.norm_eps = norm_eps

    def __call__(self, x: Float[Array, "*leading d"]) -> Float[Array, "*leading d"]:
        normed = layer_norm(x.astype(at_least_float32(x.dtype)), self.norm_eps)
        return (normed * self.scale + self.bias).astype(x.dtype)


class RMSNorm(eqx.Module):
    """`scale x / sqrt(mean(x^2) + norm_eps)` over the last axis (Zhang & Sennrich 2019).

    `scale` is learned and starts at 1; the statistics are float32. As `qk_norm` of the attention
    it bounds the scores, which otherwise grow in long bfloat16 runs (Dehghani et al. 2023).

    >>> RMSNorm(2)(jnp.array([3.0, 3.0]))
    Array([0.99999994, 0.99999994], dtype=float32)
    """

    scale: Float[Array, " d"]
    norm_eps: float = eqx.field(static=True)

    def __init__(self, size: int, norm_eps: float = 1e-6):
        self.scale = jnp.ones(size)
        self.norm_eps = norm_eps

    def __call__(self, x: Float[Array, "*leading d"]) -> Float[Array, "*leading d"]:
        x32 = x.astype(at_least_float32(x.dtype))
        mean_square = jnp.mean(x32 * x32, -1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean_square + self.norm_eps) * self.scale).astype(x.dtype)


class GroupNorm(eqx.Module):
    """Normalises over space and groups of channels (Wu & He 2018), with affine parameters.

    **Arguments**: `groups` must divide `channels`; `norm_eps` is added to the variance.
    The input is channels-last, `(h, w, c)`.

    The sums are taken per channel first and per group afterwards: XLA:CPU reduces a
    contiguous axis several times faster than a reshaped one.

    >>> GroupNorm(8, groups=4)(jnp.ones((2, 2, 8))).shape
    (2, 2, 8)
    """

    scale: Float[Array, " c"]
    bias: Float[Array, " c"]
    groups: int = eqx.field(static=True)
    norm_eps: float = eqx.field(static=True)

    def __init__(self, channels: int, groups: int = 32, norm_eps: float = 1e-6):
        if groups < 1 or channels % groups:
            raise ValueError(
                f"GroupNorm: {channels} channels do not divide into {groups} groups; choose a "
                f"`groups` that divides every width."
            )
        self.scale = jnp.ones(channels)
        self.bias = jnp.zeros(channels)
        self.groups = groups
        self.norm_eps = norm_eps

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        # A TPU's compiler otherwise fuses a convolution with the norm after it, which takes long to
        # compile and runs slower (docs/scaling.md).
        centred, variance = _centre(fusion_barrier(x), self._mean)
        scale = jax.lax.rsqrt(variance + self.norm_eps) * self.scale
        return (centred * scale + self.bias).astype(x.dtype)

    def _mean(self, x: Float[Array, "h w c"]) -> Float[Array, " c"]:
        """Each channel's mean over space and its group."""
        means = jnp.mean(jnp.mean(x, (0, 1)).reshape(self.groups, -1), -1)
        return jnp.repeat(means, x.shape[-1] // self.groups)


def _centre(x: Array, mean: Callable[[Array], Array]) -> tuple[Array, Array]:
    """`x - mean(x)` in float32, and the variance.

    Two passes over float32, one over what is shorter: `mean(x^2) - mean(x)^2` cancels, but `x` was
    rounded sixteen bits earlier, so before the variance has an error that shows, `x` has a larger.
    """
    x32 = x.astype(at_least_float32(x.dtype))
    centre = mean(x32)
    centred = x32 - centre
    if x.dtype.itemsize < 4:
        return centred, jnp.maximum(mean(x32 * x32) - centre * centre, 0.0)
    return centred, mean(centred * centred)
