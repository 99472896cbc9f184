"""The encoders of T5 v1.1 (Raffel et al. 2020; Shazeer 2020) and umT5 (Chung et al. 2023)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..nn.activations import gelu_tanh
from ..nn.attention import SelfAttention, attend
from ..nn.linear import Linear, normal
from ..nn.norms import RMSNorm
from ..nn.stack import Stack, save_matmuls
from .config import arguments, make_record

VOCABULARY, UMT5_VOCABULARY = 32128, 256384


@dataclass(frozen=True)
class T5Config:
    """How a `T5Encoder` was made: the arguments of its constructor, explained there.

    >>> T5Config(16, 2, 2, 32, vocabulary=99).build(key=jax.random.key(0)).config.depth
    2
    """

    width: int
    depth: int
    num_heads: int
    hidden: int
    head_size: int = 64
    shared_bias: bool = True
    buckets: int = 32
    max_distance: int = 128
    vocabulary: int = VOCABULARY
    norm_eps: float = 1e-6
    remat: Callable[..., Any] | None = save_matmuls

    def build(self, *, key) -> "T5Encoder":
        """The encoder, with random weights."""
        return T5Encoder(**arguments(self), key=key)


def relative_buckets(n: int, buckets: int, max_distance: int) -> Int[np.ndarray, "n n"]:
    """In which bucket the way from query `i` to key `j` falls, `d = j - i` (Raffel et al., 2.1).

    Half of the buckets are for `d > 0`. With `h` the half and `m = h / 2`, distances below `m` have
    one each, those above share the rest: `m + floor(log(|d| / m) / log(max_distance / m) (h - m))`,
    at most `h - 1`. In float32, as in the published code: the floor is taken of whole numbers.

    >>> relative_buckets(4, 8, 16)
    array([[0, 5, 6, 6],
           [1, 0, 5, 6],
           [2, 1, 0, 5],
           [2, 2, 1, 0]], dtype=int32)
    """
    half = buckets // 2
    exact = half // 2
    distance = np.arange(n, dtype=np.float32)
    with np.errstate(divide="ignore"):  # of 0, which has a bucket of its own
        ratio = np.log(distance / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    far = exact + np.floor(np.maximum(ratio, 0) * np.float32(half - exact))
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1)).astype(np.int32)
    way = np.arange(n)[None] - np.arange(n)[:, None]
    return bucket[np.abs(way)] + np.int32(half) * (way > 0)


def _attend_unscaled(query: Array, key: Array, value: Array, **given: Array) -> Array:
    """T5's scores are not divided by `sqrt(d)`, as `attend`'s are."""
    return attend(query * math.sqrt(query.shape[-1]), key, value, **given)


class T5Block(eqx.Module):
    """`x += attention(norm(x), mask, bias)`, `x += W2 (gelu(Wg norm(x)) W1 norm(x))`.

    No layer has a bias; the norms are of the root mean square. `own_bias`: the number of buckets of
    the block's own table of positions; None has none. `bias` of the call is `(heads, n, n)`, or for
    a block with a table the buckets `(n, n)`.

    >>> block = T5Block(8, 2, 12, head_size=4, key=jax.random.key(0))
    >>> block(jnp.ones((5, 8)), None, jnp.zeros((2, 5, 5))).shape
    (5, 8)
    """

    norm1: RMSNorm
    attention: SelfAttention
    bias_table: Float[Array, "buckets heads"] | None
    norm2: RMSNorm
    gate_fc1: Linear
    fc1: Linear
    fc2: Linear

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        *,
        head_size: int = 64,
        own_bias: int | None = None,
        norm_eps: float = 1e-6,
        key,
    ):
        k1, k2, k3, k4, k5 = jax.random.split(key, 5)
        plain: dict[str, Any] = dict(qkv_bias=False, proj_bias=False, attention=_attend_unscaled)
        attention = SelfAttention(width, num_heads, head_size=head_size, **plain, key=k1)
        # The queries start smaller by what their scores are not divided by.
        quieter = attention.qkv.weight.at[0].divide(math.sqrt(head_size))
        self.attention = eqx.tree_at(lambda layer: layer.qkv.weight, attention, quieter)
        self.norm1, self.norm2 = RMSNorm(width, norm_eps), RMSNorm(width, norm_eps)
        self.gate_fc1 = Linear(width, hidden, use_bias=False, key=k2)
        self.fc1 = Linear(width, hidden, use_bias=False, key=k3)
        self.fc2 = Linear(hidden, width, use_bias=False, key=k4)
        shape = None if own_bias is None else (own_bias, num_heads)
        self.bias_table = None if shape is None else normal(width**-0.5)(k5, shape)

    def __call__(
        self,
        x: Float[Array, "n d"],
        mask: Bool[Array, " n"] | None,
        bias: Float[Array, "heads n n"] | Int[Array, "n n"],
    ) -> Float[Array, "n d"]:
        if self.bias_table is not None:
            bias = _bias(self.bias_table, bias)
        x = x + self.attention(self.norm1(x), mask, bias)
        h = self.norm2(x)
        return x + self.fc2(gelu_tanh(self.gate_fc1(h)) * self.fc1(h))


class T5Encoder(eqx.Module):
    """The encoder of T5 v1.1 or umT5: `(ids (n,), mask (n,)) -> (n, d)`, of one text.

    Positions are a number for each head and distance, added to the scores of the attention: a
    table of buckets of distances, one for all blocks in T5, one for each in umT5. Scores are not
    divided by the root of the head size.

    **Arguments**:

    - `width`, `depth`, `num_heads`, `hidden`: the transformer's size; the heads of `head_size` need
      not make up the width.
    - `shared_bias`: True in T5, False in umT5.
    - `buckets`, `max_distance`: of distances between tokens (`relative_buckets`); `buckets` is a
      multiple of 4, and a quarter of it less than `max_distance`.
    - `vocabulary`, `norm_eps`; `remat`: that of `nn.Stack`.

    `config` is its `T5Config`. In the call, `mask` is false where a token is not to be seen: on
    padding, unless the generator was trained on padding that is seen, as SD3 and FLUX.1 were. An id
    outside of the vocabulary gives NaNs.

    **Raises** `ValueError` for sizes that make no sense, and in the call for weights in float16, in
    which T5 overflows: it was trained in bfloat16, which is as small.

    >>> t5 = T5Encoder(16, 2, 2, 32, head_size=8, vocabulary=99, key=jax.random.key(0))
    >>> t5(jnp.array([5, 7, 1, 0]), jnp.array([True, True, True, False])).shape
    (4, 16)
    """

    table: Float[Array, "vocabulary d"]
    bias_table: Float[Array, "buckets heads"] | None
    blocks: Stack
    norm: RMSNorm
    config: T5Config = eqx.field(static=True)

    def __init__(self, width: int, depth: int, num_heads: int, hidden: int, *, key, **options):
        sizes = dict(width=width, depth=depth, num_heads=num_heads, hidden=hidden)
        self.config = config = make_record(T5Config, "T5Encoder", sizes | options)
        counted = sizes | dict(vocabulary=config.vocabulary, head_size=config.head_size)
        if min(counted.values()) < 1:
            raise ValueError(f"T5Encoder: every size must be at least 1, got {counted}.")
        if config.buckets % 4 or not 0 < config.buckets // 4 < config.max_distance:
            raise ValueError(
                "T5Encoder: buckets must be a multiple of 4, and a quarter of it between 1 and "
                f"max_distance; got {config.buckets} and {config.max_distance}."
            )
        k1, k2, k3 = jax.random.split(key, 3)
        own = None if config.shared_bias else config.buckets
        block: dict[str, Any] = dict(head_size=config.head_size, norm_eps=config.norm_eps)
        make = lambda k: T5Block(width, num_heads, hidden, **block, own_bias=own, key=k)
        self.table = normal(1.0)(k1, (config.vocabulary, width))
        shape = (config.buckets, num_heads)
        self.bias_table = normal(width**-0.5)(k2, shape) if config.shared_bias else None
        self.blocks = Stack(make, depth, remat=config.remat, key=k3)
        self.norm = RMSNorm(width, config.norm_eps)

    def __call__(
        self, ids: Int[Array, " n"], mask: Bool[Array, " n"] | None = None
    ) -> Float[Array, "n d"]:
        if self.table.dtype == jnp.float16:
            raise ValueError(
                "T5Encoder: float16 is too small for its activations, which become infinite. Use "
                "bfloat16 or float32: pretrained.load(path, dtype=jnp.bfloat16)."
            )
        config = self.config
        buckets = jnp.asarray(relative_buckets(len(ids), config.buckets, config.max_distance))
        bias = buckets if self.bias_table is None else _bias(self.bias_table, buckets)
        known = jnp.where(ids < 0, config.vocabulary, ids)  # -1 must not wrap around
        x = self.table.at[known].get(mode="fill", fill_value=jnp.nan)
        return self.norm(self.blocks(x, mask, bias))


def _bias(table: Float[Array, "buckets heads"], buckets: Array) -> Float[Array, "heads n n"]:
    return jnp.moveaxis(table[buckets], -1, 0)


def t5_small(*, key, **options) -> T5Encoder:
    """T5 v1.1 small: 35 million parameters."""
    return T5Encoder(512, 8, 6, 1024, **options, key=key)


def t5_base(*, key, **options) -> T5Encoder:
    """T5 v1.1 base: 110 million parameters."""
    return T5Encoder(768, 12, 12, 2048, **options, key=key)


def t5_large(*, key, **options) -> T5Encoder:
    """T5 v1.1 large: 341 million parameters."""
    return T5Encoder(1024, 24, 16, 2816, **options, key=key)


def t5_xl(*, key, **options) -> T5Encoder:
    """T5 v1.1 XL: 1.2 billion parameters."""
    return T5Encoder(2048, 24, 32, 5120, **options, key=key)


def t5_xxl(*, key, **options) -> T5Encoder:
    """T5 v1.1 XXL, of SD3, FLUX.1 and others: 4.8 billion parameters.

    >>> from eqxldm.models import parameter_count
    >>> parameter_count(eqx.filter_eval_shape(t5_xxl, key=jax.random.key(0)))
    4762310656
    """
    return T5Encoder(4096, 24, 64, 10240, **options, key=key)


def umt5_xxl(*, key, **options) -> T5Encoder:
    """umT5 XXL, of Wan: as T5's XXL, with a table of positions a block and many languages."""
    own = dict(vocabulary=UMT5_VOCABULARY, shared_bias=False)
    return T5Encoder(4096, 24, 64, 10240, **own | options, key=key)
