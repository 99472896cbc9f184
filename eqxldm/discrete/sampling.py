"""The sampling loop over batches of tokens, guidance by a prompt, and an autoregressive loop."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PyTree

from ..sharding import batch_vmap
from .drawing import draw_tokens
from .masking import Masking, log_probabilities
from .objectives import TokenDenoiser
from .samplers import AbstractTokenSampler, TokenPlan


class TokenSamples(NamedTuple):
    """The tokens, how often the network was called, and the tokens after each step if asked for."""

    tokens: Int[Array, "b n"]
    calls: Int[Array, ""]
    trajectory: Int[Array, "steps b n"] | None = None


def sample_tokens(
    denoiser: TokenDenoiser,
    path: Masking,
    sampler: AbstractTokenSampler,
    steps: int | TokenPlan,
    x: Int[Array, "b n"],
    cond: PyTree = None,
    *,
    key: Key[Array, ""],
    reuse: bool = True,
    trajectory: bool = False,
) -> TokenSamples:
    """A batch of sequences, every [MASK] in them replaced: from nothing, after a prompt, between.

    **Arguments**:

    - `denoiser`: of one example, `denoiser(x_t, t, cond, key=)` to logits.
    - `sampler`, `steps`: which tokens are revealed in how many steps; or the sampler's plan, which
      may be an argument of a compiled program (`padded_plan`).
    - `x`: what is known, and [MASK] elsewhere: `jnp.full((b, n), mask_id)` is nothing.
    - `cond`: for each sequence, with a leading axis.
    - `reuse`: do not call the network again while no token of the batch has changed. Right for
      networks without time; False for others.
    - `trajectory`: also give the tokens after each step.

    The whole batch and not one example, as elsewhere: whether a call can be left out is one
    question for all. When nothing is masked any more, or nothing is in the block at hand, no
    network is called either, so `calls` may be less than `steps`. One program for all prompts.

    What a sequence becomes does not depend on how many others there are: its key is
    `fold_in(key, i)`, and `step_keys` those of a step.

    >>> from .samplers import Ordered
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.zeros((len(x_t), 3)).at[:, 1].set(9.0)
    >>> x = jnp.array([[0, 2, 2, 2]])  # a prompt of one token
    >>> found = sample_tokens(denoiser, Masking(mask_id=2), Ordered(temperature=0.0), 3, x,
    ...                       key=jax.random.key(0))
    >>> found.tokens.tolist(), int(found.calls)
    ([[0, 1, 1, 1]], 3)
    """
    b, n = x.shape
    plan = steps if isinstance(steps, TokenPlan) else sampler.plan(path, steps, n)
    plan = jax.tree.map(jnp.asarray, plan)
    place = jnp.arange(n)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(b))

    def ask(x: Array, t: Array, keys: Array) -> Array:
        one = lambda x, cond, key: log_probabilities(denoiser(x, t, cond, key=key), path.mask_id)
        return batch_vmap(one)(x, cond, keys)

    def step(state: Any, row: Any) -> tuple[Any, Any]:
        x, log_p, known, carry, calls = state
        table, number = row
        ask_keys, draw_keys = jax.vmap(step_keys, (0, None))(keys, number)
        inside = (place >= table.start) & (place < table.stop)
        wanted = jnp.any((x == path.mask_id) & inside) & ~known
        t = table.t.astype(jnp.float32)
        log_p = jax.lax.cond(wanted, lambda: ask(x, t, ask_keys), lambda: log_p)
        advance = lambda x, log_p, carry, key: sampler.step(table, path, x, log_p, carry, key=key)
        new, carry = batch_vmap(advance)(x, log_p, carry, draw_keys)
        # Blocks without a mask ask for nothing: what is known is then of the tokens before.
        known = jnp.all(new == x) & (known | wanted) & reuse
        return (new, log_p, known, carry, calls + wanted), (new if trajectory else None)

    shape = jax.eval_shape(ask, x, plan.t[0].astype(jnp.float32), keys)
    begin = jnp.zeros(shape.shape, shape.dtype)
    state = x, begin, jnp.array(False), jax.vmap(sampler.init)(x), jnp.array(0, jnp.int32)
    state, history = jax.lax.scan(step, state, (plan, jnp.arange(len(plan.t))))
    return TokenSamples(state[0], state[4], history)


def step_keys(key: Key[Array, ""], number: Int[Array, ""]) -> tuple[Any, Any]:
    """The network's key and the sampler's at step `number` of a sequence with this key.

    >>> len(step_keys(jax.random.key(0), 3))
    2
    """
    ask_key, draw_key = jax.random.split(jax.random.fold_in(key, number))
    return ask_key, draw_key


def guide_prompt(denoiser: TokenDenoiser, mask_id: int, scale: float) -> TokenDenoiser:
    """Classifier-free guidance by the prompt: `without + scale (with - without)` of the logits.

    "Without" is the same sequence with its prompt masked (Nie et al. 2025, appendix B.3, whose
    `w + 1` is `scale`: 1 is the network alone). The condition of the denoiser that comes back is
    true where the prompt stands, `(n,)`.

    >>> seen = lambda x_t, t, cond, key=None: jnp.stack([x_t == 2, x_t != 2], 1).astype(float)
    >>> guided = guide_prompt(seen, mask_id=2, scale=3.0)
    >>> guided(jnp.array([0, 2]), None, jnp.array([True, False])).tolist()
    [[-2.0, 3.0], [1.0, 0.0]]
    """
    if scale == 1:
        return lambda x_t, t, cond, *, key=None: denoiser(x_t, t, None, key=key)

    def guided(x_t: Any, t: Any, cond: Any, *, key: Any = None) -> Array:
        hidden = jnp.where(cond, mask_id, x_t)
        out = denoiser(x_t, t, None, key=key)
        without = denoiser(hidden, t, None, key=key)
        return without + scale * (out - without)

    return guided


def sample_next_tokens(
    network: Any,
    start: int,
    n: int,
    batch: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    key: Key[Array, ""],
) -> Int[Array, "b n"]:
    """Sequences of an autoregressive network, a token a call, with its cache of keys and values.

    `network` has `empty_cache` and `extend`, as a causal `models.TokenTransformer` does; `start`
    stands before the first token and is never drawn.
    """

    def one(key: Any) -> Array:
        def step(state: Any, i: Any) -> tuple[Any, Any]:
            token, cache = state
            logits, cache = network.extend(token[None], cache._replace(start=i))
            log_p = log_probabilities(logits, start)
            new = draw_tokens(
                log_p, temperature=temperature, top_p=top_p, key=jax.random.fold_in(key, i)
            )
            return (new[0], cache), new[0]

        first = jnp.array(start, jnp.int32), network.empty_cache(n)
        return jax.lax.scan(step, first, jnp.arange(n, dtype=jnp.int32))[1]

    return batch_vmap(one)(jax.random.split(key, batch))


def sample_blocks(
    network: Any,
    path: Masking,
    sampler: AbstractTokenSampler,
    steps: int,
    x: Int[Array, "b n"],
    *,
    block_size: int,
    exact: bool = True,
    key: Key[Array, ""],
) -> Int[Array, "b n"]:
    """One block of positions after the other, with a cache of keys and values.

    **Arguments**:

    - `network` has `empty_cache` and `extend`, as `models.TokenTransformer` does, and no time.
    - `sampler`, `steps`: how each block is filled.
    - `exact`: for networks of block diffusion, which see clean blocks before and their own alone:
      a finished block is put into the cache by one more call, and the calls in a block are over
      its tokens only (Arriola et al. 2025, algorithm 2). False: for networks that see everything,
      an approximation: one call over all tokens when a block begins, whose keys and values stay
      for those of the other blocks while this one is filled (Wu et al. 2025, Fast-dLLM's
      DualCache).

    **Raises** `ValueError` unless `block_size` divides the length.
    """
    b, n = x.shape
    if block_size < 1 or n % block_size:
        raise ValueError(
            f"sample_blocks: {n} tokens do not divide into blocks of {block_size}. Fill up the "
            "sequence, or choose a block_size that divides it."
        )
    plan = jax.tree.map(jnp.asarray, sampler.plan(path, steps, block_size))
    place = jnp.arange(n)

    def one(x: Any, key: Any) -> Array:
        def fill(state: Any, begin: Any) -> tuple[Any, None]:
            x, cache = state
            if not exact:
                cache = network.extend(x, cache._replace(start=jnp.array(0, jnp.int32)))[1]
            cache = cache._replace(start=begin)
            sees = place < begin + block_size if exact else None

            def step(state: Any, row: Any) -> tuple[Any, None]:
                own, carry = state
                table, number = row
                logits, _ = network.extend(own, cache, mask=sees)
                log_p = log_probabilities(logits, path.mask_id)
                step_key = jax.random.fold_in(jax.random.fold_in(key, begin), number)
                return sampler.step(table, path, own, log_p, carry, key=step_key), None

            own = jax.lax.dynamic_slice(x, (begin,), (block_size,))
            state, _ = jax.lax.scan(step, (own, sampler.init(own)), (plan, jnp.arange(len(plan.t))))
            x = jax.lax.dynamic_update_slice(x, state[0], (begin,))
            if exact:
                cache = network.extend(state[0], cache, mask=sees)[1]
            return (x, cache), None

        begins = jnp.arange(0, n, block_size, dtype=jnp.int32)
        return jax.lax.scan(fill, (x, network.empty_cache(n)), begins)[0][0]

    return batch_vmap(one)(x, jax.random.split(key, b))
