"""Euler's and Heun's methods on the probability-flow ODE, in time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..paths import AbstractPath
from .base import AbstractSolver, Plan, X, as_like, intervals, one_call_a_step


class Euler(AbstractSolver):
    """`x_s = x_t + (s - t) (alpha' x0 + sigma' eps)`: Euler on the probability-flow ODE.

    (Song et al. 2021b, eq. 13; Lipman et al. 2023.) First order, one network call a step. On a
    `LinearFlow` this equals DDIM with `eta = 0`.

    >>> import eqxldm as ex
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0)
    >>> flow = ex.Diffusion(ex.LinearFlow(), ex.predict_x0)
    >>> ex.sample(denoiser, flow, Euler(), ex.uniform_times(3), jnp.ones(1)).round(4)
    Array([7.], dtype=float32)
    """

    @property
    def draws_noise(self) -> bool:
        return False

    def plan(self, path: AbstractPath, times: Any) -> Plan:
        i = intervals(path, times)
        dt = i.s - i.t
        return one_call_a_step(times, (dt * i.at_t.dalpha, dt * i.at_t.dsigma))

    def init(self, x: X) -> Any:
        return None

    def step(self, table, x, estimate, carry, *, key):
        a, b = as_like(x, *table)
        return x + a * estimate.x0 + b * estimate.eps, carry


class Heun(AbstractSolver):
    """`x_s = x_t + (s - t) (d_t + d_s) / 2`, `d = alpha' x0 + sigma' eps`: Heun's method.

    `d_s` is taken at Euler's `x_s` (Karras et al. 2022, algorithm 1, there in sigma instead of
    t). Second order, two network calls a step; the step to `t = 0` is Euler's, with one.

    >>> import eqxldm as ex
    >>> ex.nfe(ex.LinearFlow(), Heun(), ex.uniform_times(10))
    19
    """

    @property
    def draws_noise(self) -> bool:
        return False

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
        return Plan(t, times[step + 1], step, (weight * at.dalpha, weight * at.dsigma, undone))

    def init(self, x: X) -> Any:
        return jnp.zeros_like(x)

    def step(self, table, x, estimate, carry, *, key):
        a, b, undone = as_like(x, *table)
        moved = a * estimate.x0 + b * estimate.eps
        # Euler's step; then half of the new slope in the place of half of the old one.
        return x + moved - undone * carry, moved
