"""The blocks of transformers over tokens: LLaMA's, and MDLM's with its adaptive norms."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ..nn.attention import Attention, SelfAttention, attend
from ..nn.dtypes import at_least_float32
from ..nn.linear import Linear
from ..nn.modulation import Modulation, modulate
from ..nn.norms import RMSNorm, layer_norm
from ..nn.rope import Rotation


class TokenContext(NamedTuple):
    """What every block is told: which tokens see which, their rotation, and the time's vector."""

    mask: Bool[Array, "..."] | None = None
    rotation: Rotation | None = None
    vector: Float[Array, " c"] | None = None


class Cached(NamedTuple):
    """Keys and values of a sequence in one layer, and the position where new ones go.

    In a whole network's, `keys` and `values` have a leading axis over the layers.
    """

    keys: Float[Array, "*depth n heads size"]
    values: Float[Array, "*depth n heads size"]
    start: Int[Array, ""] | int


def cached_attention(
    attention: SelfAttention,
    x: Float[Array, "m d"],
    mask: Bool[Array, "..."] | None,
    rotation: Rotation | None,
    cached: Cached | None,
) -> tuple[Float[Array, "m d"], Any]:
    """Attention of these tokens to those cached and to themselves, whose keys and values are put
    among the cached ones; without a cache to themselves. Gives the output and the cache."""
    if cached is None:
        return attention(x, mask, rotation=rotation), None
    q, k, v = attention.heads(x, rotation=rotation)
    put = lambda into, new: jax.lax.dynamic_update_slice(
        into, new.astype(into.dtype), (cached.start, 0, 0)
    )
    keys, values = put(cached.keys, k), put(cached.values, v)
    masked = {} if mask is None else {"mask": mask}
    y = attention.attention(q, keys, values, **masked).reshape(x.shape)
    y = y if attention.proj is None else attention.proj(y)
    return y, (keys, values)


class LlamaBlock(eqx.Module):
    """`x += attention(norm(x))`, `x += W2 (silu(W_gate norm(x)) * W1 norm(x))`, without biases.

    RMSNorm before the layers, SwiGLU (Touvron et al. 2023, section 2.2; Shazeer 2020). `hidden` is
    the MLP's width. With a `Cached` it also gives the keys and values, `block.extend`.

    >>> block = LlamaBlock(8, 2, 16, 1e-5, key=jax.random.key(0))
    >>> block(jnp.ones((5, 8)), TokenContext()).shape
    (5, 8)
    """

    norm1: RMSNorm
    attention: SelfAttention
    norm2: RMSNorm
    gate: Linear
    fc1: Linear
    fc2: Linear

    timed = False

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        norm_eps: float,
        *,
        vector_size: int | None = None,
        attention: Attention = attend,
        key,
    ):
        ka, kg, k1, k2 = jax.random.split(key, 4)
        self.norm1, self.norm2 = RMSNorm(width, norm_eps), RMSNorm(width, norm_eps)
        self.attention = SelfAttention(
            width, num_heads, qkv_bias=False, proj_bias=False, attention=attention, key=ka
        )
        self.gate = Linear(width, hidden, use_bias=False, key=kg)
        self.fc1 = Linear(width, hidden, use_bias=False, key=k1)
        self.fc2 = Linear(hidden, width, use_bias=False, key=k2)

    def __call__(self, x: Float[Array, "n d"], context: TokenContext) -> Float[Array, "n d"]:
        return self.extend(x, context, None)[0]

    def extend(
        self, x: Float[Array, "n d"], context: TokenContext, cached: Cached | None
    ) -> tuple[Float[Array, "n d"], Any]:
        """The output, and keys and values with those of `x` among them."""
        y, kept = cached_attention(
            self.attention, self.norm1(x), context.mask, context.rotation, cached
        )
        x = x + y
        y = self.norm2(x)
        y = self.fc2(jax.nn.silu(self.gate(y)) * self.fc1(y))
        return x + checkpoint_name(y, "mlp"), kept


class ScaledNorm(eqx.Module):
    """`scale layer_norm(x)`: a LayerNorm without bias, float32 inside.

    >>> ScaledNorm(2)(jnp.array([1.0, 3.0])).shape
    (2,)
    """

    scale: Float[Array, " d"]
    norm_eps: float = eqx.field(static=True)

    def __init__(self, size: int, norm_eps: float = 1e-5):
        self.scale, self.norm_eps = jnp.ones(size), norm_eps

    def __call__(self, x: Float[Array, "*leading d"]) -> Float[Array, "*leading d"]:
        normed = layer_norm(x.astype(at_least_float32(x.dtype)), self.norm_eps)
        return (normed * self.scale).astype(x.dtype)


class AdaptiveTokenBlock(eqx.Module):
    """DiT's block over tokens, as MDLM has it (Sahoo et al. 2024, appendix C.1).

    Norms have a scale and no bias, then the six vectors of adaLN-Zero from the time's vector;
    attention without biases, an MLP of GELU with them. Without a time's vector the six are zeros
    of a learned bias: the block is then timeless.

    >>> block = AdaptiveTokenBlock(8, 2, 32, 1e-5, vector_size=4, key=jax.random.key(0))
    >>> block(jnp.ones((5, 8)), TokenContext(vector=jnp.ones(4))).shape
    (5, 8)
    """

    norm1: ScaledNorm
    attention: SelfAttention
    norm2: ScaledNorm
    fc1: Linear
    fc2: Linear
    modulation: Modulation

    timed = True

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        norm_eps: float,
        *,
        vector_size: int | None = None,
        attention: Attention = attend,
        key,
    ):
        ka, k1, k2, km = jax.random.split(key, 4)
        self.norm1, self.norm2 = ScaledNorm(width, norm_eps), ScaledNorm(width, norm_eps)
        self.attention = SelfAttention(
            width, num_heads, qkv_bias=False, proj_bias=False, attention=attention, key=ka
        )
        self.fc1 = Linear(width, hidden, key=k1)
        self.fc2 = Linear(hidden, width, key=k2)
        self.modulation = Modulation(width, 6, in_size=vector_size or 1, key=km)

    def __call__(self, x: Float[Array, "n d"], context: TokenContext) -> Float[Array, "n d"]:
        return self.extend(x, context, None)[0]

    def extend(
        self, x: Float[Array, "n d"], context: TokenContext, cached: Cached | None
    ) -> tuple[Float[Array, "n d"], Any]:
        """The output, and keys and values with those of `x` among them."""
        vector = jnp.zeros(1) if context.vector is None else context.vector
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(vector.astype(x.dtype))
        y, kept = cached_attention(
            self.attention,
            modulate(self.norm1(x), shift1, scale1),
            context.mask,
            context.rotation,
            cached,
        )
        x = x + gate1 * y
        y = self.fc1(modulate(self.norm2(x), shift2, scale2))
        y = self.fc2(jax.nn.gelu(y, approximate=True))
        return x + gate2 * checkpoint_name(y, "mlp"), kept
