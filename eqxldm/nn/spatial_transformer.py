"""The transformer of latent diffusion's U-Net: self-attention, cross-attention, gated MLP."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .attention import Attention, CrossAttention, SelfAttention, attend
from .conv import Conv
from .linear import Linear, zeros
from .norms import GroupNorm, LayerNorm


class TransformerBlock(eqx.Module):
    """`x += self(norm(x))`, `x += cross(norm(x), context, mask)`, `x += mlp(norm(x))`.

    The MLP is gated (Shazeer 2020): `W2 (a gelu(g)) + b2` with `(a, g) = W1 x + b1`, both `4 d`.

    **Arguments**: `width` of the tokens, a multiple of `num_heads`; `context_size` of the
    context.

    >>> block = TransformerBlock(8, 6, num_heads=2, key=jax.random.key(0))
    >>> block(jnp.ones((5, 8)), jnp.ones((3, 6))).shape
    (5, 8)
    """

    norm1: LayerNorm
    self_attention: SelfAttention
    norm2: LayerNorm
    cross_attention: CrossAttention
    norm3: LayerNorm
    fc1: Linear
    fc2: Linear

    def __init__(
        self, width: int, context_size: int, *, num_heads: int, attention: Attention = attend, key
    ):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        self.norm1, self.norm2, self.norm3 = LayerNorm(width), LayerNorm(width), LayerNorm(width)
        self.self_attention = SelfAttention(
            width, num_heads, attention=attention, qkv_bias=False, key=k1
        )
        self.cross_attention = CrossAttention(
            width, context_size, num_heads=num_heads, attention=attention, key=k2
        )
        self.fc1 = Linear(width, 8 * width, key=k3)
        self.fc2 = Linear(4 * width, width, key=k4)

    def __call__(
        self,
        x: Float[Array, "n d"],
        context: Float[Array, "m context_size"],
        mask: Bool[Array, " m"] | None = None,
    ) -> Float[Array, "n d"]:
        x = x + self.self_attention(self.norm1(x))
        x = x + self.cross_attention(self.norm2(x), context, mask)
        y, gate = jnp.split(self.fc1(self.norm3(x)), 2, axis=-1)
        return x + self.fc2(y * jax.nn.gelu(gate, approximate=False))


class SpatialTransformer(eqx.Module):
    """Transformer blocks over the pixels of a feature map, with a residual (Rombach et al. 2022).

    `x + W_out(blocks(W_in(norm(x)), context))`. The last map starts at zero.

    **Arguments**: `depth` is the number of blocks; `linear` makes the two maps `Linear`, else
    they are 1 x 1 convolutions: the same function, stored otherwise (Stable Diffusion 2 and 1).

    >>> block = SpatialTransformer(8, 6, num_heads=2, groups=4, key=jax.random.key(0))
    >>> block(jnp.ones((4, 4, 8)), jnp.ones((3, 6))).shape
    (4, 4, 8)
    """

    norm: GroupNorm
    proj_in: Conv | Linear
    blocks: list[TransformerBlock]
    proj_out: Conv | Linear

    def __init__(
        self,
        channels: int,
        context_size: int,
        *,
        num_heads: int,
        depth: int = 1,
        groups: int = 32,
        linear: bool = False,
        attention: Attention = attend,
        key,
    ):
        k1, k2, k3 = jax.random.split(key, 3)
        self.norm = GroupNorm(channels, groups, 1e-6)
        self.blocks = [
            TransformerBlock(
                channels, context_size, num_heads=num_heads, attention=attention, key=k
            )
            for k in jax.random.split(k2, depth)
        ]
        if linear:
            self.proj_in = Linear(channels, channels, key=k1)
            self.proj_out = Linear(channels, channels, init=zeros, key=k3)
        else:
            self.proj_in = Conv(channels, channels, 1, key=k1)
            self.proj_out = Conv(channels, channels, 1, gain=0.0, key=k3)

    def __call__(
        self,
        x: Float[Array, "h w c"],
        context: Float[Array, "m context_size"],
        mask: Bool[Array, " m"] | None = None,
    ) -> Float[Array, "h w c"]:
        tokens = self.proj_in(self.norm(x)).reshape(-1, x.shape[-1])
        for block in self.blocks:
            tokens = block(tokens, context, mask)
        return x + self.proj_out(tokens.reshape(x.shape))
