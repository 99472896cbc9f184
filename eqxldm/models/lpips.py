"""LPIPS: how different two images look, by the features of a VGG16 (Zhang et al. 2018)."""

import math
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..nn.conv import Conv
from .config import arguments, make_record

# The convolutions of each block of VGG16; a block's last ReLU is compared, and pooled for the next.
BLOCKS = (2, 2, 3, 3, 3)
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
        _check(x.shape)
        # One after the other: where only one image needs a gradient, the other makes none.
        pairs = zip(self.heads, self.features(x), self.features(y), strict=True)
        distances = [jnp.sum(w * jnp.mean((_unit(f) - _unit(g)) ** 2, (0, 1))) for w, f, g in pairs]
        return jnp.sum(jnp.stack(distances))

    def features(self, x: Float[Array, "c h w"]) -> list[Float[Array, "hi wi ci"]]:
        """What is compared: the five last ReLUs, channels last.

        >>> lpips = LPIPS(channels=(4, 4, 4, 4, 8), key=jax.random.key(0))
        >>> lpips.features(jnp.zeros((3, 16, 32)))[-1].shape
        (1, 2, 8)
        """
        _check(x.shape)
        x32 = jnp.moveaxis(x, 0, -1).astype(jnp.float32)
        y = ((x32 - jnp.array(SHIFT)) / jnp.array(SCALE)).astype(x.dtype)
        found = []
        for block in self.blocks:
            y = _max_pool(y) if found else y
            for conv in block:
                y = jax.nn.relu(conv(y))
            found.append(y)
        return found


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


def _check(shape: tuple[int, ...]) -> None:
    c, h, w = shape
    if c != 3:
        hint = " Repeat a grey image: jnp.repeat(x, 3, axis=0)." if c == 1 else ""
        raise ValueError(f"LPIPS: an image needs 3 channels, red, green and blue, got {c}.{hint}")
    smallest = 2 ** (len(BLOCKS) - 1)
    if min(h, w) < smallest:
        raise ValueError(
            f"LPIPS: of a {h} x {w} image its four poolings leave nothing; at least {smallest} x "
            f"{smallest} are needed. Enlarge it, by jax.image.resize for example."
        )
