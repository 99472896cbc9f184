"""A small text encoder over bytes, trained along with the network that it conditions."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..nn.conditioning import Conditioning
from ..nn.linear import Linear, normal
from ..nn.norms import LayerNorm
from ..nn.stack import Stack
from .config import arguments, make_record
from .encoder_block import EncoderBlock

# 0 is padding, 1 .. 255 the bytes of UTF-8, which has no zero byte in a text, 256 the start.
VOCABULARY = 257


@dataclass(frozen=True)
class ByteTextConfig:
    """How a `ByteTextEncoder` was made: the arguments of its constructor.

    >>> ByteTextConfig(16, 2, 2, 8).build(key=jax.random.key(0)).config.depth
    2
    """

    width: int
    depth: int
    num_heads: int
    max_length: int

    def build(self, *, key) -> "ByteTextEncoder":
        """The encoder, with random weights."""
        return ByteTextEncoder(**arguments(self), key=key)


class ByteTextEncoder(eqx.Module):
    """The bytes of a text to `nn.Conditioning`: a vector for the whole, and a token for each byte.

    A transformer with learned positions. `ids` are those of `eqxldm.data.caption_bytes`: 256 to
    begin with, the bytes of UTF-8, then zeros, which are masked: they change nothing. The vector
    is a linear map of the mean of the tokens that count.

    **Arguments**: `width` is that of the network whose `embed_cond` this is, a multiple of
    `num_heads`; `depth` is the number of blocks; `max_length` is the most ids there may be.
    `config` is its `ByteTextConfig`.

    **Raises** `ValueError` for more ids than `max_length`.

    >>> encoder = ByteTextEncoder(16, 2, 2, 8, key=jax.random.key(0))
    >>> text = encoder(jnp.array([256, 104, 105, 0]))
    >>> text.vector.shape, text.tokens.shape, text.mask.tolist()
    ((16,), (4, 16), [True, True, True, False])
    """

    table: Float[Array, "257 d"]
    positions: Float[Array, "max_length d"]
    blocks: Stack
    norm: LayerNorm
    pooled: Linear
    config: ByteTextConfig = eqx.field(static=True)

    def __init__(self, width: int, depth: int, num_heads: int, max_length: int, *, key):
        if min(width, depth, num_heads, max_length) < 1:
            raise ValueError(
                f"ByteTextEncoder: every size must be at least 1, got width {width}, depth "
                f"{depth}, num_heads {num_heads}, max_length {max_length}."
            )
        sizes = dict(width=width, depth=depth, num_heads=num_heads, max_length=max_length)
        self.config = make_record(ByteTextConfig, "ByteTextEncoder", sizes)
        k1, k2, k3, k4 = jax.random.split(key, 4)
        self.table = normal(0.02)(k1, (VOCABULARY, width))
        self.positions = normal(0.02)(k2, (max_length, width))
        self.blocks = Stack(lambda k: EncoderBlock(width, num_heads, key=k), depth, key=k3)
        self.norm = LayerNorm(width)
        self.pooled = Linear(width, width, key=k4)

    def __call__(self, ids: Int[Array, " n"]) -> Conditioning:
        if len(ids) > self.config.max_length:
            raise ValueError(
                f"ByteTextEncoder: at most {self.config.max_length} ids, got {len(ids)}. Cut the "
                "text, or make the encoder with a larger max_length."
            )
        mask = ids != 0
        x = self.table.at[ids].get(mode="fill", fill_value=jnp.nan) + self.positions[: len(ids)]
        tokens = self.norm(self.blocks(x, mask))
        count = jnp.maximum(jnp.sum(mask), 1).astype(tokens.dtype)
        mean = jnp.sum(jnp.where(mask[:, None], tokens, 0), axis=0) / count
        return Conditioning(self.pooled(mean), tokens, mask)
