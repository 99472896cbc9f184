"""The blocks of a DiT: adaLN-Zero, with the condition's tokens joined or attended to."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from ..nn.attention import Attention, CrossAttention, SelfAttention, attend
from ..nn.constraints import fusion_barrier
from ..nn.linear import Linear, zeros
from ..nn.modulation import Modulation, modulate
from ..nn.norms import layer_norm
from ..nn.rope import Rotation


class BlockContext(eqx.Module):
    """What all blocks of a DiT see, besides the vector `c`.

    `tokens` of the condition for cross-attention; None where they are joined to the patches.
    `mask`: which tokens count, of the condition, or of the joint sequence. `rotation` of queries
    and keys. Each is None where there is none.
    """

    tokens: Float[Array, "m d"] | None = None
    mask: Bool[Array, " k"] | None = None
    rotation: Rotation | None = None


class DiTBlock(eqx.Module):
    """One transformer block, conditioned by adaLN-Zero on a vector `c` (Peebles & Xie 2023).

    `x += g1 attention(modulate(norm(x), b1, a1))`, then
    `x += g2 mlp(modulate(norm(x), b2, a2))`, with `(b1, a1, g1, b2, a2, g2)` from `c`.

    Tokens of the condition are joined to those of the patches (in-context conditioning, section
    3.2), so that all attend to all; `context.mask` leaves some out. `qk_norm` and `attention` are
    those of `nn.SelfAttention`.

    >>> block = DiTBlock(16, 2, 4.0, key=jax.random.key(0))
    >>> block(jax.numpy.ones((5, 16)), jax.numpy.ones(16)).shape
    (5, 16)
    """

    joint: ClassVar[bool] = True  # whether the condition's tokens stand before those of the patches

    attention: SelfAttention
    fc1: Linear
    fc2: Linear
    modulation: Modulation

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qk_norm: Callable[[int], Any] | None = None,
        attention: Attention = attend,
        key,
    ):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        hidden = int(width * mlp_ratio)
        self.attention = SelfAttention(
            width, num_heads, qk_norm=qk_norm, attention=attention, key=k1
        )
        self.fc1 = Linear(width, hidden, key=k2)
        self.fc2 = Linear(hidden, width, key=k3)
        self.modulation = Modulation(width, 6, key=k4)

    def __call__(
        self, x: Float[Array, "n d"], c: Float[Array, " d"], context: BlockContext | None = None
    ) -> Float[Array, "n d"]:
        context = BlockContext() if context is None else context
        b1, a1, g1, b2, a2, g2 = self.modulation(c)
        normed = modulate(layer_norm(x), b1, a1)
        x = x + g1 * self.attention(normed, context.mask, rotation=context.rotation)
        return x + g2 * _mlp(self.fc1, self.fc2, modulate(layer_norm(x), b2, a2))


class CrossAttentionDiTBlock(eqx.Module):
    """`DiTBlock` with cross-attention to the condition's tokens between attention and MLP.

    `x += cross_attention(norm(x), tokens, mask)`, without modulation or gate; its last layer starts
    at zero (Chen et al. 2023, PixArt-alpha, section 2.2). Tokens have `context_size` numbers, by
    default `width`.

    **Raises** `ValueError` without tokens.

    >>> block = CrossAttentionDiTBlock(16, 2, 4.0, key=jax.random.key(0))
    >>> context = BlockContext(tokens=jax.numpy.ones((3, 16)))
    >>> block(jax.numpy.ones((5, 16)), jax.numpy.ones(16), context).shape
    (5, 16)
    """

    joint: ClassVar[bool] = False

    attention: SelfAttention
    cross_attention: CrossAttention
    fc1: Linear
    fc2: Linear
    modulation: Modulation

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        context_size: int | None = None,
        qk_norm: Callable[[int], Any] | None = None,
        attention: Attention = attend,
        key,
    ):
        k1, k2, k3, k4, k5, k6 = jax.random.split(key, 6)
        hidden = int(width * mlp_ratio)
        options: dict[str, Any] = dict(qk_norm=qk_norm, attention=attention)
        size = width if context_size is None else context_size
        self.attention = SelfAttention(width, num_heads, **options, key=k1)
        cross = CrossAttention(width, size, num_heads=num_heads, **options, key=k5)
        last = Linear(width, width, init=zeros, key=k6)
        self.cross_attention = eqx.tree_at(lambda layer: layer.proj, cross, last)
        self.fc1 = Linear(width, hidden, key=k2)
        self.fc2 = Linear(hidden, width, key=k3)
        self.modulation = Modulation(width, 6, key=k4)

    def __call__(
        self, x: Float[Array, "n d"], c: Float[Array, " d"], context: BlockContext | None = None
    ) -> Float[Array, "n d"]:
        if context is None or context.tokens is None:
            raise ValueError(
                "CrossAttentionDiTBlock: there are no tokens to attend to. Give nn.Conditioning "
                "with tokens from embed_cond, or make the network with block=DiTBlock."
            )
        b1, a1, g1, b2, a2, g2 = self.modulation(c)
        x = x + g1 * self.attention(modulate(layer_norm(x), b1, a1), rotation=context.rotation)
        cross = self.cross_attention
        x = x + cross(layer_norm(x), context.tokens, context.mask)
        return x + g2 * _mlp(self.fc1, self.fc2, modulate(layer_norm(x), b2, a2))


def _mlp(fc1: Linear, fc2: Linear, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    y = jax.nn.gelu(fc1(x), approximate=True)
    return checkpoint_name(fc2(fusion_barrier(y)), "mlp")
