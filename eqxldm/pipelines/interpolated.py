"""A table of alpha_bar at fractional timesteps, as k-diffusion and diffusers' Euler read it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..betas import Table, check_alpha_bar
from ..paths import AbstractPath, Coefficients, Time, check_concrete_time


class InterpolatedVP(AbstractPath):
    """DDPM's path, `sigma / alpha` linear in time between the timesteps of the table.

    `alpha^2 = alpha_bar` and `sigma^2 = 1 - alpha_bar` at timestep i, `t = (i + 1) / T`, as for
    `DiscreteVP`, from which it differs between timesteps only: there `DiscreteVP` is smooth, and
    this one is what published programs do (Karras et al. 2022, appendix C.3.4, and diffusers'
    `EulerDiscreteScheduler`, whose `linspace` visits such times).

    **Raises** `ValueError` for a table that does not decrease within (0, 1), or ends at 0.

    >>> path = InterpolatedVP(np.array([0.5, 0.2]))  # sigma / alpha of 1 and 2
    >>> at = path.coefficients(0.75)
    >>> round(float(at.sigma / at.alpha), 12)
    1.5
    """

    alpha_bar: tuple[float, ...] = eqx.field(static=True)  # a constant: nothing to train

    def __init__(self, alpha_bar: Table):
        alpha_bar = check_alpha_bar(alpha_bar)
        if alpha_bar[-1] == 0:
            raise ValueError("InterpolatedVP: the last alpha_bar is 0, and sigma / alpha infinite.")
        self.alpha_bar = tuple(alpha_bar.tolist())

    @property
    def prior_std(self) -> float:
        return 1.0  # alpha^2 + sigma^2 of data of unit variance

    def coefficients(self, t: Time) -> Coefficients:
        check_concrete_time(t)
        xp: Any = jnp if isinstance(t, jax.Array) else np
        t = t if isinstance(t, jax.Array) else np.asarray(t, np.float64)
        alpha_bar = np.array([1.0, *self.alpha_bar])
        table = np.sqrt((1 - alpha_bar) / alpha_bar)
        steps = len(self.alpha_bar)
        i = xp.clip(xp.floor(t * steps).astype(int), 0, steps - 1)
        slope = xp.asarray(np.diff(table), t.dtype)[i]
        ratio = xp.asarray(table, t.dtype)[i] + (t * steps - i.astype(t.dtype)) * slope
        alpha = 1 / xp.sqrt(1 + ratio * ratio)
        turn = steps * slope * alpha * alpha  # d phi / dt of ratio = tan(phi)
        return Coefficients(alpha, ratio * alpha, -ratio * alpha * turn, alpha * turn)
