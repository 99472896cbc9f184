"""Normalisation layers; statistics are always float32."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def layer_norm(x: Float[Array, "*leading d"], norm_eps: float = 1e-6) -> Float[Array, "*leading d"]:
    """`(x - mean) / sqrt(var + norm_eps)` over the last axis, without affine parameters.

    >>> layer_norm(jnp.array([1.0, 3.0]))
    Array([-0.9999995,  0.9999995], dtype=float32)
    """
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, -1, keepdims=True)
    centred = x32 - mean
    if x.dtype.itemsize < 4:
        # One pass. E[x^2] - mean^2 cancels, but x was rounded sixteen bits earlier: before the
        # variance has an error that shows, x itself has a larger one.
        variance = jnp.maximum(jnp.mean(x32 * x32, -1, keepdims=True) - mean * mean, 0.0)
    else:
        variance = jnp.mean(centred * centred, -1, keepdims=True)
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
        normed = layer_norm(x.astype(jnp.float32), self.norm_eps)
        return (normed * self.scale + self.bias).astype(x.dtype)


class GroupNorm(eqx.Module):
    """Normalises over space and groups of channels (Wu & He 2018), with affine parameters.

    **Arguments**: `groups` must divide `channels`; `norm_eps` is added to the variance.
    The input is channels-last, `(h, w, c)`.

    The sums are taken per channel first and per group afterwards: XLA:CPU reduces a
    contiguous axis several times faster than a reshaped one. To keep the one-pass variance
    from cancelling, the mean is subtracted before squaring.

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
        x32 = x.astype(jnp.float32)
        x32 = x32 - self._per_group(jnp.mean(x32, (0, 1)))
        variance = self._per_group(jnp.mean(x32 * x32, (0, 1)))
        scale = jax.lax.rsqrt(variance + self.norm_eps) * self.scale
        return (x32 * scale + self.bias).astype(x.dtype)

    def _per_group(self, per_channel: Float[Array, " c"]) -> Float[Array, " c"]:
        means = jnp.mean(per_channel.reshape(self.groups, -1), -1)
        return jnp.repeat(means, per_channel.size // self.groups)
