"""DPM-Solver++: multistep methods in logSNR."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..paths import AbstractPath
from .base import AbstractSolver, Plan, X, add_noise, as_like, check_eta, intervals, one_call_a_step
from .ddim import ddim_coefficients
from .exponential import exponential_step, phi_functions, steps_before


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


class DPMSolverPP3M(AbstractSolver):
    """DPM-Solver++(3M): the parabola through the last three estimates of `x0`, in logSNR.

    With `h` as in `DPMSolverPP2M`, `r0 h` and `r1 h` the two steps before it, the slopes `A =
    (x0 - x0_before) / r0` and `B = (x0_before - x0_before_that) / r1`:

        slope = A + r0 / (r0 + r1) (A - B)        bend = (A - B) / (r0 + r1)
        x_s = sigma_s / sigma_t x_t + alpha_s h (phi_1 x0 + phi_2 slope + 2 phi_3 bend)

    with `phi_k(-h)` of `solvers.exponential` (Lu et al. 2022b, section 4). One network call a
    step. The first step is of first order and the second of second, so the run is of third order
    if these two are short (`logsnr_times`, `karras_times` and `shifted_times` make them so), else
    of second. A step from or to an infinite logSNR is of first order.

    **Arguments**:

    - `lower_order_final`: in runs of fewer than 15 steps the last one is of first order and the
      one before it of second, which is steadier where steps are long (the authors' code).
    - `half_bend`: `phi_3 bend` instead of `2 phi_3 bend`. So have it the authors' code and all
      that follow it (diffusers' `solver_order=3` too); the order is then 2.

    >>> import eqxldm as ex
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0)
    >>> diffusion = ex.Diffusion(ex.CosineVP(), ex.predict_x0)
    >>> ex.sample(denoiser, diffusion, DPMSolverPP3M(), ex.uniform_times(4), jnp.ones(1))
    Array([7.], dtype=float32)
    """

    lower_order_final: bool = eqx.field(static=True, default=True)
    half_bend: bool = eqx.field(static=True, default=False)

    @property
    def draws_noise(self) -> bool:
        return False

    def plan(self, path: AbstractPath, times: Any) -> Plan:
        xp = jnp if isinstance(times, jax.Array) else np
        n = len(times) - 1
        order = np.full(n, 3)
        if self.lower_order_final and n < 15:
            order = np.minimum(order, n - np.arange(n))
        half = path.coefficients(times).logsnr / 2
        h, before, before_that = (steps_before(half, k) for k in range(3))
        # A step before the first one is NaN, and one from or to the data or to pure noise infinite.
        second = xp.isfinite(h) & xp.isfinite(before) & (order >= 2)
        third = second & xp.isfinite(before_that) & (order >= 3)
        one, zero = xp.ones_like(h), xp.zeros_like(h)
        h = xp.where(second, h, one)
        r0, r1 = xp.where(second, before, one) / h, xp.where(third, before_that, one) / h
        phi_1, phi_2, phi_3, _ = phi_functions(-h)
        of_slope = phi_2 / phi_1
        of_bend = (1 if self.half_bend else 2) * phi_3 / phi_1
        of_b = (of_slope * r0 + of_bend) / (r0 + r1)
        of_a = xp.where(third, of_slope + of_b, one / 2)  # a half of it is DPM-Solver++(2M)
        of_x0, of_x = exponential_step(path, times)
        weights = xp.where(second, of_a / r0, zero), xp.where(third, of_b / r1, zero)
        return one_call_a_step(times, (of_x0, of_x, *weights))

    def init(self, x: X) -> Any:
        return jnp.zeros_like(x), jnp.zeros_like(x)

    def step(self, table, x, estimate, carry, *, key):
        of_x0, of_x, a, b = as_like(x, *table)
        before, before_that = carry
        ahead = estimate.x0 + a * (estimate.x0 - before) - b * (before - before_that)
        return of_x0 * ahead + of_x * x, (estimate.x0, before)
