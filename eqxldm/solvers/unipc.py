"""UniPC: a multistep predictor in logSNR, corrected without another network call."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..paths import AbstractPath
from .base import AbstractSolver, Plan, X, as_like, one_call_a_step
from .exponential import exponential_step, phi_functions, steps_before


class UniPC(AbstractSolver):
    """UniPC with `B(h) = e^h - 1`: the estimate that a step leads to corrects that step.

    With `D_k = (x0_k - x0) / r_k`, `x0_k` the estimate at `r_k h` in logSNR / 2 from `t`:

        x_s = sigma_s / sigma_t x_t + (alpha_s - alpha_t sigma_s / sigma_t) (x0 + sum_k w_k D_k)

    The predictor of order p takes the p - 1 estimates before `t` (`r_k < 0`). The network is then
    called at its `x_s`, and the corrector makes the same step again, from the corrected `x_t`,
    with that estimate too (`r = 1`). The weights solve `sum_k w_k r_k^(j-1) = j! phi_(j+1) /
    phi_1` for j = 1, 2, ...; where one estimate is left over, `w = 1 / 2` (Zhao et al. 2023,
    algorithms 1 and 2, eq. 9, with data prediction; phi_k(-h) of `solvers.exponential`).

    One network call a step; of order p + 1 on the ODE, but for the last step, which nothing
    corrects, and the first p - 1, of lower order. Steps from or to an infinite logSNR are of
    first order.

    **Arguments**:

    - `order`: p, 1 to 3. 2 is the authors' choice with guidance.
    - `lower_order_final`: the last step is of order 1, the one before it at most of 2 (their code).

    **Raises** `ValueError` for another order.

    >>> import eqxldm as ex
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0)
    >>> diffusion = ex.Diffusion(ex.CosineVP(), ex.predict_x0)
    >>> ex.sample(denoiser, diffusion, UniPC(), ex.uniform_times(4), jnp.ones(1))
    Array([7.], dtype=float32)
    """

    order: int = eqx.field(static=True, default=2)
    lower_order_final: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        if self.order not in (1, 2, 3):
            raise ValueError(f"UniPC: order must be 1, 2 or 3, got {self.order}.")

    @property
    def draws_noise(self) -> bool:
        return False

    def plan(self, path: AbstractPath, times: Any) -> Plan:
        xp = jnp if isinstance(times, jax.Array) else np
        n = len(times) - 1
        order = np.full(n, self.order)
        if self.lower_order_final:
            order = np.minimum(order, n - np.arange(n))
        half = path.coefficients(times).logsnr / 2
        h, before, before_that = (steps_before(half, k) for k in range(3))
        finite = xp.isfinite(h)
        second = finite & xp.isfinite(before) & (order >= 2)
        third = second & xp.isfinite(before_that) & (order >= 3)
        one, zero = xp.ones_like(h), xp.zeros_like(h)
        h = xp.where(finite, h, one)
        r1 = -xp.where(second, before, one) / h
        r2 = r1 - xp.where(third, before_that, one) / h
        phi_1, phi_2, phi_3, phi_4 = phi_functions(-h)
        b1, b2, b3 = phi_2 / phi_1, 2 * phi_3 / phi_1, 6 * phi_4 / phi_1
        select = lambda of_third, of_second, of_first: xp.where(
            third, of_third, xp.where(second, of_second, of_first)
        )
        predictor = (
            select((b1 * r2 - b2) / (r2 - r1) / r1, one / 2 / r1, zero),
            select((b2 - b1 * r1) / (r2 - r1) / r2, zero, zero),
        )
        # The weights on the nodes r1, r2 and 1: Lagrange's polynomials of the right-hand sides.
        at_r1 = (b3 - (r2 + 1) * b2 + r2 * b1) / ((r1 - r2) * (r1 - 1))
        at_r2 = (b3 - (r1 + 1) * b2 + r1 * b1) / ((r2 - r1) * (r2 - 1))
        corrector = (
            select(b1 - at_r1 - at_r2, (b2 - b1 * r1) / (1 - r1), xp.where(finite, one / 2, zero)),
            select(at_r1 / r1, (b1 - b2) / (1 - r1) / r1, zero),
            select(at_r2 / r2, zero, zero),
        )
        of_x0, of_x = exponential_step(path, times)
        # What corrects a step is known one call later. The first call corrects nothing.
        late = lambda a: xp.concatenate([xp.zeros_like(a[:1]), a[:-1]])
        corrects = np.arange(n) > 0
        corrected = (corrects, *(late(a) for a in (of_x0, of_x, *corrector)))
        return one_call_a_step(times, (corrected, (of_x0, of_x, *predictor)))

    def init(self, x: X) -> Any:
        return (jnp.zeros_like(x),) * 4

    def step(self, table, x, estimate, carry, *, key):
        (corrects, *corrected), predicted = table
        start, *past = carry  # where the last step began, corrected, and the estimates from there
        of_x0, of_x, here, back, far_back = as_like(x, *corrected)
        x0, one_before, two_before, three_before = estimate.x0, *past
        mixed = one_before + here * (x0 - one_before) + back * (two_before - one_before)
        mixed = mixed + far_back * (three_before - one_before)
        x = jnp.where(corrects, of_x * start + of_x0 * mixed, x)
        of_x0, of_x, back, far_back = as_like(x, *predicted)
        ahead = x0 + back * (one_before - x0) + far_back * (two_before - x0)
        return of_x * x + of_x0 * ahead, (x, x0, one_before, two_before)
