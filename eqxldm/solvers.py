"""Solvers of the reverse process: each a table of coefficients, an `init` and a `step`.

A solver goes from time `t` to `s < t`. It sees the network only as `predict(x_t, row) -> (x0,
eps)`. All that depends on time alone is computed once, for the whole grid, in `tables`: in
float64 when the grid is NumPy. `sampling.sample` scans `step` over the rows.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .paths import AbstractPath, Coefficients, Time

X = Float[Array, "*shape"]
Predict = Callable[[X, Float[Array, ""], Coefficients], tuple[X, X]]


class Interval(eqx.Module):
    """The steps `t -> s` of a grid and the path's coefficients at their ends."""

    t: Time
    s: Time
    at_t: Coefficients
    at_s: Coefficients


class AbstractSolver(eqx.Module):
    """A solver. To add one, write these three functions."""

    @abc.abstractmethod
    def tables(self, path: AbstractPath, interval: Interval) -> Any:
        """The solver's own coefficients, a PyTree of arrays with one entry a step."""

    @abc.abstractmethod
    def init(self, x: X) -> Any:
        """What the solver carries from step to step besides `x`; None for nothing."""

    @abc.abstractmethod
    def step(
        self,
        predict: Predict,
        interval: Interval,
        table: Any,
        x: X,
        carry: Any,
        *,
        key: Key[Array, ""],
    ) -> tuple[X, Any, X]:
        """One step: returns `x_s`, the new carry and the estimate of `x0` made at `t`."""


def posterior_coefficients(at_s: Coefficients, at_t: Coefficients) -> tuple[Time, Time, Time]:
    """`q(x_s | x_t, x0) = N(c0 x0 + ct x_t, var)` for `s < t`: returns `(c0, ct, var)`.

    With `r = alpha_t / alpha_s` and `sigma_{t|s}^2 = sigma_t^2 - r^2 sigma_s^2`:
    `c0 = alpha_s sigma_{t|s}^2 / sigma_t^2`, `ct = r sigma_s^2 / sigma_t^2`,
    `var = sigma_{t|s}^2 sigma_s^2 / sigma_t^2` (Ho et al. 2020, eq. 6-7; for any path, Kingma
    et al. 2021, appendix A.2). At `s = 0`: `(1, 0, 0)`. Give float64 for exact values: in
    float32 `sigma_{t|s}^2` cancels for close times.

    >>> from eqxldm.paths import LinearFlow
    >>> at = LinearFlow().coefficients
    >>> c0, ct, var = posterior_coefficients(at(0.0), at(0.5))
    >>> float(c0), float(ct), float(var)
    (1.0, 0.0, 0.0)
    """
    r = at_t.alpha / at_s.alpha
    ratio = (at_s.sigma / at_t.sigma) ** 2
    fresh = 1 - r**2 * ratio  # the share of sigma_t^2 that was added between s and t
    return at_s.alpha * fresh, r * ratio, at_s.sigma**2 * fresh


def _broadcast(x: X, *scalars: Any) -> list[Array]:
    return [jnp.asarray(c, x.dtype) for c in scalars]


class Euler(AbstractSolver):
    """`x_s = x_t + (s - t) (alpha' x0 + sigma' eps)`: Euler on the probability-flow ODE.

    (Song et al. 2021b, eq. 13; Lipman et al. 2023.) First order, one network call a step. On a
    `LinearFlow` this equals DDIM with `eta = 0`.
    """

    def tables(self, path: AbstractPath, interval: Interval) -> Any:
        dt = interval.s - interval.t
        return dt * interval.at_t.dalpha, dt * interval.at_t.dsigma

    def init(self, x: X) -> Any:
        return None

    def step(self, predict, interval, table, x, carry, *, key):
        x0, eps = predict(x, interval.t, interval.at_t)
        a, b = _broadcast(x, *table)
        return x + a * x0 + b * eps, carry, x0


class DDIM(AbstractSolver):
    """`x_s = alpha_s x0 + sqrt(sigma_s^2 - eta^2 var) eps + eta sqrt(var) noise`.

    `var` is the variance of `q(x_s | x_t, x0)` (Song et al. 2021a, eq. 12 and 16). `eta = 0` is
    deterministic; `eta = 1` has DDPM's posterior variance. Works on any path; first order, one
    network call a step.

    **Raises** `ValueError` unless `0 <= eta <= 1`.
    """

    eta: float = eqx.field(static=True)

    def __init__(self, eta: float = 0.0):
        if not 0 <= eta <= 1:
            raise ValueError(f"DDIM: eta must lie in [0, 1], got {eta}.")
        self.eta = eta

    def tables(self, path: AbstractPath, interval: Interval) -> Any:
        at_s = interval.at_s
        variance = self.eta**2 * posterior_coefficients(at_s, interval.at_t)[2]
        return at_s.alpha, (at_s.sigma**2 - variance) ** 0.5, variance**0.5

    def init(self, x: X) -> Any:
        return None

    def step(self, predict, interval, table, x, carry, *, key):
        x0, eps = predict(x, interval.t, interval.at_t)
        a, b, c = _broadcast(x, *table)
        x = a * x0 + b * eps
        if self.eta:
            x = x + c * jax.random.normal(key, x.shape, x.dtype)
        return x, carry, x0


Variance = Callable[[Interval], Time]


def fixed_small(interval: Interval) -> Time:
    """DDPM's `beta-tilde`: the variance of `q(x_s | x_t, x0)`, right for data at one point.

    (Ho et al. 2020, section 3.2)
    """
    return posterior_coefficients(interval.at_s, interval.at_t)[2]


def fixed_large(interval: Interval) -> Time:
    """DDPM's `beta`: `sigma_{t|s}^2`, right for data that is `N(0, I)`; 0 on the step to `s = 0`.

    (Ho et al. 2020, section 3.2)
    """
    at_s, at_t = interval.at_s, interval.at_t
    beta = at_t.sigma**2 - (at_t.alpha / at_s.alpha * at_s.sigma) ** 2
    return beta * (at_s.sigma > 0).astype(beta.dtype)


class DDPM(AbstractSolver):
    """Ancestral sampling: `x_s = c0 x0 + ct x_t + sqrt(var) noise`, the mean of `q(x_s | x_t, x0)`.

    (Ho et al. 2020, algorithm 2, eq. 7.) `variance` is `fixed_small` or `fixed_large`, or any
    function of the interval. The step to `s = 0` returns `x0`. Over `timestep_times(T,
    respace(T, [n]))` this is the respaced sampler of guided-diffusion and DiT.
    """

    variance: Variance = eqx.field(static=True, default=fixed_small)

    def tables(self, path: AbstractPath, interval: Interval) -> Any:
        c0, ct, _ = posterior_coefficients(interval.at_s, interval.at_t)
        return c0, ct, self.variance(interval) ** 0.5

    def init(self, x: X) -> Any:
        return None

    def step(self, predict, interval, table, x, carry, *, key):
        x0, _ = predict(x, interval.t, interval.at_t)
        c0, ct, c = _broadcast(x, *table)
        noise = jax.random.normal(key, x.shape, x.dtype)
        return c0 * x0 + ct * x + c * noise, carry, x0
