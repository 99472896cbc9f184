"""LPIPS: how different two images look to a VGG16 or an AlexNet (Zhang et al. 2018)."""

import math
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..nn.conv import Conv, max_pool
from .config import arguments, make_record

# The convolutions of each block of VGG16; a block's last ReLU is compared, and pooled for the next.
BLOCKS = (2, 2, 3, 3, 3)
# The kernels of AlexNet and the steps by which they go.
ALEX_KERNELS = ((11, 4), (5, 1), (3, 1), (3, 1), (3, 1))
# Mean and standard deviation of ImageNet's channels, in the range [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class LPIPSConfig:
    """How an `LPIPS` was made: the widths of its five blocks.

    >>> LPIPSConfig().channels
    (64, 128, 256, 512, 512)
    """

    channels: tuple[int, ...] = (64, 128, 256, 512, 512)

    def build(self, *, key) -> "LPIPS":
        """The network, with random weights."""
        return LPIPS(**arguments(self), key=key)


class LPIPS(eqx.Module):
    """The distance of two images `(3, h, w)` in [-1, 1] as seen by VGG16 (version 0.1).

    `d(x, y) = sum_l mean_ij sum_c w_l[c] (u_l(x) - u_l(y))[i, j, c]^2`, where `u_l` are the
    features after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, at each position divided by their
    norm over the channels: `u = f / sqrt(|f|^2 + 1e-10)` (Zhang et al. 2018, eq. 1).

    Symmetric, 0 at `x = y`, and not negative while the heads `w_l` are not. The gradient is finite
    everywhere: no square root is taken of 0. In bfloat16 the convolutions are; scaling, norms and
    sums are float32, and so is the distance.

    **Arguments**: `channels` are the widths of the five blocks; VGG16's have 14,716,160 parameters
    with the heads. A new one has random weights, and its distance means little:
    `eqxldm.pretrained.load_lpips` reads the published ones.

    **Raises** `ValueError` for images that have not three channels, or not 16 pixels a side.

    >>> lpips = LPIPS(channels=(4, 4, 4, 4, 4), key=jax.random.key(0))
    >>> x = jnp.zeros((3, 16, 16))
    >>> float(lpips(x, x)), bool(lpips(x, x + 0.5) > 0)
    (0.0, True)
    """

    blocks: list[list[Conv]]
    heads: list[Float[Array, " c"]]
    config: LPIPSConfig = eqx.field(static=True)

    def __init__(self, *, channels: tuple[int, ...] = LPIPSConfig.channels, key):
        if len(channels) != len(BLOCKS):
            raise ValueError(
                f"LPIPS: channels must be the widths of {len(BLOCKS)} blocks, got {channels}."
            )
        self.config = make_record(LPIPSConfig, "LPIPS", {"channels": channels})
        self.blocks, self.heads, width = [], [], 3
        for out, convs in zip(channels, BLOCKS, strict=True):
            key, head_key, *keys = jax.random.split(key, convs + 2)
            widths = (width,) + (out,) * (convs - 1)
            self.blocks.append(
                [
                    Conv(w, out, 3, gain=math.sqrt(2), key=k)
                    for w, k in zip(widths, keys, strict=True)
                ]
            )
            self.heads.append(jax.random.uniform(head_key, (out,), maxval=2 / out))
            width = out

    def __call__(self, x: Float[Array, "c h w"], y: Float[Array, "c h w"]) -> Float[Array, ""]:
        # One after the other: where only one image needs a gradient, the other makes none.
        return _compared(self.heads, self.features(x), self.features(y))

    def features(self, x: Float[Array, "c h w"]) -> list[Float[Array, "hi wi ci"]]:
        """What is compared: the five last ReLUs, channels last.

        >>> lpips = LPIPS(channels=(4, 4, 4, 4, 8), key=jax.random.key(0))
        >>> lpips.features(jnp.zeros((3, 16, 32)))[-1].shape
        (1, 2, 8)
        """
        _check("LPIPS", x.shape, 2 ** (len(BLOCKS) - 1), "four poolings")
        y, found = _normalised(x), []
        for block in self.blocks:
            y = _max_pool(y) if found else y
            for conv in block:
                y = jax.nn.relu(conv(y))
            found.append(y)
        return found


@dataclass(frozen=True)
class AlexLPIPSConfig:
    """How an `AlexLPIPS` was made: the widths of its five convolutions.

    >>> AlexLPIPSConfig().channels
    (64, 192, 384, 256, 256)
    """

    channels: tuple[int, ...] = (64, 192, 384, 256, 256)

    def build(self, *, key) -> "AlexLPIPS":
        """The network, with random weights."""
        return AlexLPIPS(**arguments(self), key=key)


class AlexLPIPS(eqx.Module):
    """LPIPS by an AlexNet: what distances are quoted by; `LPIPS`, by VGG16, is what is trained on.

    The same distance of the features after its five ReLUs. A sixth of the parameters, and the
    gradient of it makes worse pictures (Zhang et al. 2018, section 4).

    **Arguments**: `channels` are the widths; the published ones have 2,470,848 parameters with the
    heads. `eqxldm.pretrained.load_lpips_package` reads them.

    **Raises** `ValueError` for images that have not three channels, or not 31 pixels a side.

    >>> lpips = AlexLPIPS(channels=(4, 4, 4, 4, 4), key=jax.random.key(0))
    >>> x = jnp.zeros((3, 32, 32))
    >>> float(lpips(x, x)), bool(lpips(x, x + 0.5) > 0)
    (0.0, True)
    """

    convs: list[Conv]
    heads: list[Float[Array, " c"]]
    config: AlexLPIPSConfig = eqx.field(static=True)

    def __init__(self, *, channels: tuple[int, ...] = AlexLPIPSConfig.channels, key):
        if len(channels) != len(ALEX_KERNELS):
            raise ValueError(
                f"AlexLPIPS: channels must be the widths of {len(ALEX_KERNELS)} convolutions, got "
                f"{channels}."
            )
        self.config = make_record(AlexLPIPSConfig, "AlexLPIPS", {"channels": channels})
        self.convs, self.heads, width = [], [], 3
        for out, (size, stride) in zip(channels, ALEX_KERNELS, strict=True):
            key, head_key, k = jax.random.split(key, 3)
            sides = ((2, 2), (2, 2)) if stride > 1 else None
            options: dict[str, Any] = dict(stride=stride, padding=sides, gain=math.sqrt(2))
            self.convs.append(Conv(width, out, size, **options, key=k))
            self.heads.append(jax.random.uniform(head_key, (out,), maxval=2 / out))
            width = out

    def __call__(self, x: Float[Array, "c h w"], y: Float[Array, "c h w"]) -> Float[Array, ""]:
        return _compared(self.heads, self.features(x), self.features(y))

    def features(self, x: Float[Array, "c h w"]) -> list[Float[Array, "hi wi ci"]]:
        """What is compared: the five ReLUs, channels last.

        >>> lpips = AlexLPIPS(channels=(4, 4, 4, 4, 8), key=jax.random.key(0))
        >>> [f.shape for f in lpips.features(jnp.zeros((3, 64, 64)))][1:3]
        [(7, 7, 4), (3, 3, 4)]
        """
        _check("AlexLPIPS", x.shape, 31, "stride and two poolings")
        y, found = _normalised(x), []
        for i, conv in enumerate(self.convs):
            y = jax.nn.relu(conv(max_pool(y, 3, 2) if i in (1, 2) else y))
            found.append(y)
        return found


def _normalised(x: Float[Array, "c h w"]) -> Float[Array, "h w c"]:
    x32 = jnp.moveaxis(x, 0, -1).astype(jnp.float32)
    return ((x32 - jnp.array(SHIFT)) / jnp.array(SCALE)).astype(x.dtype)


def _compared(heads: list[Array], features: list[Array], others: list[Array]) -> Float[Array, ""]:
    pairs = zip(heads, features, others, strict=True)
    distances = [jnp.sum(w * jnp.mean((_unit(f) - _unit(g)) ** 2, (0, 1))) for w, f, g in pairs]
    return jnp.sum(jnp.stack(distances))


def _unit(f: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """`f / |f|`, and 0 at 0; the small number bounds the gradient where features vanish."""
    f32 = f.astype(jnp.float32)
    return f32 * jax.lax.rsqrt(jnp.sum(f32 * f32, -1, keepdims=True) + 1e-10)


def _max_pool(y: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c"]:
    """The largest of each 2 x 2; an odd last row or column is left out."""
    h, w, _ = y.shape
    y = y[: h // 2 * 2, : w // 2 * 2]
    rows = jnp.maximum(y[::2], y[1::2])
    return jnp.maximum(rows[:, ::2], rows[:, 1::2])


def _check(name: str, shape: tuple[int, ...], smallest: int, what: str) -> None:
    c, h, w = shape
    if c != 3:
        hint = " Repeat a grey image: jnp.repeat(x, 3, axis=0)." if c == 1 else ""
        raise ValueError(f"{name}: an image needs 3 channels, red, green and blue, got {c}.{hint}")
    if min(h, w) < smallest:
        raise ValueError(
            f"{name}: of a {h} x {w} image its {what} leave nothing; at least {smallest} x "
            f"{smallest} are needed. Enlarge it, by jax.image.resize for example."
        )
