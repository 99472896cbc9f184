"""The bound of masked diffusion and its estimators, as training objectives."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from ..objectives import AbstractObjective, Context, OneTimeObjective
from ..times import TimeSampler, stratified_time
from .masking import Masking, is_masked, mask_exactly, token_losses

Aux = dict[str, Any]
# (x_t, t, cond, *, key=) -> logits (n, v)
TokenDenoiser = Callable[..., Float[Array, "n v"]]
LONGEST = 14  # of what is enumerated: 2^14 calls of the network


class MaskedDiffusion(OneTimeObjective):
    """The negative evidence lower bound of masked diffusion, in nats a token.

    `w(t) / n  sum_{i: x_t[i] = MASK} -log p(x0[i] | x_t)`, `w = p' / p`, at one random time. Its
    mean over times and masks bounds `-log p(x0) / n` from above, whatever the schedule (Sahoo et
    al. 2024, eq. 10; Shi et al. 2024, eq. 4). Without the weight it is the loss of a BERT with
    random mask rates, and no bound. Times are stratified over the batch.

    `exp` of it is a bound of the perplexity, over `log 2` it is bits a token.

    >>> denoiser = lambda x_t, t, cond, key=None: jnp.zeros((len(x_t), 3))  # uniform: log 2
    >>> objective = MaskedDiffusion(Masking(mask_id=2))
    >>> x0, t = jnp.array([0, 1, 1]), jnp.array(1.0)  # all masked, weight 1
    >>> loss, _ = objective.loss(denoiser, x0, t, None, key=jax.random.key(0))
    >>> round(float(loss), 4)
    0.6931
    """

    path: Masking
    time_sampler: TimeSampler = eqx.field(static=True, default=stratified_time)

    def loss(
        self,
        denoiser: TokenDenoiser,
        x0: Int[Array, " n"],
        times: Float[Array, ""],
        cond: PyTree,
        *,
        key: Any,
        context: Context | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        mask_key, network_key = jax.random.split(key)
        x_t = self.path.mask(x0, times, key=mask_key)
        weight = self.path.weight(times) / len(x0)
        logits = denoiser(x_t, times, cond, key=network_key)
        return masked_sum(logits, x0, x_t, self.path.mask_id) * weight, {}


class MaskedCount(OneTimeObjective):
    """The same bound with exactly `k` tokens masked, `k` uniform in `1 .. n`, and the weight `n/k`.

    `1 / k  sum_{i: x_t[i] = MASK} -log p(x0[i] | x_t)`: of equal mean for every schedule and far
    less variance, since the number of masked tokens, and with it the weight, is no longer random
    (Nie et al. 2025, LLaDA, eq. 6; Ou et al. 2024). `k` is stratified over the batch. The network
    is told the time at which so many tokens are masked on average.

    >>> denoiser = lambda x_t, t, cond, key=None: jnp.zeros((len(x_t), 3))
    >>> objective = MaskedCount(Masking(mask_id=2))
    >>> x0, u = jnp.array([0, 1, 1]), jnp.array(0.1)  # u in (0, 1] says k = 1
    >>> loss, _ = objective.loss(denoiser, x0, u, None, key=jax.random.key(0))
    >>> round(float(loss), 4)
    0.6931
    """

    path: Masking

    time_sampler = staticmethod(stratified_time)

    def loss(
        self,
        denoiser: TokenDenoiser,
        x0: Int[Array, " n"],
        times: Float[Array, ""],
        cond: PyTree,
        *,
        key: Any,
        context: Context | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        mask_key, network_key = jax.random.split(key)
        count = jnp.clip(jnp.ceil(times * len(x0)), 1, len(x0)).astype(jnp.int32)
        x_t = mask_exactly(x0, count, self.path.mask_id, key=mask_key)
        logits = denoiser(x_t, time_of(self.path, count / len(x0)), cond, key=network_key)
        return masked_sum(logits, x0, x_t, self.path.mask_id) / count, {}


class NextToken(AbstractObjective):
    """An autoregressive model's loss, `1 / n sum_i -log p(x0[i] | x0[:i])`: the exact likelihood.

    The network is causal, and is given the tokens moved by one, `start` first: its output at `i`
    is about `x0[i]`, and `start` is never predicted. The masked models' twin.

    >>> denoiser = lambda x, t, cond, key=None: jnp.zeros((len(x), 3))
    >>> loss, _ = NextToken(start=2).loss(denoiser, jnp.array([0, 1]), jnp.array(1.0), None,
    ...                                   key=None)
    >>> round(float(loss), 4)
    0.6931
    """

    start: int = eqx.field(static=True)

    def times(self, key: Key[Array, ""], n: int) -> Float[Array, " n"]:
        return jnp.ones(n)  # there are no times; one for each example, as the batch needs

    def loss(
        self,
        denoiser: TokenDenoiser,
        x0: Int[Array, " n"],
        times: Float[Array, ""],
        cond: PyTree,
        *,
        key: Any,
        context: Context | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        logits = denoiser(moved(x0, self.start), None, cond, key=key)
        return jnp.mean(token_losses(logits, x0, self.start)), {}


def moved(x: Int[Array, " n"], start: int) -> Int[Array, " n"]:
    """`[start, x[0], ..., x[n - 2]]`: what an autoregressive network reads.

    >>> moved(jnp.array([1, 2]), 9).tolist()
    [9, 1]
    """
    return jnp.concatenate([jnp.full(1, start, x.dtype), x[:-1]])


def masked_sum(
    logits: Float[Array, "n v"],
    x0: Int[Array, " n"],
    x_t: Int[Array, " n"],
    mask_id: int,
    weight: Float[Array, " n"] | float = 1.0,
) -> Float[Array, ""]:
    """`sum_{i: x_t[i] = MASK} -w_i log p(x0[i])`.

    >>> x0, x_t = jnp.array([0, 1]), jnp.array([2, 1])
    >>> round(float(masked_sum(jnp.zeros((2, 3)), x0, x_t, 2)), 4)
    0.6931
    """
    losses = weight * token_losses(logits, x0, mask_id)
    return jnp.sum(jnp.where(is_masked(x_t, mask_id), losses, 0.0))


def time_of(path: Masking, share: Float[Array, ""]) -> Float[Array, ""]:
    """The time at which this share of the tokens is masked: `p(t) = share`, by bisection.

    >>> from .masking import cosine_masking
    >>> round(float(time_of(Masking(0, cosine_masking), jnp.array(0.5))), 4)
    0.3333
    """

    def halve(_: Any, ends: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = ends
        middle = (low + high) / 2
        below = path.probability(middle) < share
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    ends = jnp.zeros_like(share), jnp.ones_like(share)
    return jax.lax.fori_loop(0, 24, halve, ends)[1]


def exact_bound(
    denoiser: TokenDenoiser, x0: Int[Array, " n"], mask_id: int, cond: PyTree = None
) -> Float[Array, ""]:
    """The bound of one sequence without any chance, in nats: all `2^n - 1` masks are tried.

    `sum_S 1 / (k C(n, k)) sum_{i in S} -log p(x0[i] | x0 without S)`, `k = |S|`: over the times
    integrated, a set of `k` masked tokens has this weight for every schedule. Where the network
    has the true conditionals it is `-log p(x0)`. For `n <= 14`, and a network without time.

    **Raises** `ValueError` for a longer sequence.

    >>> uniform = lambda x_t, t, cond, key=None: jnp.zeros((len(x_t), 3))
    >>> round(float(exact_bound(uniform, jnp.array([0, 1, 0]), 2) / jnp.log(2)), 4)
    3.0
    """
    n = len(x0)
    if n > LONGEST:
        raise ValueError(
            f"exact_bound: 2^n masks are tried, so at most {LONGEST} tokens; got {n}. Average "
            "MaskedCount's loss instead."
        )
    subsets = (np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1 > 0
    counts = subsets.sum(1)
    binomials = np.array([1.0, *np.cumprod((n - np.arange(n)) / (1 + np.arange(n)))])
    weights = jnp.asarray(1 / (counts * binomials[counts]), jnp.float32)

    def term(subset: Any, weight: Any) -> Any:
        x_t = jnp.where(subset, mask_id, x0)
        return weight * masked_sum(denoiser(x_t, None, cond, key=None), x0, x_t, mask_id)

    return jnp.sum(jax.lax.map(lambda args: term(*args), (jnp.asarray(subsets), weights)))
