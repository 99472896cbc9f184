"""Noising paths `x_t = alpha(t) x0 + sigma(t) eps`, from data at t = 0 to noise at t = 1.

A path's functions are elementwise and follow their argument: a float or a float64 NumPy array
gives float64 NumPy (what a solver's tables are made of), a JAX array gives JAX in its own dtype.
"""

import abc
import functools
import math
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from .betas import Table, check_alpha_bar

if TYPE_CHECKING:
    Time = Any  # pyright takes Array and ndarray for strangers
else:
    Time = Float[Array, "*t"] | Float[np.ndarray, "*t"] | float


class Coefficients(eqx.Module):
    """`alpha`, `sigma` and their time derivatives `dalpha`, `dsigma` at one time or at many.

    >>> at = LinearFlow().coefficients(0.25)
    >>> float(at.alpha), float(at.sigma), float(at.dalpha), float(at.dsigma)
    (0.75, 0.25, -1.0, 1.0)
    """

    alpha: Time
    sigma: Time
    dalpha: Time
    dsigma: Time

    @property
    def logsnr(self) -> Time:
        """`2 log(alpha / sigma)`; `inf` where sigma is 0, `-inf` where alpha is."""
        xp = _namespace(self.alpha)
        with np.errstate(divide="ignore"):
            return 2 * (xp.log(self.alpha) - xp.log(self.sigma))


class AbstractPath(eqx.Module):
    """A noising path. To add one, write `coefficients`.

    On every path `alpha(0) = 1`, `sigma(0) = 0`, and logSNR strictly decreases from infinity.

    >>> class Quadratic(AbstractPath):
    ...     def coefficients(self, t):
    ...         return Coefficients(1 - t**2, t, -2 * t, 1 + 0 * t)
    >>> Quadratic().alpha(0.5)
    0.75
    """

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

    @property
    def prior_std(self) -> float:
        """The standard deviation of the noise at `t = 1`, from which sampling starts: `sigma(1)`.

        1 on the linear flow, and on variance-preserving paths, where what is left of the data adds
        to `sigma(1)^2` what it lacks.
        """
        return float(self.sigma(1.0))


class DiscreteVP(AbstractPath):
    """DDPM's variance-preserving path: `alpha^2 = alpha_bar`, `sigma^2 = 1 - alpha_bar`.

    Timestep `i` of the table's `T` lies at `t = (i + 1) / T`; `t = 0` is clean data. At the
    timesteps the table is met exactly. Between two of them the point `(alpha, sigma)` moves on
    the unit circle, by an angle that is a monotone cubic of time (Fritsch & Carlson 1980): so
    `alpha^2 + sigma^2 = 1` at every `t`, logSNR strictly decreases and the derivatives are
    continuous, which solvers of second order need.

    (Ho et al. 2020, eq. 4)

    **Raises** `ValueError` for a table outside (0, 1) or one that does not decrease; its last
    entry may be 0 (`betas.rescale_zero_terminal_snr`).

    >>> from eqxldm.betas import alpha_bar_from_betas, linear_betas
    >>> path = DiscreteVP(alpha_bar_from_betas(linear_betas(1000)))
    >>> round(float(path.alpha(1 / 1000)) ** 2, 12)
    0.9999
    """

    alpha_bar: tuple[float, ...] = eqx.field(static=True)  # a constant: nothing to train

    def __init__(self, alpha_bar: Table):
        self.alpha_bar = tuple(check_alpha_bar(alpha_bar).tolist())

    @property
    def timesteps(self) -> int:
        """The length `T` of the table."""
        return len(self.alpha_bar)

    @property
    def prior_std(self) -> float:
        return 1.0  # alpha^2 + sigma^2 of data of unit variance

    def coefficients(self, t: Time) -> Coefficients:
        xp, t = _as_array(t)
        at = t * self.timesteps
        i = xp.clip(xp.floor(at).astype(int), 0, self.timesteps)
        tables = (xp.asarray(table, t.dtype)[i] for table in _circle(self.alpha_bar))
        a, s, first, square, cubic = tables
        u = at - i.astype(t.dtype)
        turned = u * (first + u * (square + u * cubic))
        slope = self.timesteps * (first + u * (2 * square + u * 3 * cubic))
        c, d = xp.cos(turned), xp.sin(turned)
        alpha, sigma = a * c - s * d, s * c + a * d
        return Coefficients(alpha, sigma, -sigma * slope, alpha * slope)


@functools.lru_cache(maxsize=64)
def _circle(alpha_bar: tuple[float, ...]) -> np.ndarray:
    """Of `DiscreteVP`: alpha, sigma and the cubic of the angle from each timestep to the next."""
    from scipy.interpolate import PchipInterpolator  # slow to import, and for this path only

    alpha = np.sqrt(np.array([1.0, *alpha_bar]))
    sigma = np.sqrt(1 - np.array([1.0, *alpha_bar]))
    # The angle from one timestep to the next, without the difference of two angles.
    turns = np.arctan2(
        sigma[1:] * alpha[:-1] - alpha[1:] * sigma[:-1],
        alpha[1:] * alpha[:-1] + sigma[1:] * sigma[:-1],
    )
    knots = np.arange(len(alpha))
    slopes = PchipInterpolator(knots, np.append(0.0, np.cumsum(turns))).derivative()(knots)
    # That rule may set the slope at an end to 0, where a velocity would say nothing.
    slopes[0] = max(slopes[0], turns[0] / 2)
    slopes[-1] = max(slopes[-1], turns[-1] / 2)
    first = slopes[:-1]
    square = 3 * turns - 2 * slopes[:-1] - slopes[1:]
    cubic = slopes[:-1] + slopes[1:] - 2 * turns
    # One more, so that the last timestep is an entry like the others.
    beyond = [slopes[-1], 0.0, 0.0]
    turns = np.column_stack([np.stack([first, square, cubic]), beyond])
    return np.stack([alpha, sigma, *turns])


class CosineVP(AbstractPath):
    """`alpha = cos(phi)`, `sigma = sin(phi)`, `tan(phi) = shift tan(pi t / 2)`.

    With `shift = 1`, `phi = pi t / 2` (Salimans & Ho 2022, section 2). For images of side `d`
    and a schedule tuned at side 64, `shift = d / 64` is the shifted cosine schedule of Hoogeboom
    et al. 2023: `logsnr = -2 log(tan(pi t / 2)) - 2 log(shift)`.

    >>> float(CosineVP().alpha(0.0))
    1.0
    """

    shift: float = eqx.field(static=True)

    def __init__(self, shift: float = 1.0):
        if not (shift > 0 and math.isfinite(shift)):
            raise ValueError(f"CosineVP: shift must be positive, got {shift}.")
        self.shift = float(shift)

    def coefficients(self, t: Time) -> Coefficients:
        xp, t = _as_array(t)
        # sin(pi (1 - t) / 2) and not cos(pi t / 2): exactly 0 at t = 1, exact relative to alpha.
        a, s = xp.sin(np.pi / 2 * (1 - t)), self.shift * xp.sin(np.pi / 2 * t)
        radius = xp.sqrt(a * a + s * s)
        alpha, sigma = a / radius, s / radius
        slope = np.pi / 2 * self.shift / radius**2  # d phi / dt
        return Coefficients(alpha, sigma, -sigma * slope, alpha * slope)


class LinearFlow(AbstractPath):
    """`alpha = 1 - t`, `sigma = t`: rectified flow (Liu et al. 2023; Lipman et al. 2023).

    The velocity `dx_t/dt` is `eps - x0`, constant along a path.

    >>> float(LinearFlow().sigma(0.25))
    0.25
    """

    def coefficients(self, t: Time) -> Coefficients:
        xp, t = _as_array(t)
        return Coefficients(1 - t, t, -xp.ones_like(t), xp.ones_like(t))


class VarianceExploding(AbstractPath):
    """`alpha = 1`, `sigma^2 = sigma_min^2 ((sigma_max / sigma_min)^(2 t) - 1)`.

    The VE SDE's own marginals, 0 at `t = 0` (Song et al. 2021b, appendix B and C). Near 0,
    `sigma` grows like `sqrt(t)`: its derivative is infinite at `t = 0`. Sampling starts from
    `x_T ~ N(0, sigma(1)^2)`, which `Diffusion.sample_prior` draws.

    **Raises** `ValueError` unless `0 < sigma_min < sigma_max`.

    >>> path = VarianceExploding(0.01, 50.0)
    >>> float(path.alpha(0.5)), round(float(path.sigma(1.0)), 4)
    (1.0, 50.0)
    """

    sigma_min: float = eqx.field(static=True)
    sigma_max: float = eqx.field(static=True)

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0):
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(
                "VarianceExploding: need 0 < sigma_min < sigma_max, got "
                f"{sigma_min} and {sigma_max}."
            )
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def coefficients(self, t: Time) -> Coefficients:
        xp, t = _as_array(t)
        rate = 2 * math.log(self.sigma_max / self.sigma_min)
        grown = xp.expm1(rate * t)
        sigma = self.sigma_min * xp.sqrt(grown)
        with np.errstate(divide="ignore"):
            dsigma = self.sigma_min * rate / 2 * (grown + 1) / xp.sqrt(grown)
        return Coefficients(xp.ones_like(t), sigma, xp.zeros_like(t), dsigma)


def q_sample(
    path: AbstractPath,
    x0: Float[Array, "*shape"],
    t: Float[Array, ""] | float,
    eps: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    """The forward process in one jump: `x_t = alpha(t) x0 + sigma(t) eps` (Ho et al. 2020, eq. 4).

    `t` is one time in [0, 1] for the whole of `x0`; map it over a batch with `jax.vmap`.
    With `eps ~ N(0, I)` this is a sample of `q(x_t | x0)`. The result has the dtype of `x0`;
    the coefficients are computed in the dtype of `t`.

    >>> q_sample(LinearFlow(), jnp.ones(3), jnp.array(0.5), jnp.zeros(3))
    Array([0.5, 0.5, 0.5], dtype=float32)
    """
    at = path.coefficients(t)
    return combine(at.alpha, x0, at.sigma, eps)


def combine(
    a: Time, x: Float[Array, "*shape"], b: Time, y: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """`a x + b y` of two numbers and two arrays, in the dtype of `x`.

    Computed in float32 at least: a schedule is not rounded to bfloat16 because the data is.

    >>> combine(0.5, jnp.ones(2, jnp.bfloat16), 2.0, jnp.ones(2, jnp.bfloat16))
    Array([2.5, 2.5], dtype=bfloat16)
    """
    work = at_least_float32(x.dtype)
    a, b = jnp.asarray(a, work), jnp.asarray(b, work)
    return (a * x.astype(work) + b * y.astype(work)).astype(x.dtype)


def at_least_float32(dtype: Any) -> Any:
    """float32 for the half-precision types, any other float type unchanged.

    >>> at_least_float32(jnp.bfloat16) == jnp.float32
    True
    """
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def transition_coefficients(at_s: Coefficients, at_t: Coefficients) -> tuple[Time, Time]:
    """`q(x_t | x_s) = N(r x_s, var)` for `s < t`: returns `(r, var)`.

    `r = alpha_t / alpha_s`, `var = sigma_t^2 - r^2 sigma_s^2` (Ho et al. 2020, eq. 2; for any
    path, Kingma et al. 2021, appendix A). Written as `sigma_t^2 (1 - (r sigma_s /
    sigma_t)^2)`; give float64, in float32 the difference cancels for close times.

    >>> at = LinearFlow().coefficients
    >>> r, var = transition_coefficients(at(0.0), at(0.5))
    >>> float(r), float(var)
    (0.5, 0.25)
    """
    r = at_t.alpha / at_s.alpha
    return r, at_t.sigma**2 * (1 - (r * at_s.sigma / at_t.sigma) ** 2)


def posterior_coefficients(at_s: Coefficients, at_t: Coefficients) -> tuple[Time, Time, Time]:
    """`q(x_s | x_t, x0) = N(c0 x0 + ct x_t, var)` for `s < t`: returns `(c0, ct, var)`.

    With `(r, var_{t|s})` of `transition_coefficients`: `c0 = alpha_s var_{t|s} / sigma_t^2`,
    `ct = r sigma_s^2 / sigma_t^2`, `var = var_{t|s} sigma_s^2 / sigma_t^2` (Ho et al. 2020,
    eq. 6-7; for any path, Kingma et al. 2021, appendix A). At `s = 0`: `(1, 0, 0)`.

    >>> at = LinearFlow().coefficients
    >>> c0, ct, var = posterior_coefficients(at(0.0), at(0.5))
    >>> float(c0), float(ct), float(var)
    (1.0, 0.0, 0.0)
    """
    r, fresh = transition_coefficients(at_s, at_t)
    fresh = fresh / at_t.sigma**2  # the share of the noise at t that came after s
    return at_s.alpha * fresh, r * (at_s.sigma / at_t.sigma) ** 2, at_s.sigma**2 * fresh


def q_posterior(
    path: AbstractPath,
    x0: Float[Array, "*shape"],
    x_t: Float[Array, "*shape"],
    s: float,
    t: float,
) -> tuple[Float[Array, "*shape"], float]:
    """The mean and the variance of `q(x_s | x_t, x0)` for `0 <= s < t <= 1`, in closed form.

    `posterior_coefficients` at two times that Python can see, so in float64 whatever the dtype
    of `x0`; the mean has the dtype of `x0` (Ho et al. 2020, eq. 6-7).

    >>> mean, variance = q_posterior(LinearFlow(), jnp.ones(1), jnp.zeros(1), 0.0, 0.5)
    >>> float(mean[0]), variance
    (1.0, 0.0)
    """
    if not 0 <= s < t <= 1:
        raise ValueError(f"q_posterior: need 0 <= s < t <= 1, got s = {s} and t = {t}.")
    c0, ct, variance = posterior_coefficients(path.coefficients(s), path.coefficients(t))
    return combine(c0, x0, ct, x_t), float(variance)


def time_at_logsnr(path: AbstractPath, logsnr: Float[np.ndarray, "*t"]) -> Float[np.ndarray, "*t"]:
    """The inverse of `path.logsnr`, by bisection to the last bit of float64; any path.

    Values beyond what the path reaches give the nearer end, 0 or 1.

    >>> path = CosineVP()
    >>> time_at_logsnr(path, path.logsnr(np.array([0.25, 0.75])))
    array([0.25, 0.75])
    """
    low, high = np.zeros_like(logsnr), np.ones_like(logsnr)
    for _ in range(1100):  # halves past the smallest float64; ends when nothing moves
        middle = (low + high) / 2
        if np.all((middle == low) | (middle == high)):
            break
        above = path.logsnr(middle) > logsnr
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    with np.errstate(invalid="ignore"):
        nearer = np.abs(path.logsnr(low) - logsnr) < np.abs(path.logsnr(high) - logsnr)
    return np.where(nearer | (logsnr == np.inf), low, high)


def check_concrete_time(t: Any) -> Any:
    """Returns `t`; `ValueError` if it is a number outside [0, 1] that Python can see.

    Under `jit`, where it cannot be seen, `checks.check_time` does the same.

    >>> check_concrete_time(0.5)
    0.5
    """
    if not isinstance(t, Tracer):
        seen = np.asarray(t)
        if not np.all((seen >= 0) & (seen <= 1)):
            raise ValueError(
                f"t must lie in [0, 1] (0 is data, 1 is noise), got {t}. Timestep i of T is "
                "t = (i + 1) / T."
            )
    return t


def _as_array(t: Any) -> tuple[Any, Any]:
    """The array module that `t` belongs to, and `t` as an array of it; floats are NumPy's."""
    check_concrete_time(t)
    return _namespace(t), t if isinstance(t, jax.Array) else np.asarray(t, np.float64)


def _namespace(a: Any) -> Any:
    return jnp if isinstance(a, jax.Array) else np
