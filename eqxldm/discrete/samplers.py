"""Samplers of masked diffusion: which of the masked tokens are revealed at a call."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from .drawing import check_drawing, draw_tokens
from .masking import Masking

# (log_p, tokens, key) -> how early each position is revealed, the highest first
Score = Callable[..., Float[Array, " n"]]


class TokenPlan(eqx.Module):
    """The network calls of a run, one entry each.

    `t` and `s`: the times that the call leads from and to; `left`: the calls that are left for the
    positions `start <= i < stop`, this one included.

    >>> plan = Ordered().plan(Masking(2), 2, 8)
    >>> plan.t.tolist(), plan.s.tolist(), plan.left.tolist()
    ([1.0, 0.5], [0.5, 0.0], [2, 1])
    """

    t: Any
    s: Any
    left: Any
    start: Any
    stop: Any


def padded_plan(plan: TokenPlan, steps: int) -> TokenPlan:
    """A plan with its last entry repeated up to `steps`, so that plans of any length fit a program.

    Nothing is masked any more where the repetitions begin: they call no network.

    >>> padded_plan(Ordered().plan(Masking(2), 2, 8), 4).left.tolist()
    [2, 1, 1, 1]
    """
    more = steps - len(plan.t)
    if more < 0:
        raise ValueError(f"padded_plan: the plan has {len(plan.t)} steps, more than {steps}.")
    return jax.tree.map(lambda a: np.concatenate([a, np.repeat(a[-1:], more, axis=0)]), plan)


class AbstractTokenSampler(eqx.Module):
    """A sampler of tokens. To add one, write `reveal`; `plan`, `init` and `step` may stay.

    `temperature` and `top_p` are those of `draw_tokens`. A token that is revealed stays: only
    [MASK] is ever replaced, so that prompts and infilling are sequences with tokens in them.

    **Raises** `ValueError` for a temperature below 0, and a `top_p` outside (0, 1].
    """

    temperature: float = eqx.field(static=True, default=1.0, kw_only=True)
    top_p: float = eqx.field(static=True, default=1.0, kw_only=True)

    def __check_init__(self):
        check_drawing(type(self).__name__, self.temperature, self.top_p)

    def plan(self, path: Masking, steps: int, n: int) -> TokenPlan:
        """`steps` calls over even times from 1 to 0, all of `n` positions open from the first."""
        check_steps(type(self).__name__, steps)
        times = np.linspace(1, 0, steps + 1)
        whole = np.zeros(steps, np.int32), np.full(steps, n, np.int32)
        return TokenPlan(times[:-1], times[1:], np.arange(steps, 0, -1), *whole)

    def init(self, x: Int[Array, " n"]) -> Any:
        """What is carried from call to call besides the tokens; None for nothing."""
        return None

    def step(
        self,
        table: TokenPlan,
        path: Masking,
        x: Int[Array, " n"],
        log_p: Float[Array, "n v"],
        carry: Any,
        *,
        key: Key[Array, ""],
    ) -> tuple[Int[Array, " n"], Any]:
        """What follows one call at `x`; `table` is the plan's entry for it."""
        draw_key, order_key = jax.random.split(key)
        options: dict[str, Any] = dict(temperature=self.temperature, top_p=self.top_p)
        tokens = draw_tokens(log_p, key=draw_key, **options)
        return self.put(table, path, x, log_p, tokens, carry, key=order_key)

    def put(
        self,
        table: TokenPlan,
        path: Masking,
        x: Int[Array, " n"],
        log_p: Float[Array, "n v"],
        tokens: Int[Array, " n"],
        carry: Any,
        *,
        key: Key[Array, ""],
    ) -> tuple[Int[Array, " n"], Any]:
        """The second half of `step`: some of the `tokens` that were drawn take their places."""
        place = jnp.arange(len(x))
        open_ = (x == path.mask_id) & (place >= table.start) & (place < table.stop)
        revealed = open_ & self.reveal(table, path, open_, log_p, tokens, key=key)
        return jnp.where(revealed, tokens, x), carry

    @abc.abstractmethod
    def reveal(
        self,
        table: TokenPlan,
        path: Masking,
        open_: Bool[Array, " n"],
        log_p: Float[Array, "n v"],
        tokens: Int[Array, " n"],
        *,
        key: Key[Array, ""],
    ) -> Bool[Array, " n"]:
        """Which of the open positions get the `tokens` that were drawn for them."""


class Ancestral(AbstractTokenSampler):
    """The reverse process: each masked token is revealed with probability `1 - p(s) / p(t)`.

    Independently of the others, so that some calls reveal none: the network's answer is then used
    again (`sample_tokens`). Exact in the limit of many steps (Sahoo et al. 2024, eq. 7; the reuse
    is their `ddpm_cache`).

    >>> Ancestral(temperature=0.9).top_p
    1.0
    """

    def reveal(self, table, path, open_, log_p, tokens, *, key):
        chance = path.reveals(table.t, table.s)
        return jax.random.uniform(key, open_.shape) < chance


class Ordered(AbstractTokenSampler):
    """As many positions at each call, those with the highest `score` first.

    Of `m` that are open and `k` calls left, `ceil(m / k)` are revealed: the remainder goes to the
    first calls, as in LLaDA. The scores:

    - `likeliest`: the probability of the likeliest token: low-confidence remasking.
    - `drawn`: that of the token that was drawn, LLaDA's and MaskGIT's. At temperatures above 0 it
      prefers places where a likely token was drawn, and so is not exact at one token a call.
    - `margin`: of the likeliest over the next; `certainty`: minus the entropy; `at_random`.

    The first is the default. (Nie et al. 2025, section 2.4; Chang et al. 2022; Kim et al. 2025)

    >>> Ordered(margin, temperature=0.0).score is margin
    True
    """

    score: Score = eqx.field(static=True, default_factory=lambda: likeliest)

    def reveal(self, table, path, open_, log_p, tokens, *, key):
        place = ranks(self.score(log_p, tokens, key), open_)
        return place < at_least(open_, table.left)


class EntropyBounded(AbstractTokenSampler):
    """As many at once as are nearly independent: in the order of their entropies `H`, those for
    which `sum H - max H <= bound`, in nats.

    The left side bounds the mutual information that is neglected by drawing them independently
    (Ben-Hamu et al. 2025, section 3.2). At least one, and the plan's share of what is left.

    >>> EntropyBounded(bound=0.1).bound
    0.1
    """

    bound: float = eqx.field(static=True, default=0.1)

    def reveal(self, table, path, open_, log_p, tokens, *, key):
        entropy = -certainty(log_p, tokens, key)
        order = jnp.argsort(jnp.where(open_, entropy, jnp.inf))
        before = jnp.cumsum(jnp.where(open_, entropy, 0.0)[order])
        accepted = before - entropy[order] <= self.bound  # ascending: the last is the largest
        place = ranks(-entropy, open_)
        return accepted[place] | (place < at_least(open_, table.left))


class Threshold(AbstractTokenSampler):
    """All whose likeliest token has more than `confidence`, and the plan's share of what is left.

    Few calls where the network is sure (Wu et al. 2025, Fast-dLLM, section 3.3: 0.9).

    >>> Threshold(0.9).confidence
    0.9
    """

    confidence: float = eqx.field(static=True, default=0.9)

    def reveal(self, table, path, open_, log_p, tokens, *, key):
        score = likeliest(log_p, tokens, key)
        sure = score > jnp.log(self.confidence)
        return sure | (ranks(score, open_) < at_least(open_, table.left))


class InBlocks(AbstractTokenSampler):
    """Another sampler, over one block of positions after the other: semi-autoregressive.

    The later blocks are masked, and seen as such (Nie et al. 2025, section 2.4). The blocks have
    `block_size` positions from `start` on, such as the length of a prompt, and share the calls
    evenly, the first getting what is left over.

    **Raises** `ValueError` for fewer calls than blocks.

    >>> InBlocks(Ordered(), block_size=2).plan(Masking(2), 4, 4).stop.tolist()
    [2, 2, 4, 4]
    """

    sampler: AbstractTokenSampler
    block_size: int = eqx.field(static=True)
    start: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        if (self.temperature, self.top_p) != (1.0, 1.0):
            raise ValueError("InBlocks: give temperature and top_p to the sampler inside.")
        if self.block_size < 1 or self.start < 0:
            raise ValueError(
                "InBlocks: block_size must be at least 1 and start 0 or above, got "
                f"{self.block_size} and {self.start}."
            )

    def plan(self, path: Masking, steps: int, n: int) -> TokenPlan:
        starts = np.arange(self.start, n, self.block_size)
        if not 1 <= len(starts) <= steps:
            raise ValueError(
                f"InBlocks: {len(starts)} blocks of {self.block_size} in {n - self.start} "
                f"positions need one call each at least, got {steps} steps. Take more steps or "
                "larger blocks."
            )
        parts = []
        for i, start in enumerate(starts):
            calls = steps // len(starts) + (i < steps % len(starts))
            part = self.sampler.plan(path, calls, n)
            row = lambda value, calls=calls: np.full(calls, value, np.int32)
            stop = min(start + self.block_size, n)
            parts.append(TokenPlan(part.t, part.s, part.left, row(start), row(stop)))
        return jax.tree.map(lambda *a: np.concatenate(a), *parts)

    def init(self, x):
        return self.sampler.init(x)

    def step(self, table, path, x, log_p, carry, *, key):
        return self.sampler.step(table, path, x, log_p, carry, key=key)  # the table has the block

    def put(self, table, path, x, log_p, tokens, carry, *, key):
        return self.sampler.put(table, path, x, log_p, tokens, carry, key=key)

    def reveal(self, table, path, open_, log_p, tokens, *, key):
        return self.sampler.reveal(table, path, open_, log_p, tokens, key=key)


def likeliest(log_p: Float[Array, "n v"], tokens: Any, key: Any) -> Float[Array, " n"]:
    """The log-probability of the likeliest token.

    >>> likeliest(jnp.log(jnp.array([[0.25, 0.75]])), None, None).round(2)
    Array([-0.29], dtype=float32)
    """
    return jnp.max(log_p, axis=-1)


def drawn(log_p: Float[Array, "n v"], tokens: Int[Array, " n"], key: Any) -> Float[Array, " n"]:
    """The log-probability of the token that was drawn.

    >>> drawn(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([0]), None).round(2)
    Array([-1.39], dtype=float32)
    """
    return jnp.take_along_axis(log_p, tokens[:, None], axis=-1)[:, 0]


def margin(log_p: Float[Array, "n v"], tokens: Any, key: Any) -> Float[Array, " n"]:
    """The probability of the likeliest token less that of the next.

    >>> margin(jnp.log(jnp.array([[0.25, 0.75]])), None, None).round(2)
    Array([0.5], dtype=float32)
    """
    best, next_ = jnp.moveaxis(jax.lax.top_k(log_p, 2)[0], -1, 0)
    return jnp.exp(best) - jnp.exp(next_)


def certainty(log_p: Float[Array, "n v"], tokens: Any, key: Any) -> Float[Array, " n"]:
    """Minus the entropy, `sum p log p`.

    >>> certainty(jnp.log(jnp.array([[0.5, 0.5]])), None, None).round(2)
    Array([-0.69], dtype=float32)
    """
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)


def at_random(log_p: Float[Array, "n v"], tokens: Any, key: Any) -> Float[Array, " n"]:
    """Any order, all alike.

    >>> at_random(jnp.zeros((3, 2)), None, jax.random.key(0)).shape
    (3,)
    """
    return jax.random.uniform(key, log_p.shape[:1])


def ranks(score: Float[Array, " n"], open_: Bool[Array, " n"]) -> Int[Array, " n"]:
    """The place of each open position in descending order of the scores; the others come last.

    >>> ranks(jnp.array([1.0, 3.0, 2.0]), jnp.array([True, False, True])).tolist()
    [1, 2, 0]
    """
    return jnp.argsort(jnp.argsort(jnp.where(open_, -score, jnp.inf)))


def at_least(open_: Bool[Array, " n"], left: Int[Array, ""]) -> Int[Array, ""]:
    """The share of the open positions that a call must reveal: `ceil(m / left)`.

    >>> int(at_least(jnp.ones(5, bool), jnp.array(2)))
    3
    """
    return -(-jnp.sum(open_) // left)


def check_steps(name: str, steps: int) -> None:
    """`ValueError` for fewer than one step.

    >>> check_steps("Ordered", 1)
    """
    if steps < 1:
        raise ValueError(f"{name}: steps must be at least 1, got {steps}.")
