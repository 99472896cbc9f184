"""What multistep methods in logSNR share: the exact linear part, and the phi functions.

In `lambda = logSNR / 2` the probability-flow ODE is `d(x / sigma) / d lambda = exp(lambda) x0`
(Lu et al. 2022b, eq. 8). So a step of length `h` is exact for an `x0` that does not change, and
for one that is a polynomial in lambda its terms are integrals against `exp`: the phi functions.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..paths import AbstractPath, Time

TERMS = 16  # of the series below |z| = 1: the first one left out is below 1e-14


def exponential_step(path: AbstractPath, times: Any) -> tuple[Time, Time]:
    """The coefficients of `x0` and of `x_t` in a step over which `x0` does not change.

    `x_s = (alpha_s - alpha_t sigma_s / sigma_t) x0 + sigma_s / sigma_t x_t`, which is DDIM's.

    >>> from eqxldm import LinearFlow
    >>> exponential_step(LinearFlow(), np.array([1.0, 0.5, 0.0]))
    (array([0.5, 1. ]), array([0.5, 0. ]))
    """
    at = path.coefficients(times)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_x = at.sigma[1:] / at.sigma[:-1]
        return at.alpha[1:] - of_x * at.alpha[:-1], of_x


def steps_before(half_logsnr: Any, back: int) -> Any:
    """For each step the length in `lambda` of the step `back` before it; NaN where there is none.

    >>> steps_before(np.array([0.0, 1.0, 3.0]), 1)
    array([nan,  1.])
    """
    xp = jnp if isinstance(half_logsnr, jax.Array) else np
    with np.errstate(invalid="ignore"):
        h = half_logsnr[1:] - half_logsnr[:-1]
    return xp.concatenate([xp.full_like(h[:back], xp.nan), h[: len(h) - back]])


def phi_functions(z: Any) -> tuple[Any, Any, Any, Any]:
    """`phi_1 = (e^z - 1) / z` and `phi_{k+1} = (phi_k - 1 / k!) / z`, up to `phi_4`.

    `phi_k(z) = sum_j z^j / (j + k)!`, which is what is summed for `|z| < 1`, where the quotients
    would cancel (Hochbruck & Ostermann 2010, section 2.1).

    >>> [round(float(phi), 6) for phi in phi_functions(np.array(0.0))]
    [1.0, 0.5, 0.166667, 0.041667]
    """
    xp = jnp if isinstance(z, jax.Array) else np
    small = xp.abs(z) < 1
    near, far = xp.where(small, z, xp.zeros_like(z)), xp.where(small, xp.ones_like(z), z)
    phis, quotient = [], xp.expm1(far) / far
    for k in range(1, 5):
        series = xp.zeros_like(near)
        for j in reversed(range(TERMS)):
            series = series * near + 1 / math.factorial(j + k)
        phis.append(xp.where(small, series, quotient))
        quotient = (quotient - 1 / math.factorial(k)) / far
    return phis[0], phis[1], phis[2], phis[3]
