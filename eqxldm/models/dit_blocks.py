"""The blocks of a DiT: adaLN-Zero, the condition's tokens joined or attended to; its last layer."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from ..nn.attention import Attention, CrossAttention, SelfAttention, attend
from ..nn.constraints import fusion_barrier
from ..nn.linear import Linear, zeros
from ..nn.modulation import Modulation, modulate
from ..nn.norms import layer_norm
from ..nn.rope import Rotation

MakeNorm = Callable[[int], Any]


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

    The options of newer networks:

    - `norm` makes the two norms before the layers from their size, such as `nn.RMSNorm`; None is
      the published one, a layer norm without parameters.
    - `swiglu`: the MLP is `W2 (silu(W_g x) * W1 x)` (Shazeer 2020) with `gated_units` hidden units,
      so that it has as many parameters as one of `mlp_ratio`; its three layers have biases.
    - `modulated=False`: no shift and scale, and `g1`, `g2` are learned vectors that start at 0,
      for networks whose condition comes as tokens (Geng et al. 2025b, section 4).

    >>> block = DiTBlock(16, 2, 4.0, key=jax.random.key(0))
    >>> block(jnp.ones((5, 16)), jnp.ones(16)).shape
    (5, 16)
    """

    joint: ClassVar[bool] = True  # whether the condition's tokens stand before those of the patches

    attention: SelfAttention
    fc1: Linear
    fc2: Linear
    modulation: Modulation | None
    gate: Linear | None
    gates: Float[Array, "2 d"] | None
    norm1: Callable[..., Any] | None
    norm2: Callable[..., Any] | None

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qk_norm: MakeNorm | None = None,
        attention: Attention = attend,
        norm: MakeNorm | None = None,
        swiglu: bool = False,
        modulated: bool = True,
        key,
    ):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        self.attention = SelfAttention(
            width, num_heads, qk_norm=qk_norm, attention=attention, key=k1
        )
        self.fc1, self.fc2, self.gate = _mlp_layers(width, mlp_ratio, swiglu, k2, k3)
        self.modulation = Modulation(width, 6, key=k4) if modulated else None
        self.gates = None if modulated else jnp.zeros((2, width))
        self.norm1, self.norm2 = (norm(width), norm(width)) if norm else (None, None)

    def __call__(
        self, x: Float[Array, "n d"], c: Float[Array, " d"], context: BlockContext | None = None
    ) -> Float[Array, "n d"]:
        return self.keep(x, c, context)[0]

    def keep(
        self, x: Float[Array, "n d"], c: Float[Array, " d"], context: BlockContext | None = None
    ) -> tuple[Float[Array, "n d"], tuple[Float[Array, "n d"], ...]]:
        """What the block gives, and what its attention and its MLP gave before their gates."""
        context = BlockContext() if context is None else context
        b1, a1, g1, b2, a2, g2 = _six(self.modulation, self.gates, c)
        normed = modulate(normalise(self.norm1, x), b1, a1)
        attended = self.attention(normed, context.mask, rotation=context.rotation)
        x = x + g1 * attended
        normed = modulate(normalise(self.norm2, x), b2, a2)
        mlp = _mlp(self.fc1, self.fc2, self.gate, normed)
        return x + g2 * mlp, (attended, mlp)

    def reuse(
        self,
        x: Float[Array, "n d"],
        c: Float[Array, " d"],
        kept: tuple[Float[Array, "n d"], ...],
    ) -> Float[Array, "n d"]:
        """What the block would give if attention and MLP gave what was `kept` of another call."""
        _, _, g1, _, _, g2 = _six(self.modulation, self.gates, c)
        return x + g1 * kept[0] + g2 * kept[1]


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
    modulation: Modulation | None
    gate: Linear | None
    gates: Float[Array, "2 d"] | None
    norm1: Callable[..., Any] | None
    norm2: Callable[..., Any] | None
    norm3: Callable[..., Any] | None  # before the cross-attention

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        context_size: int | None = None,
        qk_norm: MakeNorm | None = None,
        attention: Attention = attend,
        norm: MakeNorm | None = None,
        swiglu: bool = False,
        modulated: bool = True,
        key,
    ):
        k1, k2, k3, k4, k5, k6 = jax.random.split(key, 6)
        options: dict[str, Any] = dict(qk_norm=qk_norm, attention=attention)
        size = width if context_size is None else context_size
        self.attention = SelfAttention(width, num_heads, **options, key=k1)
        cross = CrossAttention(width, size, num_heads=num_heads, **options, key=k5)
        last = Linear(width, width, init=zeros, key=k6)
        self.cross_attention = eqx.tree_at(lambda layer: layer.proj, cross, last)
        self.fc1, self.fc2, self.gate = _mlp_layers(width, mlp_ratio, swiglu, k2, k3)
        self.modulation = Modulation(width, 6, key=k4) if modulated else None
        self.gates = None if modulated else jnp.zeros((2, width))
        norms = [norm(width) for _ in range(3)] if norm else [None] * 3
        self.norm1, self.norm2, self.norm3 = norms

    def __call__(
        self, x: Float[Array, "n d"], c: Float[Array, " d"], context: BlockContext | None = None
    ) -> Float[Array, "n d"]:
        return self.keep(x, c, context)[0]

    def keep(
        self, x: Float[Array, "n d"], c: Float[Array, " d"], context: BlockContext | None = None
    ) -> tuple[Float[Array, "n d"], tuple[Float[Array, "n d"], ...]]:
        """As `DiTBlock.keep`; the cross-attention's output is between the two."""
        if context is None or context.tokens is None:
            raise ValueError(
                "CrossAttentionDiTBlock: there are no tokens to attend to. Give nn.Conditioning "
                "with tokens from embed_cond, or make the network with block=DiTBlock."
            )
        b1, a1, g1, b2, a2, g2 = _six(self.modulation, self.gates, c)
        normed = modulate(normalise(self.norm1, x), b1, a1)
        attended = self.attention(normed, rotation=context.rotation)
        x = x + g1 * attended
        cross = self.cross_attention
        crossed = cross(normalise(self.norm3, x), context.tokens, context.mask)
        x = x + crossed
        normed = modulate(normalise(self.norm2, x), b2, a2)
        mlp = _mlp(self.fc1, self.fc2, self.gate, normed)
        return x + g2 * mlp, (attended, crossed, mlp)

    def reuse(
        self,
        x: Float[Array, "n d"],
        c: Float[Array, " d"],
        kept: tuple[Float[Array, "n d"], ...],
    ) -> Float[Array, "n d"]:
        """As `DiTBlock.reuse`."""
        _, _, g1, _, _, g2 = _six(self.modulation, self.gates, c)
        return x + g1 * kept[0] + kept[1] + g2 * kept[2]


class OutputHead(eqx.Module):
    """`W modulate(norm(x), b, a) + c` of each token: the last layer, for a head of its own.

    `W` and the modulation start at zero, as those of the network's last layer do.

    >>> OutputHead(8, 4, key=jax.random.key(0))(jnp.ones((3, 8)), jnp.ones(8)).shape
    (3, 4)
    """

    norm: Callable[..., Any] | None
    modulation: Modulation | None
    final_linear: Linear

    def __init__(
        self,
        width: int,
        out_size: int,
        *,
        norm: MakeNorm | None = None,
        modulated: bool = True,
        key,
    ):
        self.norm = norm(width) if norm else None
        self.modulation = Modulation(width, 2, key=key) if modulated else None
        self.final_linear = Linear(width, out_size, init=zeros, key=key)

    def __call__(self, x: Float[Array, "n d"], c: Float[Array, " d"]) -> Float[Array, "n out"]:
        return apply_head(self.norm, self.modulation, self.final_linear, x, c)


def apply_head(
    norm: Callable[..., Any] | None,
    modulation: Modulation | None,
    linear: Linear,
    x: Float[Array, "n d"],
    c: Float[Array, " d"],
) -> Float[Array, "n out"]:
    """`linear(modulate(norm(x), shift, scale))` of each token; without modulation unmodulated.

    >>> linear = Linear(8, 4, key=jax.random.key(0))
    >>> apply_head(None, None, linear, jnp.ones((3, 8)), jnp.ones(8)).shape
    (3, 4)
    """
    x = normalise(norm, x)
    return linear(x if modulation is None else modulate(x, *modulation(c)))


def gated_units(width: int, mlp_ratio: float) -> int:
    """The hidden units of a gated MLP: two thirds of `mlp_ratio` widths, up to a multiple of 8.

    Three matrices then have about as many parameters as the two of a plain MLP (Shazeer 2020).

    >>> gated_units(1152, 4.0), gated_units(128, 4.0)
    (3072, 344)
    """
    return -(-int(2 * width * mlp_ratio / 3) // 8) * 8


def normalise(norm: Callable[..., Any] | None, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """`norm(x)`, or the layer norm without parameters where there is none.

    >>> normalise(None, jnp.array([[1.0, 3.0]])).round(4)
    Array([[-1.,  1.]], dtype=float32)
    """
    return layer_norm(x) if norm is None else norm(x)


def _six(modulation: Modulation | None, gates: Any, c: Any) -> Any:
    """Shift, scale and gate of attention and MLP; without modulation zeros, and learned gates."""
    if modulation is not None:
        return modulation(c)
    zero = jnp.zeros_like(c)
    g1, g2 = gates.astype(c.dtype)
    return zero, zero, g1, zero, zero, g2


def _mlp_layers(width: int, mlp_ratio: float, swiglu: bool, k1: Any, k2: Any) -> Any:
    hidden = gated_units(width, mlp_ratio) if swiglu else int(width * mlp_ratio)
    gate = Linear(width, hidden, key=jax.random.fold_in(k1, 1)) if swiglu else None
    return Linear(width, hidden, key=k1), Linear(hidden, width, key=k2), gate


def _mlp(fc1: Linear, fc2: Linear, gate: Linear | None, x: Float[Array, "n d"]) -> Any:
    y = jax.nn.gelu(fc1(x), approximate=True) if gate is None else jax.nn.silu(gate(x)) * fc1(x)
    return checkpoint_name(fc2(fusion_barrier(y)), "mlp")
