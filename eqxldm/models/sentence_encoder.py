"""A sentence as one vector: BERT, pooled over its tokens (Reimers & Gurevych 2019)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .bert import BERT, LENGTH, BERTConfig
from .config import arguments, build_part, make_record


def mean_token(tokens: Float[Array, "n d"], mask: Bool[Array, " n"]) -> Float[Array, " d"]:
    """The mean of the tokens that count.

    >>> mean_token(jnp.array([[1.0], [3.0], [9.0]]), jnp.array([True, True, False]))
    Array([2.], dtype=float32)
    """
    total = jnp.sum(jnp.where(mask[:, None], tokens, 0), axis=0)
    return total / jnp.maximum(jnp.sum(mask), 1).astype(tokens.dtype)


def first_token(tokens: Float[Array, "n d"], mask: Bool[Array, " n"]) -> Float[Array, " d"]:
    """The first one, which is the same token in every text.

    >>> first_token(jnp.array([[1.0], [3.0]]), jnp.array([True, True]))
    Array([1.], dtype=float32)
    """
    return tokens[0]


@dataclass(frozen=True)
class SentenceEncoderConfig:
    """How a `SentenceEncoder` was made: the arguments of its constructor.

    >>> import jax
    >>> config = SentenceEncoderConfig(BERTConfig(16, 1, 2, vocabulary=99))
    >>> config.build(key=jax.random.key(0)).bert.config.depth
    1
    """

    bert: BERTConfig
    pool: Callable[..., Any] = mean_token
    unit: bool = True
    longest: int = LENGTH

    def build(self, *, key) -> "SentenceEncoder":
        """The encoder, with random weights."""
        return SentenceEncoder(**arguments(self), key=key)


class SentenceOutput(NamedTuple):
    """The tokens' states, the last ones, and the sentence."""

    tokens: Float[Array, "n d"]
    vector: Float[Array, " d"]


class SentenceEncoder(eqx.Module):
    """One text's ids to the states of its tokens, and a vector for the whole.

        tokens = last(bert(ids, mask)),  vector = pool(tokens, mask) / |pool(tokens, mask)|

    Trained such that two sentences of the same meaning have vectors of a large product.

    **Arguments**: `bert`: a `BERT`, or the `BERTConfig` of a new one; `pool`: `mean_token` or
    `first_token`; `unit`: whether the vector is divided by its norm; `longest`: the most ids of
    a text that the encoder was made for, at most BERT's `length`.

    `config` is its `SentenceEncoderConfig`. In the call, `mask` is false on padding.

    **Raises** `ValueError` for a `longest` that BERT has no positions for.

    >>> import jax
    >>> encoder = SentenceEncoder(BERTConfig(16, 2, 2, vocabulary=99), key=jax.random.key(0))
    >>> out = encoder(jnp.array([1, 5, 2, 0]), jnp.array([True, True, True, False]))
    >>> out.tokens.shape, out.vector.shape, round(float(jnp.linalg.norm(out.vector)), 5)
    ((4, 16), (16,), 1.0)
    """

    bert: BERT
    config: SentenceEncoderConfig = eqx.field(static=True)

    def __init__(self, bert: BERT | BERTConfig, *, key=None, **options: Any):
        config = make_record(SentenceEncoderConfig, "SentenceEncoder", dict(bert=bert, **options))
        most = config.bert.length
        if not 2 < config.longest <= most:
            raise ValueError(
                f"SentenceEncoder: longest must lie in 3 .. {most}, BERT's positions, got "
                f"{config.longest}."
            )
        self.bert = build_part(bert, key=key)
        self.config = replace(config, bert=self.bert.config)  # with its defaults filled in

    def __call__(self, ids: Int[Array, " n"], mask: Bool[Array, " n"]) -> SentenceOutput:
        tokens = self.bert(ids, mask).last
        vector = self.config.pool(tokens, mask)
        if self.config.unit:
            vector = vector / jnp.maximum(jnp.linalg.norm(vector), 1e-12)
        return SentenceOutput(tokens, vector)
