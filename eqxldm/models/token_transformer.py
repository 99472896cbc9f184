"""A transformer over tokens: bidirectional for masked diffusion, causal for its twin."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, PyTree, Shaped

from ..nn.attention import Attention, attend, check_heads
from ..nn.embeddings import Sinusoid
from ..nn.linear import Linear, normal, zeros
from ..nn.modulation import Modulation, modulate
from ..nn.norms import RMSNorm
from ..nn.rope import RoPE
from ..nn.stack import Stack, save_matmuls
from .config import arguments, make_record
from .token_blocks import AdaptiveTokenBlock, Cached, LlamaBlock, ScaledNorm, TokenContext


@dataclass(frozen=True)
class TokenTransformerConfig:
    """How a `TokenTransformer` was made: the arguments of its constructor.

    >>> config = TokenTransformerConfig(27, depth=2, width=16, num_heads=2, max_length=8)
    >>> config.build(key=jax.random.key(0)).config.depth
    2
    """

    vocabulary: int
    depth: int
    width: int
    num_heads: int
    max_length: int
    hidden: int | None = None
    causal: bool = False
    shifted: bool = False
    block: Any = LlamaBlock
    time_embedding: Any = None
    vector_size: int = 128
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False
    attention: Attention = attend
    remat: Callable[..., Any] | None = save_matmuls
    unroll: int = 1

    def build(self, *, key) -> "TokenTransformer":
        """The network, with random weights."""
        return TokenTransformer(**arguments(self), key=key)


class TokenTransformer(eqx.Module):
    """Tokens `(n,)` to logits `(n, vocabulary)`: what stands where [MASK] does, or comes next.

    It is a denoiser of `eqxldm.discrete`: `network(x_t, t, cond)`. Rotary positions over the whole
    head, pairs being halves; then a norm and the head. With `causal` it is an autoregressive
    language model of the same size, a token seeing itself and those before.

    **Arguments**:

    - `vocabulary`: the number of tokens, [MASK] among them.
    - `depth`, `width`, `num_heads`: of the blocks; `hidden`, the MLPs' width, by default `4 width`.
    - `max_length`: the most tokens there may be.
    - `shifted`: the logits at `i` are the network's at `i - 1`, those at 0 its own first, as in
      networks that began as autoregressive ones and were trained on: Dream (Ye et al. 2025).
    - `block`: `LlamaBlock`, or `AdaptiveTokenBlock`, DiT's and MDLM's.
    - `time_embedding`: `nn.Sinusoid()`, for blocks with adaptive norms, to whose vector of
      `vector_size` the time goes. None, as by default: the network has no time. Of [MASK] none is
      needed, since `p(x0 | x_t)` does not depend on it (Ou et al. 2024; Zheng et al. 2024).
    - `rope_theta`, `norm_eps`: of the positions and the norms.
    - `tied`: the head is the table of the embeddings.
    - `attention`, `remat`, `unroll`: as for `DiT`.

    In the call, `mask` is true where a token sees another, `positions` are those of the tokens
    (by default 0, 1, ...), and `cond` is not used. The network computes in the dtype of its
    parameters: load it in bfloat16, and it is a bfloat16 network. The head starts at zero, so that
    the untrained network says that all tokens are alike.

    **Raises** `ValueError` for more tokens than `max_length`, a time that the network has not, or
    lacks, and sizes that do not divide.

    >>> network = TokenTransformer(5, depth=2, width=16, num_heads=2, max_length=8,
    ...                            key=jax.random.key(0))
    >>> network(jnp.array([0, 4, 4, 1])).shape
    (4, 5)
    """

    token_table: Float[Array, "vocabulary d"]
    blocks: Stack
    time_embedding: Callable[..., Any] | None
    norm: Callable[[Array], Array]
    final_modulation: Modulation | None
    lm_head: Linear | None
    config: TokenTransformerConfig = eqx.field(static=True)

    def __init__(
        self,
        vocabulary: int,
        *,
        depth: int,
        width: int,
        num_heads: int,
        max_length: int,
        key,
        **options: Any,
    ):
        sizes = dict(vocabulary=vocabulary, depth=depth, width=width, num_heads=num_heads)
        sizes |= dict(max_length=max_length)
        config = make_record(TokenTransformerConfig, "TokenTransformer", sizes | options)
        _check(config)
        k1, k2, k3, k4, k5 = jax.random.split(key, 5)
        timed = config.time_embedding is not None
        vector = config.vector_size if timed else None
        make_block = lambda k: config.block(
            width,
            num_heads,
            config.hidden or 4 * width,
            config.norm_eps,
            vector_size=vector,
            attention=config.attention,
            key=k,
        )
        self.token_table = normal(0.02)(k1, (vocabulary, width))
        self.blocks = Stack(make_block, depth, remat=config.remat, unroll=config.unroll, key=k2)
        self.time_embedding = (
            config.time_embedding.build(config.vector_size, key=k3) if timed else None
        )
        adaptive = config.block.timed
        self.norm = (ScaledNorm if adaptive else RMSNorm)(width, config.norm_eps)
        self.final_modulation = (
            Modulation(width, 2, in_size=vector or 1, key=k4) if adaptive else None
        )
        self.lm_head = (
            None
            if config.tied
            else Linear(width, vocabulary, init=zeros, use_bias=adaptive, key=k5)
        )
        self.config = config

    def __call__(
        self,
        ids: Int[Array, " n"],
        t: Any = None,
        cond: PyTree = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        positions: Num[Array, " n"] | Shaped[np.ndarray, " n"] | None = None,
        key: PyTree = None,
    ) -> Float[Array, "n vocabulary"]:
        n = len(ids)
        positions = np.arange(n) if positions is None else positions
        self._check_length(n if isinstance(positions, jax.Array) else int(positions.max()) + 1)
        if self.config.causal:
            before = jnp.tril(jnp.ones((n, n), bool))
            mask = before if mask is None else mask & before
        context = self._context(positions, mask, t)
        return self._logits(self.blocks(self._embed(ids), context), context)

    def empty_cache(self, n: int) -> Cached:
        """Room for the keys and values of `n` tokens in every layer.

        >>> network = TokenTransformer(5, depth=2, width=16, num_heads=2, max_length=8,
        ...                            key=jax.random.key(0))
        >>> network.empty_cache(8).keys.shape
        (2, 8, 2, 8)
        """
        self._check_length(n)
        ours = self.config
        shape = (ours.depth, n, ours.num_heads, ours.width // ours.num_heads)
        dtype = self.token_table.dtype
        return Cached(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.array(0, jnp.int32))

    def extend(
        self,
        ids: Int[Array, " m"],
        cache: Cached,
        *,
        mask: Bool[Array, "..."] | None = None,
        t: Any = None,
    ) -> tuple[Float[Array, "m vocabulary"], Cached]:
        """The logits of `m` tokens from position `cache.start` on, given the cached others.

        The tokens' own keys and values take their places in the cache that comes back, with the
        same `start`. `mask` is true where they see a position of the cache: `(n,)` or `(m, n)`.
        Logits are not `shifted` here: nothing says what stands before the first.

        >>> network = TokenTransformer(5, depth=2, width=16, num_heads=2, max_length=8,
        ...                            key=jax.random.key(0))
        >>> logits, _ = network.extend(jnp.array([1, 2]), network.empty_cache(8),
        ...                            mask=jnp.arange(8) < 2)
        >>> logits.shape
        (2, 5)
        """
        if self.config.shifted:
            raise ValueError(
                "TokenTransformer: a network with shifted logits has no cache of blocks; call it "
                "on all tokens."
            )
        n, m = cache.keys.shape[1], len(ids)
        positions = cache.start + jnp.arange(m)
        if self.config.causal:
            before = jnp.arange(n) <= positions[:, None]
            mask = before if mask is None else mask & before
        context = self._context(positions, mask, t)
        extend = lambda block, x, own: block.extend(x, context, Cached(own[0], own[1], cache.start))
        x, kept = self.blocks.each(extend, self._embed(ids), (cache.keys, cache.values))
        return self._logits(x, context), Cached(kept[0], kept[1], cache.start)

    def _check_length(self, n: int) -> None:
        if n > self.config.max_length:
            raise ValueError(
                f"TokenTransformer: at most {self.config.max_length} tokens, got {n}. Shorten the "
                "text, or make the network with a larger max_length."
            )

    def _embed(self, ids: Int[Array, " n"]) -> Float[Array, "n d"]:
        return self.token_table.at[ids].get(mode="fill", fill_value=jnp.nan)

    def _context(self, positions: Any, mask: Any, t: Any) -> TokenContext:
        ours = self.config
        size = ours.width // ours.num_heads
        rotation = RoPE((size,), ours.rope_theta, halves=True)(positions)
        vector = None
        if self.time_embedding is not None:
            if t is None:
                raise ValueError("TokenTransformer: this network needs a time t.")
            vector = jax.nn.silu(self.time_embedding(jnp.asarray(t, jnp.float32)))
        return TokenContext(mask, rotation, vector)

    def _logits(self, x: Float[Array, "n d"], context: TokenContext) -> Float[Array, "n v"]:
        x = self.norm(x)
        if self.final_modulation is not None:
            vector = jnp.zeros(1) if context.vector is None else context.vector
            x = modulate(x, *self.final_modulation(vector.astype(x.dtype)))
        head = self.lm_head
        logits = x @ self.token_table.T.astype(x.dtype) if head is None else head(x)
        if self.config.shifted:
            logits = jnp.concatenate([logits[:1], logits[:-1]])
        return logits


def _check(config: TokenTransformerConfig) -> None:
    numbers = (config.vocabulary, config.depth, config.width, config.num_heads, config.max_length)
    if min(numbers) < 1 or (config.hidden or 1) < 1:
        raise ValueError(
            f"TokenTransformer: every size must be at least 1, got vocabulary {config.vocabulary}, "
            f"depth {config.depth}, width {config.width}, num_heads {config.num_heads}, hidden "
            f"{config.hidden}, max_length {config.max_length}."
        )
    check_heads(config.width, config.num_heads)
    if config.width // config.num_heads % 2:
        raise ValueError(
            f"TokenTransformer: heads must have an even size, got {config.width} / "
            f"{config.num_heads} = {config.width // config.num_heads}."
        )
    if config.time_embedding is not None and not config.block.timed:
        raise ValueError(
            "TokenTransformer: a time_embedding needs blocks with adaptive norms: "
            "block=AdaptiveTokenBlock."
        )


def mdlm_small(vocabulary: int, max_length: int = 1024, *, key, **options: Any) -> TokenTransformer:
    """MDLM's small form: 12 blocks, 768 wide, 12 heads, the time's vector of 128.

    (Sahoo et al. 2024, appendix C.1; 169 million parameters with GPT-2's vocabulary.) It reads `t`
    itself. Options are `TokenTransformer`'s; `time_embedding=None` leaves the time out, as their
    later models do.

    >>> network = eqx.filter_eval_shape(mdlm_small, 50258, key=jax.random.key(0))
    >>> network.blocks.stacked.fc1.weight.shape
    (12, 3072, 768)
    """
    sizes: dict[str, Any] = dict(depth=12, width=768, num_heads=12, max_length=max_length)
    sizes |= dict(block=AdaptiveTokenBlock, time_embedding=Sinusoid())
    return TokenTransformer(vocabulary, **(sizes | options), key=key)


def llada_8b(*, key, **options: Any) -> TokenTransformer:
    """LLaDA-8B: LLaMA's network without a causal mask (Nie et al. 2025, table 1).

    32 blocks, 4096 wide, 32 heads, SwiGLU of 12288, 126,464 tokens of which 126,336 is [MASK], a
    context of 4096, theta 500,000. Its weights: `pretrained.load_llada(folder)`.

    >>> from eqxldm.models import parameter_count
    >>> f"{parameter_count(eqx.filter_eval_shape(llada_8b, key=jax.random.key(0))):,}"
    '8,015,581,184'
    """
    sizes: dict[str, Any] = dict(depth=32, width=4096, num_heads=32, hidden=12288)
    sizes |= dict(max_length=4096, rope_theta=500_000.0, norm_eps=1e-5)
    return TokenTransformer(126_464, **(sizes | options), key=key)
