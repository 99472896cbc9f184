"""Noising paths `x_t = alpha(t) x0 + sigma(t) eps`, from data at t = 0 to noise at t = 1.

A path's functions are elementwise and follow their argument: a float or a float64 NumPy array
gives float64 NumPy (what a solver's tables are made of), a JAX array gives JAX in its own dtype.
"""

import abc
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .schedules import Table, check_alpha_bar

if TYPE_CHECKING:
    Time = Any  # pyright takes Array and ndarray for strangers
else:
    Time = Float[Array, "*t"] | Float[np.ndarray, "*t"] | float


class Coefficients(eqx.Module):
    """`alpha`, `sigma` and their time derivatives `dalpha`, `dsigma` at one time or at many."""

    alpha: Time
    sigma: Time
    dalpha: Time
    dsigma: Time

    @property
    def logsnr(self) -> Time:
        """`2 log(alpha / sigma)`; `inf` where sigma is 0."""
        xp, _ = _as_array(self.alpha)
        with np.errstate(divide="ignore"):
            return 2 * (xp.log(self.alpha) - xp.log(self.sigma))


class AbstractPath(eqx.Module):
    """A noising path. To add one, write `coefficients`."""

    @abc.abstractmethod
    def coefficients(self, t: Time) -> Coefficients:
        """`alpha`, `sigma` and their derivatives at `t` in [0, 1]."""

    def alpha(self, t: Time) -> Time:
        """What is left of the data at `t`."""
        return self.coefficients(t).alpha

    def sigma(self, t: Time) -> Time:
        """The standard deviation of the noise at `t`."""
        return self.coefficients(t).sigma

    def logsnr(self, t: Time) -> Time:
        """`2 log(alpha / sigma)`, strictly decreasing in `t`; `inf` at t = 0."""
        return self.coefficients(t).logsnr


class DiscreteVP(AbstractPath):
    """DDPM's variance-preserving path: `alpha^2 = alpha_bar`, `sigma^2 = 1 - alpha_bar`.

    Timestep `i` of the table's `T` lies at `t = (i + 1) / T`; `t = 0` is clean data. Between
    two timesteps the point `(alpha, sigma)` moves along the chord and is put back on the unit
    circle, so that `alpha^2 + sigma^2 = 1` at every `t` and the table is met exactly.

    (Ho et al. 2020, eq. 4)

    **Raises** `ValueError` for a table outside (0, 1) or one that does not decrease.

    >>> from eqxldm.schedules import alpha_bar_from_betas, linear_betas
    >>> path = DiscreteVP(alpha_bar_from_betas(linear_betas(1000)))
    >>> round(float(path.alpha(1 / 1000)) ** 2, 12)
    0.9999
    """

    alpha_table: Any
    sigma_table: Any

    def __init__(self, alpha_bar: Table):
        alpha_bar = check_alpha_bar(alpha_bar)
        self.alpha_table = np.concatenate([[1.0], np.sqrt(alpha_bar)])
        self.sigma_table = np.concatenate([[0.0], np.sqrt(1 - alpha_bar)])

    @property
    def timesteps(self) -> int:
        """The length `T` of the table."""
        return len(self.alpha_table) - 1

    def coefficients(self, t: Time) -> Coefficients:
        xp, t = _as_array(t)
        alphas, sigmas = (xp.asarray(k, t.dtype) for k in (self.alpha_table, self.sigma_table))
        at = xp.clip(t * self.timesteps, 0, self.timesteps)
        i = xp.clip(xp.floor(at).astype(int), 0, self.timesteps - 1)
        da, ds = alphas[i + 1] - alphas[i], sigmas[i + 1] - sigmas[i]
        along = at - i.astype(t.dtype)
        a, s = alphas[i] + along * da, sigmas[i] + along * ds
        radius = xp.hypot(a, s)
        alpha, sigma = a / radius, s / radius
        turn = self.timesteps * (a * ds - s * da) / radius**2  # d angle / dt
        return Coefficients(alpha, sigma, -sigma * turn, alpha * turn)


class CosineVP(AbstractPath):
    """`alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)` (Salimans & Ho 2022, section 2).

    >>> float(CosineVP().alpha(0.0))
    1.0
    """

    def coefficients(self, t: Time) -> Coefficients:
        xp, t = _as_array(t)
        # sin(pi (1 - t) / 2) and not cos(pi t / 2): exactly 0 at t = 1, exact relative to alpha.
        alpha, sigma = xp.sin(np.pi / 2 * (1 - t)), xp.sin(np.pi / 2 * t)
        return Coefficients(alpha, sigma, -np.pi / 2 * sigma, np.pi / 2 * alpha)


class LinearFlow(AbstractPath):
    """`alpha = 1 - t`, `sigma = t`: rectified flow (Liu et al. 2023; Lipman et al. 2023).

    The velocity `dx_t/dt` is `eps - x0`, constant along a path.

    >>> float(LinearFlow().sigma(0.25))
    0.25
    """

    def coefficients(self, t: Time) -> Coefficients:
        xp, t = _as_array(t)
        return Coefficients(1 - t, t, -xp.ones_like(t), xp.ones_like(t))


def q_sample(
    path: AbstractPath, x0: Float[Array, "*shape"], t: Float[Array, ""], eps: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The forward process in one jump: `x_t = alpha(t) x0 + sigma(t) eps` (Ho et al. 2020, eq. 4).

    `t` is one time in [0, 1] for the whole of `x0`; map it over a batch with `jax.vmap`.
    With `eps ~ N(0, I)` this is a sample of `q(x_t | x0)`. The result has the dtype of `x0`;
    the coefficients are computed in the dtype of `t`.

    >>> q_sample(LinearFlow(), jnp.ones(3), jnp.array(0.5), jnp.zeros(3))
    Array([0.5, 0.5, 0.5], dtype=float32)
    """
    at = path.coefficients(t)
    return at.alpha.astype(x0.dtype) * x0 + at.sigma.astype(x0.dtype) * eps


def _as_array(t: Any) -> tuple[Any, Any]:
    """The array module that `t` belongs to, and `t` as an array of it; floats are NumPy's."""
    return (jnp, t) if isinstance(t, jax.Array) else (np, np.asarray(t))
