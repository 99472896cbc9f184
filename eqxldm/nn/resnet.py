"""Residual and attention blocks of the convolutional networks."""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .attention import attend
from .conv import Conv
from .linear import Linear, zeros
from .norms import GroupNorm


class ResnetBlock(eqx.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`, with a 1 x 1 shortcut where widths differ.

    The second convolution starts small, so that a deep stack starts near the identity.

    >>> import jax.numpy as jnp
    >>> ResnetBlock(8, 16, groups=4, key=jax.random.key(0))(jnp.ones((4, 4, 8))).shape
    (4, 4, 16)
    """

    norm1: GroupNorm
    conv1: Conv
    norm2: GroupNorm
    conv2: Conv
    shortcut: Conv | None

    def __init__(self, in_channels: int, out_channels: int, *, groups: int = 32, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.norm1 = GroupNorm(in_channels, groups)
        self.conv1 = Conv(in_channels, out_channels, 3, key=k1)
        self.norm2 = GroupNorm(out_channels, groups)
        self.conv2 = Conv(out_channels, out_channels, 3, gain=0.1, key=k2)
        same = in_channels == out_channels
        self.shortcut = None if same else Conv(in_channels, out_channels, 1, key=k3)

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c2"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(eqx.Module):
    """Single-head self-attention over all positions of a feature map, with a residual.

    >>> import jax.numpy as jnp
    >>> AttentionBlock(8, groups=4, key=jax.random.key(0))(jnp.ones((4, 4, 8))).shape
    (4, 4, 8)
    """

    norm: GroupNorm
    query: Linear
    key: Linear
    value: Linear
    out: Linear

    def __init__(self, channels: int, *, groups: int = 32, key):
        kq, kk, kv, ko = jax.random.split(key, 4)
        self.norm = GroupNorm(channels, groups)
        self.query = Linear(channels, channels, key=kq)
        self.key = Linear(channels, channels, key=kk)
        self.value = Linear(channels, channels, key=kv)
        self.out = Linear(channels, channels, init=zeros, key=ko)

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        tokens = self.norm(x).reshape(-1, 1, x.shape[-1])
        y = attend(self.query(tokens), self.key(tokens), self.value(tokens))
        return x + self.out(y).reshape(x.shape)
