"""Euler-Maruyama on the reverse SDE."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import numpy as np

from ..paths import AbstractPath, Coefficients, Time
from .base import (
    AbstractSolver,
    Plan,
    X,
    as_like,
    check_descending,
    intervals,
    normal,
    one_call_a_step,
)


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

    >>> import jax, jax.numpy as jnp, eqxldm as ex
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.zeros_like(x_t)
    >>> solver = EulerMaruyama(lambda at: 0 * at.sigma)  # no noise: the ODE
    >>> flow = ex.Diffusion(ex.LinearFlow(), ex.predict_velocity)
    >>> ex.sample(denoiser, flow, solver, ex.uniform_times(3), jnp.ones(1), key=jax.random.key(0))
    Array([1.], dtype=float32)
    """

    diffusion: Callable[[Coefficients], Time] = eqx.field(static=True, default=forward_diffusion)

    def plan(self, path: AbstractPath, times: Any) -> Plan:
        check_descending(self, times)
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
        a, b, c = as_like(x, *table)
        return x + a * estimate.x0 + b * estimate.eps + c * normal(key, x), carry
