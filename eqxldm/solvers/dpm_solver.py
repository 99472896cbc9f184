"""DPM-Solver++: multistep methods in logSNR."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..paths import AbstractPath
from .base import AbstractSolver, Plan, X, add_noise, as_like, check_eta, intervals, one_call_a_step
from .ddim import ddim_coefficients


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
    >>> diffusion = ex.Diffusion(ex.CosineVP(), ex.predict_x0)
    >>> ex.sample(denoiser, diffusion, DPMSolverPP2M(), ex.uniform_times(3), jnp.ones(1))
    Array([7.], dtype=float32)
    """

    eta: float = eqx.field(static=True)

    def __init__(self, eta: float = 0.0):
        self.eta = check_eta("DPMSolverPP2M", eta)

    @property
    def draws_noise(self) -> bool:
        return self.eta > 0

    def plan(self, path: AbstractPath, times: Any) -> Plan:
        xp = jnp if isinstance(times, jax.Array) else np
        i = intervals(path, times)
        of_x0, of_eps, noise = ddim_coefficients(self, self.eta, i)
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
        a, b, w, c = as_like(x, *table)
        ahead = estimate.x0 + w * (estimate.x0 - carry)
        return add_noise(a * ahead + b * x, self.eta, c, key), estimate.x0
