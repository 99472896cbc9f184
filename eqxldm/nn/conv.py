"""Convolutions and resampling, channels-last inside the network: `(h, w, c)`."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..sharding import gather_params

NO_PADDING = ((0, 0), (0, 0))


class Conv(eqx.Module):
    """A 2-D convolution of one channels-last image with zero padding.

    `y[i, j, o] = b[o] + sum_{p, q, c} w[p, q, c, o] x[s i + p - pad, s j + q - pad, c]`.

    **Arguments**: `size` is the kernel's side, `stride` the step. `padding` is `((top, bottom),
    (left, right))`; the default keeps `h / stride`. Weights are `U(-a, a)`, `a =
    sqrt(3 / fan_in)` times `gain`, so that a unit-variance input gives a variance of `gain^2`.
    Without `use_bias`, `b` is None.

    >>> Conv(3, 8, 3, stride=2, key=jax.random.key(0))(jnp.ones((4, 4, 3))).shape
    (2, 2, 8)
    """

    weight: Float[Array, "size size in out"]
    bias: Float[Array, " out"] | None
    stride: int = eqx.field(static=True)
    padding: tuple[tuple[int, int], tuple[int, int]] = eqx.field(static=True)

    def __init__(
        self,
        in_channels,
        out_channels,
        size,
        *,
        stride=1,
        padding=None,
        gain=1.0,
        use_bias=True,
        key,
    ):
        bound = gain * math.sqrt(3 / (size * size * in_channels))
        shape = (size, size, in_channels, out_channels)
        self.weight = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        self.bias = jnp.zeros(out_channels) if use_bias else None
        self.stride = stride
        total = size - stride if size > stride else 0
        side = (total // 2, total - total // 2)
        self.padding = (side, side) if padding is None else padding

    def __call__(self, x: Float[Array, "h w in"]) -> Float[Array, "h2 w2 out"]:
        weight = gather_params(self, x.dtype).weight
        # A product, which XLA:CPU does two to three times as fast, gradients included.
        if weight.shape[:2] == (1, 1) and self.stride == 1 and self.padding == NO_PADDING:
            return self._with_bias(x @ weight[0, 0])
        y = jax.lax.conv_general_dilated(
            x[None],
            weight,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return self._with_bias(y[0])

    def _with_bias(self, y: Float[Array, "h w out"]) -> Float[Array, "h w out"]:
        return y if self.bias is None else y + self.bias.astype(y.dtype)


class ConvPair(eqx.Module):
    """`second(first(x))`: two convolutions with nothing between them.

    >>> k1, k2 = jax.random.split(jax.random.key(0))
    >>> ConvPair(Conv(3, 8, 3, key=k1), Conv(8, 2, 1, key=k2))(jnp.ones((4, 4, 3))).shape
    (4, 4, 2)
    """

    first: Conv
    second: Conv

    def __call__(self, x: Float[Array, "h w in"]) -> Float[Array, "h2 w2 out"]:
        return self.second(self.first(x))


def max_pool(
    x: Float[Array, "h w c"], size: int, stride: int, pad: int = 0
) -> Float[Array, "h2 w2 c"]:
    """The largest of each `size x size`, by steps of `stride`, with `pad` on each side.

    >>> max_pool(jnp.ones((5, 7, 1)), 3, 2).shape
    (2, 3, 1)
    """
    sides = ((pad, pad), (pad, pad), (0, 0))
    window, strides = (size, size, 1), (stride, stride, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, sides)


def space_to_depth(x: Float[Array, "H W c"], factor: int) -> Float[Array, "h w C"]:
    """Folds each `factor x factor` square into channels; `depth_to_space` inverts it.

    >>> space_to_depth(jnp.ones((4, 4, 3)), 2).shape
    (2, 2, 12)
    """
    h, w, c = x.shape
    if h % factor or w % factor:
        raise ValueError(f"space_to_depth: {h} x {w} does not divide by {factor}.")
    x = x.reshape(h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 2, 1, 3, 4).reshape(h // factor, w // factor, factor * factor * c)


def depth_to_space(x: Float[Array, "h w C"], factor: int) -> Float[Array, "H W c"]:
    """Unfolds channels into `factor x factor` squares; `space_to_depth` inverts it.

    >>> depth_to_space(jnp.ones((2, 2, 12)), 2).shape
    (4, 4, 3)
    """
    h, w, c = x.shape
    if c % (factor * factor):
        raise ValueError(f"depth_to_space: {c} channels do not divide by {factor * factor}.")
    x = x.reshape(h, w, factor, factor, c // (factor * factor))
    return x.transpose(0, 2, 1, 3, 4).reshape(h * factor, w * factor, -1)


def upsample_nearest(x: Float[Array, "h w c"]) -> Float[Array, "H W c"]:
    """Repeats every pixel 2 x 2.

    >>> upsample_nearest(jnp.ones((2, 3, 1))).shape
    (4, 6, 1)
    """
    h, w, c = x.shape
    return jnp.broadcast_to(x[:, None, :, None], (h, 2, w, 2, c)).reshape(2 * h, 2 * w, c)
