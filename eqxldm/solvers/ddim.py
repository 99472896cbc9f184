"""DDIM: a step between two marginals, deterministic or with some of the posterior's noise."""

from typing import Any

import equinox as eqx

from ..paths import AbstractPath, Time, posterior_coefficients
from .base import (
    AbstractSolver,
    Interval,
    Plan,
    X,
    add_noise,
    as_like,
    check_descending,
    check_eta,
    intervals,
    one_call_a_step,
)


class DDIM(AbstractSolver):
    """`x_s = alpha_s x0 + sqrt(sigma_s^2 - eta^2 var) eps + eta sqrt(var) noise`.

    `var` is the variance of `q(x_s | x_t, x0)` (Song et al. 2021a, eq. 12 and 16). `eta = 0` is
    deterministic; `eta = 1` has DDPM's posterior variance. Works on any path; first order, one
    network call a step.

    **Raises** `ValueError` unless `0 <= eta <= 1`.

    >>> import jax, jax.numpy as jnp, eqxldm as ex
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0)
    >>> diffusion = ex.Diffusion(ex.CosineVP(), ex.predict_x0)
    >>> ex.sample(denoiser, diffusion, DDIM(), ex.uniform_times(3), jnp.ones(1))
    Array([7.], dtype=float32)
    """

    eta: float = eqx.field(static=True)

    def __init__(self, eta: float = 0.0):
        self.eta = check_eta("DDIM", eta)

    @property
    def draws_noise(self) -> bool:
        return self.eta > 0

    def plan(self, path: AbstractPath, times: Any) -> Plan:
        return one_call_a_step(times, ddim_coefficients(self, self.eta, intervals(path, times)))

    def init(self, x: X) -> Any:
        return None

    def step(self, table, x, estimate, carry, *, key):
        a, b, c = as_like(x, *table)
        return add_noise(a * estimate.x0 + b * estimate.eps, self.eta, c, key), carry


def ddim_coefficients(solver: AbstractSolver, eta: float, i: Interval) -> tuple[Time, Time, Time]:
    """Of x0, of eps and of the noise."""
    if eta == 0:
        return i.at_s.alpha, i.at_s.sigma, 0 * i.at_s.sigma
    check_descending(solver, i.t)
    noise = eta * posterior_coefficients(i.at_s, i.at_t)[2] ** 0.5
    return i.at_s.alpha, (i.at_s.sigma**2 - noise**2) ** 0.5, noise
