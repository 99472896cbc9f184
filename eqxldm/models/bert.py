"""BERT's encoder (Devlin et al. 2019), which published sentence encoders are made of."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..nn.activations import gelu
from ..nn.attention import SelfAttention
from ..nn.linear import Linear, normal
from ..nn.norms import LayerNorm
from ..nn.stack import Stack, save_matmuls
from .config import arguments, make_record

VOCABULARY, LENGTH = 30522, 512


@dataclass(frozen=True)
class BERTConfig:
    """How a `BERT` was made: the arguments of its constructor, explained there.

    >>> BERTConfig(16, 2, 2, vocabulary=99).build(key=jax.random.key(0)).config.depth
    2
    """

    width: int
    depth: int
    num_heads: int
    hidden: int | None = None
    activation: Callable[..., Any] = gelu
    pooler: bool = True
    vocabulary: int = VOCABULARY
    length: int = LENGTH
    kinds: int = 2
    norm_eps: float = 1e-12
    remat: Callable[..., Any] | None = save_matmuls

    def build(self, *, key) -> "BERT":
        """The encoder, with random weights."""
        return BERT(**arguments(self), key=key)


class BERTOutput(NamedTuple):
    """What a `BERT` says of one text of `n` tokens.

    `last`: the last block's output. `hidden`: the `depth + 1` hidden states, of which 0 is the
    normalised sum of the embeddings and the last one is `last`. `pooled`: `tanh(W last[0] + b)`,
    None without a pooler.
    """

    last: Float[Array, "n d"]
    hidden: Float[Array, "states n d"]
    pooled: Float[Array, " d"] | None


class BERTBlock(eqx.Module):
    """`x = norm(x + attention(x, mask))`, `x = norm(x + W2 f(W1 x + b1) + b2)`.

    The norms stand behind the sums (Vaswani et al. 2017, section 3.1), unlike `EncoderBlock`'s.

    >>> BERTBlock(8, 2, 12, key=jax.random.key(0))(jnp.ones((5, 8)), jnp.ones(5, bool)).shape
    (5, 8)
    """

    attention: SelfAttention
    norm1: LayerNorm
    fc1: Linear
    fc2: Linear
    norm2: LayerNorm
    activation: Callable[..., Any] = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        *,
        activation: Callable[..., Any] = gelu,
        norm_eps: float = 1e-12,
        key,
    ):
        k1, k2, k3 = jax.random.split(key, 3)
        self.attention = SelfAttention(width, num_heads, key=k1)
        self.norm1, self.norm2 = LayerNorm(width, norm_eps), LayerNorm(width, norm_eps)
        self.fc1 = Linear(width, hidden, key=k2)
        self.fc2 = Linear(hidden, width, key=k3)
        self.activation = activation

    def __call__(
        self, x: Float[Array, "n d"], mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "n d"]:
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.fc2(self.activation(self.fc1(x))))


class BERT(eqx.Module):
    """BERT's encoder: a transformer in which every token sees all others of its text.

        x = norm(table[ids] + positions + kind_table[kinds])
        x = block(x, mask), depth times

    **Arguments**:

    - `width`, `depth`, `num_heads`: the transformer's size; `hidden`: the units of the MLPs, None
      is `4 width`.
    - `activation`: `nn.gelu`, the exact one, in the published weights.
    - `pooler`: whether there is a layer for `pooled`.
    - `vocabulary`, `length`, `kinds`: the numbers of token ids, of positions, and of kinds of
      tokens (of a first and a second text).
    - `norm_eps`: of all norms. `remat`: that of `nn.Stack`.

    `config` is its `BERTConfig`. In the call:

    - `ids` of one text, at most `length`; an id outside of the vocabulary gives NaNs.
    - `mask`: false on padding, which no token sees then. None: there is none.
    - `kinds`: of each token, 0 by default; one that there is not gives NaNs.

    **Raises** `ValueError` for a size below 1 and for more ids than `length`.

    >>> bert = BERT(16, 2, 2, vocabulary=99, key=jax.random.key(0))
    >>> out = bert(jnp.array([1, 5, 2, 0]), jnp.array([True, True, True, False]))
    >>> out.last.shape, out.hidden.shape, out.pooled.shape
    ((4, 16), (3, 4, 16), (16,))
    """

    table: Float[Array, "vocabulary d"]
    positions: Float[Array, "length d"]
    kind_table: Float[Array, "kinds d"]
    norm: LayerNorm
    blocks: Stack
    pooled: Linear | None
    config: BERTConfig = eqx.field(static=True)

    def __init__(self, width: int, depth: int, num_heads: int, *, key, **options):
        sizes = dict(width=width, depth=depth, num_heads=num_heads)
        config = make_record(BERTConfig, "BERT", sizes | options)
        self.config = config if config.hidden else replace(config, hidden=4 * width)
        counted = sizes | dict(vocabulary=config.vocabulary, length=config.length)
        counted |= dict(kinds=config.kinds)
        if min(counted.values()) < 1:
            raise ValueError(f"BERT: every size must be at least 1, got {counted}.")
        k1, k2, k3, k4, k5 = jax.random.split(key, 5)
        block: dict[str, Any] = dict(activation=config.activation, norm_eps=config.norm_eps)
        hidden = config.hidden or 4 * width
        make = lambda k: BERTBlock(width, num_heads, hidden, **block, key=k)
        self.table = normal(0.02)(k1, (config.vocabulary, width))
        self.positions = normal(0.02)(k2, (config.length, width))
        self.kind_table = normal(0.02)(k3, (config.kinds, width))
        self.norm = LayerNorm(width, config.norm_eps)
        self.blocks = Stack(make, depth, remat=config.remat, key=k4)
        self.pooled = Linear(width, width, key=k5) if config.pooler else None

    def __call__(
        self,
        ids: Int[Array, " n"],
        mask: Bool[Array, " n"] | None = None,
        kinds: Int[Array, " n"] | None = None,
    ) -> BERTOutput:
        n = len(ids)
        if n > self.config.length:
            raise ValueError(
                f"BERT: at most {self.config.length} ids, got {n}. Cut the text, as "
                "text.load_tokenizer does."
            )
        x = _rows(self.table, ids) + self.positions[:n]
        x = x + (self.kind_table[0] if kinds is None else _rows(self.kind_table, kinds))
        x = self.norm(x)
        hidden = jnp.concatenate([x[None], self.blocks.outputs(x, mask)])
        last = hidden[-1]
        pooled = None if self.pooled is None else jnp.tanh(self.pooled(last[0]))
        return BERTOutput(last, hidden, pooled)


def _rows(table: Float[Array, "rows d"], ids: Int[Array, " n"]) -> Float[Array, "n d"]:
    known = jnp.where(ids < 0, len(table), ids)  # -1 must not wrap around
    return table.at[known].get(mode="fill", fill_value=jnp.nan)


def minilm_l6(*, key, **options) -> BERT:
    """MiniLM's of 6 blocks (Wang et al. 2020), which `all-MiniLM-L6-v2` was fine-tuned from.

    >>> from eqxldm.models import parameter_count
    >>> parameter_count(eqx.filter_eval_shape(minilm_l6, key=jax.random.key(0)))
    22713216
    """
    return BERT(384, 6, 12, **options, key=key)


def bert_base(*, key, **options) -> BERT:
    """BERT base, of 110 million parameters.

    >>> from eqxldm.models import parameter_count
    >>> parameter_count(eqx.filter_eval_shape(bert_base, key=jax.random.key(0)))
    109482240
    """
    return BERT(768, 12, 12, **options, key=key)
