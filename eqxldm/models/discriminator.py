"""PatchGAN: a discriminator that judges overlapping patches (Isola et al. 2017)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..nn.conv import Conv
from ..nn.norms import GroupNorm
from .config import arguments, make_record


def patch_layers(height: int, width: int) -> int:
    """The depth for an image size: the deepest up to 3 whose patches fit into the image.

    A patch is `9 * 2^layers - 2` pixels wide: 70 for 3 layers, 34 for 2, 16 for 1. What fits leaves
    at least 6 x 6 logits.

    **Raises** `ValueError` for images under 16 pixels; give their `layers` yourself.

    >>> patch_layers(256, 256), patch_layers(64, 96), patch_layers(28, 28)
    (3, 2, 1)
    """
    fitting = [layers for layers in (3, 2, 1) if 9 * 2**layers - 2 <= min(height, width)]
    if not fitting:
        raise ValueError(
            f"patch_layers: the smallest patch has 16 x 16 pixels and does not fit into a {height} "
            f"x {width} image. Enlarge it, or pass layers=1: its patches reach over the border."
        )
    return fitting[0]


@dataclass(frozen=True)
class DiscriminatorConfig:
    """How a `PatchDiscriminator` was made: the arguments of its constructor, explained there.

    >>> config = DiscriminatorConfig(3, channels=8, layers=1, groups=4)
    >>> config.build(key=jax.random.key(0)).config == config
    True
    """

    in_channels: int
    channels: int = 64
    layers: int = 3
    groups: int = 32
    norm: Callable[[int], Any] | None = None
    conv: Callable[..., Any] = Conv

    def build(self, *, key) -> "PatchDiscriminator":
        """The discriminator, with random weights."""
        return PatchDiscriminator(**arguments(self), key=key)


class PatchDiscriminator(eqx.Module):
    """Image `(c, h, w)` to a map of logits `(h', w')`, one a patch, real above and fake below 0.

    `layers` stride-2 convolutions 4 x 4 with leaky ReLU 0.2, their width doubling from `channels`
    up to 8 times, then one of stride 1 and one to a single channel. The receptive field is 70
    pixels for 3 layers, 34 for 2, 16 for 1, and `h' = h // 2^layers - 2`. Norms are GroupNorm and
    not BatchNorm, so that an image's logits do not depend on the batch it is in.

    **Arguments**:

    - `layers`: None takes `patch_layers(*image_size)`; `image_size` is not needed otherwise.
    - `norm`: makes a norm from a channel count, after every convolution but the first and last;
      None is `GroupNorm` with `groups`.
    - `conv`: makes a convolution. `conv=nn.SpectralConv, norm=equinox.nn.Identity` is the
      spectrally normalised discriminator (Miyato et al. 2018).

    >>> disc = PatchDiscriminator(3, channels=8, layers=2, groups=4, key=jax.random.key(0))
    >>> disc(jnp.zeros((3, 32, 32))).shape
    (6, 6)
    """

    convs: list[Any]
    norms: list[Any]
    head: Any
    config: DiscriminatorConfig = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        *,
        channels: int = 64,
        layers: int | None = 3,
        image_size: tuple[int, int] | None = None,
        groups: int = 32,
        norm: Callable[[int], Any] | None = None,
        conv: Callable[..., Any] = Conv,
        key,
    ):
        if layers is None:
            if image_size is None:
                raise ValueError(
                    "PatchDiscriminator: layers=None chooses the depth from the image; pass its "
                    "size as image_size=(height, width), or the number of layers."
                )
            layers = patch_layers(*image_size)
        if layers < 1:
            raise ValueError(f"PatchDiscriminator: layers must be at least 1, got {layers}.")
        sizes = dict(in_channels=in_channels, channels=channels, layers=layers, groups=groups)
        sizes |= dict(norm=norm, conv=conv)
        self.config = make_record(DiscriminatorConfig, "PatchDiscriminator", sizes)
        make_norm = norm or (lambda width: GroupNorm(width, groups))
        keys = jax.random.split(key, layers + 2)
        pad = ((1, 1), (1, 1))
        self.convs = [conv(in_channels, channels, 4, stride=2, padding=pad, key=keys[0])]
        self.norms = []
        width = channels
        for i in range(1, layers + 1):
            out = channels * min(2**i, 8)
            step = 2 if i < layers else 1
            self.convs.append(conv(width, out, 4, stride=step, padding=pad, key=keys[i]))
            self.norms.append(make_norm(out))
            width = out
        self.head = conv(width, 1, 4, padding=pad, key=keys[-1])

    def __call__(self, x: Float[Array, "c h w"]) -> Float[Array, "h2 w2"]:
        y = jax.nn.leaky_relu(self.convs[0](jnp.moveaxis(x, 0, -1)), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            y = jax.nn.leaky_relu(norm(conv(y)), 0.2)
        return self.head(y)[..., 0]
