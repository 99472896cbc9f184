"""Convolutions and resampling of clips, `(frames, h, w, c)`, that never look ahead in time.

The first frame stands alone, so that one image is a clip: `1 + 4 k` frames become `1 + k` when time
is halved twice, and each group of four is seen by its own latent frame and by later ones.
"""

import math
from collections import deque
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..sharding import gather_params
from .constraints import replicate_activation
from .conv import Conv, upsample_nearest
from .norms import RMSNorm

SMALLEST = 1e-12  # what the norms add to a mean square: nothing but at a vector of zeros


class FrameCache:
    """The earlier frames that causal layers need while a clip goes through them in chunks.

    The first chunk is the first frame alone, the others are as long as the network's time
    compression or a multiple of it. One cache serves one chunk: it begins with the `frames` that
    the layers kept at the chunk before, and ends with those for the next. Layers take and keep in
    the order in which they are called, which is the same for all chunks.

    Not a PyTree: make it inside of what is traced, and carry `frames`, a list of arrays.

    >>> conv = CausalConv3d(1, 1, 3, key=jax.random.key(0))
    >>> x, cache = jnp.ones((5, 2, 2, 1)), FrameCache()
    >>> first = conv(x[:1], cache)
    >>> rest = conv(x[1:], FrameCache(cache.frames))
    >>> bool(jnp.allclose(jnp.concatenate([first, rest]), conv(x), atol=1e-6))
    True
    """

    def __init__(self, frames: Sequence[Array] | None = None):
        self.first = frames is None
        self.frames: list[Array] = []
        self._before = deque(frames or ())

    def take(self) -> Array:
        """What the layer that calls has kept at the chunk before."""
        return self._before.popleft()

    def keep(self, frames: Array) -> None:
        """Stores what the layer that calls will take at the next chunk."""
        self.frames.append(frames)


class CausalConv3d(eqx.Module):
    """A 3-D convolution of a clip whose output frame `t` sees the input frames up to `t` alone.

    `y[t] = b + sum_k conv2d(x[t + k - (time - 1)], w[k])`, with zeros for the frames before the
    first, and zeros around each frame so that its size stays (van den Oord et al. 2016; Yu et al.
    2024, section 3).

    **Arguments**: `size` is the kernel's side, odd, in space; `time` its length, by default `size`.
    Weights start as those of `Conv`, with `gain`. Called with a `FrameCache`, the frames before
    are those of the chunk before.

    >>> CausalConv3d(3, 8, 3, key=jax.random.key(0))(jnp.ones((5, 4, 4, 3))).shape
    (5, 4, 4, 8)
    """

    weight: Float[Array, "time size size in out"]
    bias: Float[Array, " out"]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        time: int | None = None,
        gain: float = 1.0,
        key,
    ):
        time = size if time is None else time
        bound = gain * math.sqrt(3 / (time * size * size * in_channels))
        shape = (time, size, size, in_channels, out_channels)
        self.weight = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        self.bias = jnp.zeros(out_channels)

    def __call__(
        self, x: Float[Array, "t h w in"], cache: FrameCache | None = None
    ) -> Float[Array, "t h w out"]:
        before = len(self.weight) - 1
        if before and (cache is None or cache.first):
            x = jnp.pad(x, ((before, 0), *3 * [(0, 0)]))
        elif before and cache is not None:
            x = jnp.concatenate([cache.take().astype(x.dtype), x])
        if before and cache is not None:
            cache.keep(x[-before:])
        return self.valid(x)

    def valid(self, x: Float[Array, "n h w in"], *, stride: int = 1) -> Float[Array, "t h w out"]:
        """Without padding in time, every `stride`-th frame: `t = (n - time) // stride + 1`.

        >>> CausalConv3d(1, 1, 1, time=3, key=jax.random.key(0)).valid(jnp.ones((5, 2, 2, 1)),
        ...     stride=2).shape
        (2, 2, 2, 1)
        """
        weight = gather_params(self, x.dtype).weight
        given = x, weight
        if weight.shape[:3] == (1, 1, 1) and stride == 1:
            y = x @ weight[0, 0, 0]
        else:
            cpu = lambda x, w: _on_cpu(x, w, stride)
            default = lambda x, w: _convolve(x, w, stride)
            y = jax.lax.platform_dependent(*given, cpu=cpu, default=default)
        return y + self.bias.astype(y.dtype)


def _convolve(x: Array, weight: Array, stride: int) -> Array:
    side = weight.shape[1] // 2
    y = jax.lax.conv_general_dilated(
        x[None],
        weight,
        (stride, 1, 1),
        ((0, 0), (side, side), (side, side)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    return y[0]


def _on_cpu(x: Array, weight: Array, stride: int) -> Array:
    """The frames that one output sees, as channels of one image: XLA:CPU is three to four times as
    fast with a 2-D convolution, gradients included."""
    time, side = len(weight), weight.shape[1] // 2
    count = (len(x) - time) // stride + 1
    frames = [x[k : k + (count - 1) * stride + 1 : stride] for k in range(time)]
    flat = jnp.concatenate(frames, axis=-1)
    kernel = jnp.concatenate(list(weight), axis=2)
    if side == 0:
        return flat @ kernel[0, 0]
    return jax.lax.conv_general_dilated(
        flat, kernel, (1, 1), ((side, side),) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class TimeDownsample(eqx.Module):
    """Half as many frames, but for the first, which stays: `1 + 2 k` become `1 + k`.

    `y = [x_0, conv(x_0, x_1, x_2), conv(x_2, x_3, x_4), ...]`, a convolution over time alone.

    >>> TimeDownsample(2, key=jax.random.key(0))(jnp.ones((5, 4, 4, 2))).shape
    (3, 4, 4, 2)
    """

    conv: CausalConv3d

    def __init__(self, channels: int, *, key):
        self.conv = CausalConv3d(channels, channels, 1, time=3, key=key)

    def __call__(
        self, x: Float[Array, "n h w c"], cache: FrameCache | None = None
    ) -> Float[Array, "t h w c"]:
        if cache is None:
            rest = [self.conv.valid(x, stride=2)] if len(x) > 1 else []
            return jnp.concatenate([x[:1], *rest])
        before = None if cache.first else cache.take()
        cache.keep(x[-1:])
        if before is None:
            return x
        return self.conv.valid(jnp.concatenate([before, x]), stride=2)


class TimeUpsample(eqx.Module):
    """Twice as many frames, but for the first, which stays: `1 + k` become `1 + 2 k`.

    A causal convolution over time makes two frames of each but the first, and does not see the
    first (what Wan 2.1's decoder computes with its cache).

    >>> TimeUpsample(2, key=jax.random.key(0))(jnp.ones((3, 4, 4, 2))).shape
    (5, 4, 4, 2)
    """

    conv: CausalConv3d

    def __init__(self, channels: int, *, key):
        self.conv = CausalConv3d(channels, 2 * channels, 1, time=3, key=key)

    def __call__(
        self, x: Float[Array, "n h w c"], cache: FrameCache | None = None
    ) -> Float[Array, "t h w c"]:
        if cache is None:
            rest = [_pairs(self.conv(x[1:]))] if len(x) > 1 else []
            return jnp.concatenate([x[:1], *rest])
        if cache.first:
            cache.keep(jnp.zeros((2, *x.shape[1:]), x.dtype))
            return x
        return _pairs(self.conv(x, cache))


def _pairs(x: Float[Array, "n h w C"]) -> Float[Array, "t h w c"]:
    """The halves of the channels become two frames."""
    n, h, w, c = x.shape
    return x.reshape(n, h, w, 2, c // 2).transpose(0, 3, 1, 2, 4).reshape(2 * n, h, w, c // 2)


class ClipDownsample(eqx.Module):
    """Half the side of every frame by a 3 x 3 convolution; with `time` half the frames, too.

    >>> ClipDownsample(2, time=True, key=jax.random.key(0))(jnp.ones((5, 4, 4, 2))).shape
    (3, 2, 2, 2)
    """

    resample: Conv
    time: TimeDownsample | None

    def __init__(self, channels: int, *, time: bool = False, key):
        k1, k2 = jax.random.split(key)
        # Padding only below and right, as in the published autoencoders of images.
        padding = ((0, 1), (0, 1))
        self.resample = Conv(channels, channels, 3, stride=2, padding=padding, key=k1)
        self.time = TimeDownsample(channels, key=k2) if time else None

    def __call__(
        self, x: Float[Array, "n h w c"], cache: FrameCache | None = None
    ) -> Float[Array, "t h2 w2 c"]:
        x = jax.vmap(self.resample)(x)
        return x if self.time is None else self.time(x, cache)


class ClipUpsample(eqx.Module):
    """Twice the side of every frame, and with `time` twice the frames before that.

    Pixels are repeated, and a 3 x 3 convolution gives `out_channels`.

    >>> ClipUpsample(4, 2, time=True, key=jax.random.key(0))(jnp.ones((3, 2, 2, 4))).shape
    (5, 4, 4, 2)
    """

    resample: Conv
    time: TimeUpsample | None

    def __init__(self, in_channels: int, out_channels: int, *, time: bool = False, key):
        k1, k2 = jax.random.split(key)
        self.resample = Conv(in_channels, out_channels, 3, key=k1)
        self.time = TimeUpsample(in_channels, key=k2) if time else None

    def __call__(
        self, x: Float[Array, "n h w c"], cache: FrameCache | None = None
    ) -> Float[Array, "t h2 w2 c2"]:
        x = x if self.time is None else self.time(x, cache)
        return jax.vmap(lambda frame: self.resample(upsample_nearest(frame)))(x)


class CausalResnetBlock(eqx.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))` of a clip, its convolutions causal.

    The norms are of each pixel's channels (`RMSNorm`), so that no frame sees another there. A
    1 x 1 x 1 convolution is the shortcut where widths differ; the second convolution starts small
    (`gain`).

    >>> CausalResnetBlock(4, 8, key=jax.random.key(0))(jnp.ones((5, 4, 4, 4))).shape
    (5, 4, 4, 8)
    """

    norm1: RMSNorm
    conv1: CausalConv3d
    norm2: RMSNorm
    conv2: CausalConv3d
    shortcut: CausalConv3d | None

    def __init__(self, in_channels: int, out_channels: int, *, gain: float = 0.1, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.norm1 = RMSNorm(in_channels, SMALLEST)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, key=k1)
        self.norm2 = RMSNorm(out_channels, SMALLEST)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, gain=gain, key=k2)
        same = in_channels == out_channels
        self.shortcut = None if same else CausalConv3d(in_channels, out_channels, 1, key=k3)

    def __call__(
        self, x: Float[Array, "t h w c"], cache: FrameCache | None = None
    ) -> Float[Array, "t h w c2"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)), cache)
        y = self.conv2(jax.nn.silu(self.norm2(y)), cache)
        return replicate_activation(y + (x if self.shortcut is None else self.shortcut(x)))


def average_down(
    x: Float[Array, "n H W c"], out_channels: int, time: int, space: int
) -> Float[Array, "t h w out"]:
    """A clip at a lower resolution without parameters: means over cells and groups of channels.

    The numbers of a cell of `time x space x space` are channels, in the order `(c, time, row,
    column)`, and each of `out_channels` is the mean of as many that follow each other. A clip whose
    frames do not divide has zeros before it. The shortcut around a level of Wan 2.2's encoder.

    **Raises** `ValueError` if `c time space^2` does not divide by `out_channels`.

    >>> average_down(jnp.ones((5, 4, 4, 2)), 2, 2, 2)[:, 0, 0, 0].tolist()
    [0.5, 1.0, 1.0]
    """
    x = jnp.pad(x, ((-len(x) % time, 0), *3 * [(0, 0)]))
    n, h, w, c = x.shape
    if c * time * space * space % out_channels:
        raise ValueError(
            f"average_down: {c * time * space * space} numbers in a cell do not divide into "
            f"{out_channels} channels."
        )
    cells = x.reshape(n // time, time, h // space, space, w // space, space, c)
    cells = cells.transpose(0, 2, 4, 6, 1, 3, 5)
    return cells.reshape(*cells.shape[:3], out_channels, -1).mean(-1)


def repeat_up(
    x: Float[Array, "n h w c"], out_channels: int, time: int, space: int, *, first: bool = True
) -> Float[Array, "t H W out"]:
    """A clip at a higher resolution without parameters: channels repeated and laid out as a cell.

    The mirror of `average_down`, around a level of Wan 2.2's decoder. Of a clip that begins with
    the `first` frame, that frame stays one.

    **Raises** `ValueError` if `out_channels time space^2` does not divide by `c`.

    >>> repeat_up(jnp.ones((3, 2, 2, 4)), 2, 2, 2).shape
    (5, 4, 4, 2)
    """
    n, h, w, c = x.shape
    inside = out_channels * time * space * space
    if inside % c:
        raise ValueError(f"repeat_up: {inside} numbers in a cell are no multiple of {c} channels.")
    cells = jnp.repeat(x, inside // c, axis=-1)
    cells = cells.reshape(n, h, w, out_channels, time, space, space).transpose(0, 4, 1, 5, 2, 6, 3)
    y = cells.reshape(n * time, h * space, w * space, out_channels)
    return y[time - 1 :] if first else y
