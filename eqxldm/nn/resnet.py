"""Residual blocks of the convolutional networks."""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .constraints import replicate_activation
from .conv import Conv
from .linear import Linear
from .norms import GroupNorm


class ResnetBlock(eqx.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`, with a 1 x 1 shortcut where widths differ.

    `shift`, if given, is added to every pixel between the two convolutions. The second convolution
    starts small (`gain`, see `Conv`), so that a deep stack starts near the identity.

    >>> import jax.numpy as jnp
    >>> ResnetBlock(8, 16, groups=4, key=jax.random.key(0))(jnp.ones((4, 4, 8))).shape
    (4, 4, 16)
    """

    norm1: GroupNorm
    conv1: Conv
    norm2: GroupNorm
    conv2: Conv
    shortcut: Conv | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int = 32,
        norm_eps: float = 1e-6,
        gain: float = 0.1,
        key,
    ):
        k1, k2, k3 = jax.random.split(key, 3)
        self.norm1 = GroupNorm(in_channels, groups, norm_eps)
        self.conv1 = Conv(in_channels, out_channels, 3, key=k1)
        self.norm2 = GroupNorm(out_channels, groups, norm_eps)
        self.conv2 = Conv(out_channels, out_channels, 3, gain=gain, key=k2)
        same = in_channels == out_channels
        self.shortcut = None if same else Conv(in_channels, out_channels, 1, key=k3)

    def __call__(
        self, x: Float[Array, "h w c"], shift: Float[Array, " c2"] | None = None
    ) -> Float[Array, "h w c2"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y if shift is None else y + shift)))
        return replicate_activation(y + (x if self.shortcut is None else self.shortcut(x)))


class ConditionedResnetBlock(eqx.Module):
    """`ResnetBlock` shifted by `W silu(c) + b`, `c` being the time's vector (Ho et al. 2020).

    The second convolution starts at zero, so the block starts as the identity or its shortcut.

    >>> import jax.numpy as jnp
    >>> block = ConditionedResnetBlock(8, 16, 4, groups=4, key=jax.random.key(0))
    >>> block(jnp.ones((4, 4, 8)), jnp.ones(4)).shape
    (4, 4, 16)
    """

    block: ResnetBlock
    shift: Linear

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        cond_size: int,
        *,
        groups: int = 32,
        norm_eps: float = 1e-6,
        key,
    ):
        k1, k2 = jax.random.split(key)
        self.block = ResnetBlock(
            in_channels, out_channels, groups=groups, norm_eps=norm_eps, gain=0.0, key=k1
        )
        self.shift = Linear(cond_size, out_channels, key=k2)

    def __call__(
        self, x: Float[Array, "h w c"], c: Float[Array, " cond_size"]
    ) -> Float[Array, "h w c2"]:
        return self.block(x, self.shift(jax.nn.silu(c)))
