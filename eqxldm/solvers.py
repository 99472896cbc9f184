"""Solvers of the reverse process: each a plan, an `init` and a `step`.

A solver goes along a time grid. Its `plan` says at which times the network is called and holds
all coefficients that depend on time alone, computed once for the whole grid: in float64 when the
grid is NumPy. Its `step` is what happens to `x` after one call: algebra on arrays, no network, no
loop. `sampling.sample` scans `step` over the plan.

| solver | solves | order | network calls in N steps | noise |
|---|---|---|---|---|
| `DDPM` | ancestral sampling | 1 | N | yes |
| `DDIM` | ODE, in `(x / alpha, sigma / alpha)` | 1 | N | for `eta > 0` |
| `Euler` | ODE, in `(x, t)` | 1 | N | no |
| `Heun` | ODE, in `(x, t)` | 2 | 2 N - 1 | no |
| `EulerMaruyama` | SDE | 1 (weak) | N | yes |
| `DPMSolverPP2M` | ODE or SDE, in logSNR | 2 | N | for `eta > 0` |

The ODE solvers also run from data to noise (`sampling.encode`).
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from .paths import (
    AbstractPath,
    Coefficients,
    Time,
    posterior_coefficients,
    transition_coefficients,
)

X = Float[Array, "*shape"]


class Estimate(eqx.Module):
    """What one network call says: `x0`, `eps`, and where the variance lies if it is learned.

    `x_t = alpha x0 + sigma eps` holds. `range` is the network's `u` in about [-1, 1], or None
    (`predictions.LearnedRange`).

    >>> estimate = Estimate(jnp.ones(2), jnp.zeros(2))
    >>> estimate.range is None
    True
    """

    x0: X
    eps: X
    range: X | None = None


class Plan(eqx.Module):
    """The network calls of a run: their times, the step each belongs to, and their coefficients.

    >>> from eqxldm import LinearFlow
    >>> plan = DDIM().plan(LinearFlow(), np.array([1.0, 0.5, 0.0]))
    >>> plan.t, plan.step
    (array([1. , 0.5]), array([0, 1]))
    """

    t: Time
    step: Any
    table: Any


class Interval(eqx.Module):
    """The steps `t -> s` of a grid and the path's coefficients at their ends.

    `at_before` belongs to the step before, the one that ended at `t`: where it began. The first
    step has none before it, and there it is `at_t`.

    >>> from eqxldm import LinearFlow
    >>> interval = intervals(LinearFlow(), np.array([1.0, 0.5, 0.0]))
    >>> interval.s, interval.at_before.sigma
    (array([0.5, 0. ]), array([1., 1.]))
    """

    t: Time
    s: Time
    at_t: Coefficients
    at_s: Coefficients
    at_before: Coefficients


def intervals(path: AbstractPath, times: Any) -> Interval:
    """The intervals of a grid, as arrays with one entry a step.

    >>> from eqxldm import LinearFlow
    >>> intervals(LinearFlow(), np.array([1.0, 0.5, 0.0])).at_t.sigma
    array([1. , 0.5])
    """
    xp = jnp if isinstance(times, jax.Array) else np
    before = xp.concatenate([times[:1], times[:-2]])
    at = path.coefficients
    return Interval(times[:-1], times[1:], at(times[:-1]), at(times[1:]), at(before))


class AbstractSolver(eqx.Module):
    """A solver. To add one, write these three functions.

    >>> class Nearest(AbstractSolver):  # x_s = alpha_s x0 + sigma_s eps
    ...     def plan(self, path, times):
    ...         at_s = path.coefficients(times[1:])
    ...         return one_call_a_step(times, (at_s.alpha, at_s.sigma))
    ...     def init(self, x):
    ...         return None
    ...     def step(self, table, x, estimate, carry, *, key):
    ...         alpha, sigma = table
    ...         return alpha * estimate.x0 + sigma * estimate.eps, carry
    """

    @abc.abstractmethod
    def plan(self, path: AbstractPath, times: Any) -> Plan:
        """The network calls over a grid, and the solver's coefficients for each."""

    @abc.abstractmethod
    def init(self, x: X) -> Any:
        """What the solver carries from call to call besides `x`; None for nothing."""

    @abc.abstractmethod
    def step(
        self, table: Any, x: X, estimate: Estimate, carry: Any, *, key: Key[Array, ""]
    ) -> tuple[X, Any]:
        """What follows one network call at `x`: the next `x` and the next carry."""


def one_call_a_step(times: Any, table: Any) -> Plan:
    """The plan of a solver that calls the network once a step, where the step begins.

    >>> one_call_a_step(np.array([1.0, 0.0]), None).t
    array([1.])
    """
    return Plan(times[:-1], np.arange(len(times) - 1), table)


class Euler(AbstractSolver):
    """`x_s = x_t + (s - t) (alpha' x0 + sigma' eps)`: Euler on the probability-flow ODE.

    (Song et al. 2021b, eq. 13; Lipman et al. 2023.) First order, one network call a step. On a
    `LinearFlow` this equals DDIM with `eta = 0`.

    >>> import eqxldm as ex
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0)
    >>> ex.sample(denoiser, ex.LinearFlow(), ex.predict_x0, Euler(), ex.uniform_times(3),
    ...           jnp.ones(1), key=jax.random.key(0)).round(4)
    Array([7.], dtype=float32)
    """

    def plan(self, path: AbstractPath, times: Any) -> Plan:
        i = intervals(path, times)
        dt = i.s - i.t
        return one_call_a_step(times, (dt * i.at_t.dalpha, dt * i.at_t.dsigma))

    def init(self, x: X) -> Any:
        return None

    def step(self, table, x, estimate, carry, *, key):
        a, b = _as(x, *table)
        return x + a * estimate.x0 + b * estimate.eps, carry


class Heun(AbstractSolver):
    """`x_s = x_t + (s - t) (d_t + d_s) / 2`, `d = alpha' x0 + sigma' eps`: Heun's method.

    `d_s` is taken at Euler's `x_s` (Karras et al. 2022, algorithm 1, there in sigma instead of
    t). Second order, two network calls a step; the step to `t = 0` is Euler's, with one.

    >>> import eqxldm as ex
    >>> ex.nfe(ex.LinearFlow(), Heun(), ex.uniform_times(10))
    19
    """

    def plan(self, path: AbstractPath, times: Any) -> Plan:
        xp = jnp if isinstance(times, jax.Array) else np
        calls = np.arange(2 * (len(times) - 1))
        if not isinstance(times, jax.Array) and times[-1] == 0:
            calls = calls[:-1]
        step, corrects = calls // 2, calls % 2 == 1
        t = times[step + corrects]
        at, dt = path.coefficients(t), (times[1:] - times[:-1])[step]
        weight = xp.where(corrects, dt / 2, dt)
        undone = 0.5 * corrects.astype(t.dtype)
        return Plan(t, step, (weight * at.dalpha, weight * at.dsigma, undone))

    def init(self, x: X) -> Any:
        return jnp.zeros_like(x)

    def step(self, table, x, estimate, carry, *, key):
        a, b, undone = _as(x, *table)
        moved = a * estimate.x0 + b * estimate.eps
        # Euler's step; then half of the new slope in the place of half of the old one.
        return x + moved - undone * carry, moved


class DDIM(AbstractSolver):
    """`x_s = alpha_s x0 + sqrt(sigma_s^2 - eta^2 var) eps + eta sqrt(var) noise`.

    `var` is the variance of `q(x_s | x_t, x0)` (Song et al. 2021a, eq. 12 and 16). `eta = 0` is
    deterministic; `eta = 1` has DDPM's posterior variance. Works on any path; first order, one
    network call a step.

    **Raises** `ValueError` unless `0 <= eta <= 1`.

    >>> import eqxldm as ex
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0)
    >>> ex.sample(denoiser, ex.CosineVP(), ex.predict_x0, DDIM(), ex.uniform_times(3),
    ...           jnp.ones(1), key=jax.random.key(0))
    Array([7.], dtype=float32)
    """

    eta: float = eqx.field(static=True)

    def __init__(self, eta: float = 0.0):
        self.eta = _check_eta("DDIM", eta)

    def plan(self, path: AbstractPath, times: Any) -> Plan:
        return one_call_a_step(times, _ddim_coefficients(self, self.eta, intervals(path, times)))

    def init(self, x: X) -> Any:
        return None

    def step(self, table, x, estimate, carry, *, key):
        a, b, c = _as(x, *table)
        return _noised(a * estimate.x0 + b * estimate.eps, self.eta, c, key), carry


class DPMSolverPP2M(AbstractSolver):
    """DPM-Solver++(2M): DDIM's step with `x0` extrapolated from the last two estimates.

    `D = x0 + h / (2 h_before) (x0 - x0_before)`, `h = log(alpha_s / sigma_s) - log(alpha_t /
    sigma_t)`; then `x_s = sigma_s / sigma_t x_t + (alpha_s - alpha_t sigma_s / sigma_t) D`
    (Lu et al. 2022b, algorithm 2). `eta = 1` is the SDE variant, SDE-DPM-Solver++(2M): the same
    `D` in `q(x_s | x_t, x0 = D)` (Lu et al. 2022b). Second order as an ODE solver, one
    network call a step. The first step, and steps from or to an infinite logSNR, are of first
    order.

    **Raises** `ValueError` unless `0 <= eta <= 1`.

    >>> import eqxldm as ex
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0)
    >>> ex.sample(denoiser, ex.CosineVP(), ex.predict_x0, DPMSolverPP2M(), ex.uniform_times(3),
    ...           jnp.ones(1), key=jax.random.key(0))
    Array([7.], dtype=float32)
    """

    eta: float = eqx.field(static=True)

    def __init__(self, eta: float = 0.0):
        self.eta = _check_eta("DPMSolverPP2M", eta)

    def plan(self, path: AbstractPath, times: Any) -> Plan:
        xp = jnp if isinstance(times, jax.Array) else np
        i = intervals(path, times)
        of_x0, of_eps, noise = _ddim_coefficients(self, self.eta, i)
        with np.errstate(divide="ignore", invalid="ignore"):
            of_x = of_eps / i.at_t.sigma  # eps = (x - alpha_t D) / sigma_t
            of_x0 = of_x0 - of_x * i.at_t.alpha
            h = (i.at_s.logsnr - i.at_t.logsnr) / 2
            h_before = (i.at_t.logsnr - i.at_before.logsnr) / 2
            weight = h / (2 * h_before)
        usable = xp.isfinite(weight) & (np.arange(len(times) - 1) > 0)
        weight = xp.where(usable, weight, xp.zeros_like(weight))
        return one_call_a_step(times, (of_x0, of_x, weight, noise))

    def init(self, x: X) -> Any:
        return jnp.zeros_like(x)

    def step(self, table, x, estimate, carry, *, key):
        a, b, w, c = _as(x, *table)
        ahead = estimate.x0 + w * (estimate.x0 - carry)
        return _noised(a * ahead + b * x, self.eta, c, key), estimate.x0


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

    >>> import eqxldm as ex
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0)
    >>> ex.sample(denoiser, ex.CosineVP(), ex.predict_x0, DDPM(), ex.uniform_times(3),
    ...           jnp.ones(1), key=jax.random.key(0))
    Array([7.], dtype=float32)
    """

    variance: Variance = eqx.field(static=True, default=fixed_small)

    def plan(self, path: AbstractPath, times: Any) -> Plan:
        _check_descending(self, times)
        i = intervals(path, times)
        c0, ct, _ = posterior_coefficients(i.at_s, i.at_t)
        low, high = self.variance(i)
        return one_call_a_step(times, (c0, ct, low, high, i.at_s.sigma > 0))

    def init(self, x: X) -> Any:
        return None

    def step(self, table, x, estimate, carry, *, key):
        *scalars, noisy = table
        c0, ct, low, high = _as(x, *scalars)
        std = jnp.exp(log_variance(low, high, estimate) / 2)
        noise = jnp.where(noisy, std, jnp.zeros_like(std)) * _normal(key, x)
        return c0 * estimate.x0 + ct * x + noise, carry


def forward_diffusion(at: Coefficients) -> Time:
    """`g^2 = d(sigma^2)/dt - 2 (alpha'/alpha) sigma^2`, of the forward SDE `dx = f x dt + g dw`.

    `= 2 sigma (sigma' - sigma alpha' / alpha)` (Song et al. 2021b; Kingma et al. 2021).
    Infinite where alpha = 0.

    >>> from eqxldm import LinearFlow
    >>> float(forward_diffusion(LinearFlow().coefficients(0.5)))
    2.0
    """
    return 2 * at.sigma * (at.dsigma - at.sigma * at.dalpha / at.alpha)


class EulerMaruyama(AbstractSolver):
    """`x_s = x_t + (s - t) (velocity + g^2 / (2 sigma) eps) + sqrt(g^2 (t - s)) noise`.

    The reverse SDE `dx = (f x - g^2 score) dt + g dw` with `score = -eps / sigma` and `f x =
    velocity + g^2 score / 2` (Song et al. 2021b, eq. 6 and 13). Every `g^2 >= 0` has the same
    marginals: `diffusion` is a function of the coefficients, by default that of the forward
    SDE, which is infinite where alpha = 0 (begin below t = 1 there); `lambda at: at.sigma` is
    SiT's and finite everywhere (Ma et al. 2024). No noise is added on the step to
    `s = 0`. One network call a step.

    >>> import eqxldm as ex
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.zeros_like(x_t)
    >>> solver = EulerMaruyama(lambda at: 0 * at.sigma)  # no noise: the ODE
    >>> ex.sample(denoiser, ex.LinearFlow(), ex.predict_velocity, solver, ex.uniform_times(3),
    ...           jnp.ones(1), key=jax.random.key(0))
    Array([1.], dtype=float32)
    """

    diffusion: Callable[[Coefficients], Time] = eqx.field(static=True, default=forward_diffusion)

    def plan(self, path: AbstractPath, times: Any) -> Plan:
        _check_descending(self, times)
        i = intervals(path, times)
        dt = i.s - i.t
        with np.errstate(divide="ignore", invalid="ignore"):
            g2 = self.diffusion(i.at_t)
            of_eps = i.at_t.dsigma + g2 / (2 * i.at_t.sigma)
        noise = (-dt * g2) ** 0.5 * (i.at_s.sigma > 0).astype(dt.dtype)
        return one_call_a_step(times, (dt * i.at_t.dalpha, dt * of_eps, noise))

    def init(self, x: X) -> Any:
        return None

    def step(self, table, x, estimate, carry, *, key):
        a, b, c = _as(x, *table)
        return x + a * estimate.x0 + b * estimate.eps + c * _normal(key, x), carry


def _ddim_coefficients(solver: AbstractSolver, eta: float, i: Interval) -> tuple[Time, Time, Time]:
    """Of x0, of eps and of the noise."""
    if eta == 0:
        return i.at_s.alpha, i.at_s.sigma, 0 * i.at_s.sigma
    _check_descending(solver, i.t)
    noise = eta * posterior_coefficients(i.at_s, i.at_t)[2] ** 0.5
    return i.at_s.alpha, (i.at_s.sigma**2 - noise**2) ** 0.5, noise


def _noised(x: X, eta: float, std: Array, key: Key[Array, ""]) -> X:
    return x + std * _normal(key, x) if eta else x


def _normal(key: Key[Array, ""], x: X) -> X:
    return jax.random.normal(key, x.shape, x.dtype)


def _as(x: X, *scalars: Any) -> list[Any]:
    return [None if c is None else jnp.asarray(c, x.dtype) for c in scalars]


def _check_eta(name: str, eta: float) -> float:
    if not 0 <= eta <= 1:
        raise ValueError(f"{name}: eta must lie in [0, 1], got {eta}.")
    return eta


def _check_descending(solver: AbstractSolver, times: Any) -> None:
    if isinstance(times, np.ndarray) and len(times) > 1 and times[0] < times[-1]:
        raise ValueError(
            f"{type(solver).__name__} draws noise and cannot run from data to noise: times must "
            "descend. To encode, take DDIM(), Euler(), Heun() or DPMSolverPP2M()."
        )
