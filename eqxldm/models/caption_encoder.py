"""Captions for a network: by a small CLIP text encoder that is trained along, or a frozen one."""

from collections.abc import Mapping
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ..nn.conditioning import Conditioning
from ..nn.linear import Linear
from ..nn.norms import layer_norm
from .clip_text import VOCABULARY, CLIPText
from .config import arguments, make_record


@dataclass(frozen=True)
class CaptionEncoderConfig:
    """How a `CaptionEncoder` was made: the arguments of its constructor.

    >>> CaptionEncoderConfig(16, 2, 2, 8, 99).build(key=jax.random.key(0)).config.depth
    2
    """

    width: int
    depth: int
    num_heads: int
    max_length: int
    vocabulary: int = VOCABULARY

    def build(self, *, key) -> "CaptionEncoder":
        """The encoder, with random weights."""
        return CaptionEncoder(**arguments(self), key=key)


class CaptionEncoder(eqx.Module):
    """A text's CLIP tokens to `nn.Conditioning`: a vector for the whole, and one for each token.

        tokens = last,  vector = W pooled + b,  mask = up to the first end token

    with `last` and `pooled` of a `CLIPText` that starts at random. Unlike that of published
    generators its padding counts for nothing: the network that is trained along sees the mask.

    **Arguments**: `width` is that of the network whose `embed_cond` this is, a multiple of
    `num_heads`; `depth` is the number of blocks; `max_length` is the most ids there may be, of
    `vocabulary`, whose last one is the end token. `config` is its `CaptionEncoderConfig`.

    **Raises** `ValueError` for a size below 1 and for more ids than `max_length`.

    >>> encoder = CaptionEncoder(16, 2, 2, 8, 99, key=jax.random.key(0))
    >>> text = encoder(jnp.array([97, 5, 98, 98]))
    >>> text.vector.shape, text.tokens.shape, text.mask.tolist()
    ((16,), (4, 16), [True, True, True, False])
    """

    clip: CLIPText
    pooled: Linear
    config: CaptionEncoderConfig = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        max_length: int,
        vocabulary: int = VOCABULARY,
        *,
        key,
    ):
        sizes = dict(width=width, depth=depth, num_heads=num_heads)
        self.config = make_record(
            CaptionEncoderConfig,
            "CaptionEncoder",
            sizes | dict(max_length=max_length, vocabulary=vocabulary),
        )
        k1, k2 = jax.random.split(key)
        self.clip = CLIPText(
            **sizes, vocabulary=vocabulary, length=max_length, end_id=vocabulary - 1, key=k1
        )
        self.pooled = Linear(width, width, key=k2)

    def __call__(self, ids: Int[Array, " n"]) -> Conditioning:
        out = self.clip(ids, layer=-1)
        end = jnp.argmax(ids == self.config.vocabulary - 1)
        return Conditioning(self.pooled(out.pooled), out.last, jnp.arange(len(ids)) <= end)


@dataclass(frozen=True)
class EncodedCaptionConfig:
    """How an `EncodedCaption` was made: the arguments of its constructor.

    >>> EncodedCaptionConfig(8, 16).build(key=jax.random.key(0)).config.width
    16
    """

    size: int
    width: int

    def build(self, *, key) -> "EncodedCaption":
        """The layers, with random weights."""
        return EncodedCaption(**arguments(self), key=key)


class EncodedCaption(eqx.Module):
    """What a frozen encoder says of a text, to `nn.Conditioning`: all that is trained of it.

        tokens = W1 norm(tokens) + b1,  vector = W2 norm(vector) + b2

    with layer norms without parameters. `caption` is a mapping of `tokens`, `(n, size)`, the states
    of the text's tokens; `mask`, `(n,)`, false on padding; and `vector`, `(size,)`, the whole.

    **Arguments**: `size` is that of the encoder, `width` that of the network whose `embed_cond`
    this is. `config` is its `EncodedCaptionConfig`.

    >>> embed = EncodedCaption(8, 16, key=jax.random.key(0))
    >>> caption = {"tokens": jnp.ones((4, 8)), "mask": jnp.arange(4) < 3, "vector": jnp.ones(8)}
    >>> text = embed(caption)
    >>> text.vector.shape, text.tokens.shape, text.mask.tolist()
    ((16,), (4, 16), [True, True, True, False])
    """

    project: Linear
    pooled: Linear
    config: EncodedCaptionConfig = eqx.field(static=True)

    def __init__(self, size: int, width: int, *, key):
        sizes = dict(size=size, width=width)
        self.config = make_record(EncodedCaptionConfig, "EncodedCaption", sizes)
        k1, k2 = jax.random.split(key)
        self.project, self.pooled = Linear(size, width, key=k1), Linear(size, width, key=k2)

    def __call__(self, caption: Mapping[str, Array]) -> Conditioning:
        dtype = self.project.weight.dtype  # files have the states in half precision
        tokens, vector = (layer_norm(caption[name].astype(dtype)) for name in ("tokens", "vector"))
        return Conditioning(self.pooled(vector), self.project(tokens), caption["mask"])
