"""Ancestral sampling, and the variances that its steps may have."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..diffusion import Diffusion, Estimate
from ..paths import AbstractPath, Time, posterior_coefficients, transition_coefficients
from ..predictions import LearnedRange
from .base import (
    AbstractSolver,
    Interval,
    Plan,
    X,
    as_like,
    check_descending,
    interval_at,
    intervals,
    normal,
)

Variance = Callable[[Interval], tuple[Time, Time | None]]


def fixed_small(interval: Interval) -> tuple[Time, None]:
    """`log(beta-tilde)`: of the variance of `q(x_s | x_t, x0)`, right for data at one point.

    On the step to `s = 0`, where that variance is 0, it is the one of the step before: what the
    decoder's likelihood of the variational bound takes; no noise is drawn there (Ho et al. 2020,
    section 3.2; the clipping is Nichol & Dhariwal 2021's).

    >>> from eqxldm import LinearFlow
    >>> log_variance, _ = fixed_small(intervals(LinearFlow(), np.array([1.0, 0.5, 0.0])))
    >>> np.exp(log_variance).round(4)
    array([0.25, 0.25])
    """
    variance = posterior_coefficients(interval.at_s, interval.at_t)[2]
    with np.errstate(divide="ignore", invalid="ignore"):
        before = posterior_coefficients(interval.at_t, interval.at_before)[2]
    largest = transition_coefficients(interval.at_s, interval.at_t)[1]
    xp = jnp if isinstance(variance, jax.Array) else np
    clipped = xp.where(before > 0, before, largest)  # a single step has none before it
    return xp.log(xp.where(variance > 0, variance, clipped)), None


def fixed_large(interval: Interval) -> tuple[Time, None]:
    """`log(beta)`: of the variance of `q(x_t | x_s)`, right for data that is `N(0, I)`.

    (Ho et al. 2020, section 3.2)

    >>> from eqxldm import LinearFlow
    >>> log_variance, _ = fixed_large(intervals(LinearFlow(), np.array([0.5, 0.0])))
    >>> np.exp(log_variance).round(4)
    array([0.25])
    """
    beta = transition_coefficients(interval.at_s, interval.at_t)[1]
    return (jnp if isinstance(beta, jax.Array) else np).log(beta), None


def learned_range(interval: Interval) -> tuple[Time, Time]:
    """The range `(log(beta-tilde), log(beta))` in which the network chooses, element by element.

    (Nichol & Dhariwal 2021, eq. 15.) Needs a network and a prediction of `LearnedRange`.

    >>> from eqxldm import LinearFlow
    >>> low, high = learned_range(intervals(LinearFlow(), np.array([0.5, 0.25])))
    >>> bool(low[0] < high[0])
    True
    """
    return fixed_small(interval)[0], fixed_large(interval)[0]


def log_variance(low: Any, high: Any, estimate: Estimate) -> Any:
    """The log-variance that a network chose in a range: `w high + (1 - w) low`, `w = (u + 1) / 2`.

    With no range, `low`.

    >>> estimate = Estimate(jnp.zeros(1), jnp.zeros(1), jnp.zeros(1))
    >>> log_variance(jnp.array(-2.0), jnp.array(0.0), estimate)
    Array([-1.], dtype=float32)
    """
    if high is None:
        return low
    if estimate.range is None:
        raise ValueError(
            "learned_range: the network's output has no variance. Wrap the prediction, as in "
            "LearnedRange(predict_eps), or choose fixed_small or fixed_large."
        )
    return low + (estimate.range.astype(low.dtype) + 1) / 2 * (high - low)


class DDPM(AbstractSolver):
    """Ancestral sampling: `x_s = c0 x0 + ct x_t + sqrt(var) noise`, the mean of `q(x_s | x_t, x0)`.

    (Ho et al. 2020, algorithm 2, eq. 7.) `variance` is `fixed_small`, `fixed_large`,
    `learned_range`, or any function of the interval to a log-variance (or to two, between which
    the network chooses). The step to `s = 0` draws no noise and returns `x0`. Over
    `timestep_times(T, respace(T, [n]))` this is the respaced sampler of guided-diffusion and
    DiT; their clipping of `x0` is `sample(..., denoised_fn=...)`.

    A grid may go back up, as RePaint's does (`times.repaint_times`): from `s` to `u > s` the state
    is noised again by the forward process, `x_u = r x_s + sqrt(var) noise`, without a network call
    (Lugmayr et al. 2022, algorithm 1).

    >>> import eqxldm as ex
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0)
    >>> diffusion = ex.Diffusion(ex.CosineVP(), ex.predict_x0)
    >>> ex.sample(denoiser, diffusion, DDPM(), ex.uniform_times(3), jnp.ones(1),
    ...           key=jax.random.key(0))
    Array([7.], dtype=float32)
    """

    variance: Variance = eqx.field(static=True, default=fixed_small)

    @property
    def goes_back_up(self) -> bool:
        return True

    def check(self, diffusion: Diffusion) -> None:
        if self.variance is learned_range and not isinstance(diffusion.prediction, LearnedRange):
            raise ValueError(
                "DDPM(learned_range) needs a network that outputs its variance. Wrap the "
                "prediction, as in LearnedRange(predict_eps), or choose fixed_small or fixed_large."
            )

    def plan(self, path: AbstractPath, times: Any) -> Plan:
        check_descending(self, times)
        if isinstance(times, jax.Array):  # a traced grid: only its length is known, so it descends
            i, up = intervals(path, times), times[1:]
        else:
            i, up = _descents(path, times)
        c0, ct, _ = posterior_coefficients(i.at_s, i.at_t)
        low, high = self.variance(i)
        noisy = i.at_s.sigma > 0
        # Up from s by one jump of the forward process; where the grid goes on at s itself, r = 1.
        with np.errstate(invalid="ignore", divide="ignore"):
            r, again = transition_coefficients(i.at_s, path.coefficients(up))
        xp = jnp if isinstance(times, jax.Array) else np
        r, again = (xp.where(up > i.s, a, b) for a, b in ((r, 1.0), (again, 0.0)))
        step = np.arange(len(i.t))
        return Plan(i.t, i.s, step, (c0, ct, low, high, noisy, r, again))

    def init(self, x: X) -> Any:
        return None

    def step(self, table, x, estimate, carry, *, key):
        c0, ct, low, high, noisy, r, again = table
        c0, ct, low, high, r, again = as_like(x, c0, ct, low, high, r, again)
        variance = jnp.exp(log_variance(low, high, estimate))
        variance = jnp.where(noisy, variance, jnp.zeros_like(variance))
        # Both draws are independent, so they are one.
        noise = jnp.sqrt(r * r * variance + again) * normal(key, x)
        return r * (c0 * estimate.x0 + ct * x) + noise, carry


def _descents(path: AbstractPath, times: np.ndarray) -> tuple[Interval, np.ndarray]:
    """The steps down of a grid, and where the next one begins: at `s`, or above it."""
    down = np.flatnonzero(times[1:] < times[:-1])
    t, s = times[down], times[down + 1]
    follows = np.append(False, down[1:] == down[:-1] + 1)  # and no rise between
    before = np.where(follows, np.append(t[:1], t[:-1]), t)
    return interval_at(path, t, s, before), np.append(t[1:], s[-1:])
