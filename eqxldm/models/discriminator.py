"""PatchGAN: a discriminator that judges overlapping patches (Isola et al. 2017)."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..nn.conv import Conv
from ..nn.norms import GroupNorm


class PatchDiscriminator(eqx.Module):
    """Image `(c, h, w)` to a map of logits `(h', w')`, one a patch, real above and fake below 0.

    `layers` stride-2 convolutions 4 x 4 with leaky ReLU 0.2, their width doubling from `channels`
    up to 8 times, then one of stride 1 and one to a single channel. The receptive field is 70
    pixels for 3 layers, 34 for 2, 16 for 1. Norms are GroupNorm and not BatchNorm, so that an
    image's logits do not depend on the batch it is in.

    >>> disc = PatchDiscriminator(3, channels=8, layers=2, groups=4, key=jax.random.key(0))
    >>> disc(jnp.zeros((3, 32, 32))).shape
    (6, 6)
    """

    convs: list[Conv]
    norms: list[GroupNorm]
    head: Conv

    def __init__(
        self, in_channels: int, *, channels: int = 64, layers: int = 3, groups: int = 32, key
    ):
        if layers < 1:
            raise ValueError(f"PatchDiscriminator: layers must be at least 1, got {layers}.")
        keys = jax.random.split(key, layers + 2)
        pad = ((1, 1), (1, 1))
        self.convs = [Conv(in_channels, channels, 4, stride=2, padding=pad, key=keys[0])]
        self.norms = []
        width = channels
        for i in range(1, layers + 1):
            out = channels * min(2**i, 8)
            step = 2 if i < layers else 1
            self.convs.append(Conv(width, out, 4, stride=step, padding=pad, key=keys[i]))
            self.norms.append(GroupNorm(out, groups))
            width = out
        self.head = Conv(width, 1, 4, padding=pad, key=keys[-1])

    def __call__(self, x: Float[Array, "c h w"]) -> Float[Array, "h2 w2"]:
        y = jax.nn.leaky_relu(self.convs[0](jnp.moveaxis(x, 0, -1)), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            y = jax.nn.leaky_relu(norm(conv(y)), 0.2)
        return self.head(y)[..., 0]
