"""The variational bound in bits a dimension.

    -log p(x0) <= KL(q(x_1 | x0) || p(x_1))                      the prior term
                + sum KL(q(x_s | x_t, x0) || p(x_s | x_t))        one a step, s > 0
                - log p(x0 | x_t)                                 the decoder, the step to s = 0

(Ho et al. 2020, eq. 5). `p(x_s | x_t)` is what `solvers.DDPM` samples from. The decoder is a
discretised Gaussian: the probability of the 8-bit value, for data in [-1, 1].
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from .diffusion import Diffusion, Estimate
from .paths import AbstractPath, at_least_float32, posterior_coefficients
from .predictions import Denoiser, split_output
from .sampling import check_combination
from .solvers import DDPM, Variance, fixed_small, intervals, log_variance
from .times import Grid, check_times

NATS_A_BIT = math.log(2.0)
LogLikelihood = Callable[[Array, Array, Array], Array]


def normal_kl(
    mean1: Float[Array, "*shape"],
    logvar1: Float[Array, "*#shape"],
    mean2: Float[Array, "*shape"],
    logvar2: Float[Array, "*#shape"],
) -> Float[Array, "*shape"]:
    """`KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2)))` of each element, in nats.

    `1/2 (logvar2 - logvar1 + exp(logvar1 - logvar2) - 1 + (mean1 - mean2)^2 exp(-logvar2))`;
    never negative.

    >>> zero = jnp.zeros(1)
    >>> normal_kl(zero + 1, zero, zero, zero)
    Array([0.5], dtype=float32)
    """
    d = logvar1 - logvar2
    return 0.5 * (jnp.expm1(d) - d + (mean1 - mean2) ** 2 * jnp.exp(-logvar2))


def discretized_gaussian_log_likelihood(
    x: Float[Array, "*shape"],
    mean: Float[Array, "*shape"],
    log_std: Float[Array, "*#shape"],
) -> Float[Array, "*shape"]:
    """`log P(bin of x)` under `N(mean, exp(log_std)^2)`, in nats, of each element.

    The bins are the 256 values of 8-bit data scaled to [-1, 1], each `2 / 255` wide and centred
    on its value; the first and the last extend to infinity (Ho et al. 2020, eq. 13).

    >>> wide = discretized_gaussian_log_likelihood(jnp.zeros(1), jnp.zeros(1), jnp.full(1, -9.0))
    >>> float(wide[0]) > -1e-6
    True
    """
    above, below = _bin_edges(x, mean, log_std)
    log_ndtr = jax.scipy.special.log_ndtr
    # From the tail on which the bin lies, so that a small probability is no difference of ones.
    upper = jnp.where(x > mean, -below, above)
    lower = jnp.where(x > mean, -above, below)
    ratio = jnp.minimum(log_ndtr(lower) - log_ndtr(upper), -1e-30)
    inside = log_ndtr(upper) + jnp.log(-jnp.expm1(ratio))
    return _open_ends(x, log_ndtr(above), inside, log_ndtr(-below))


def approximate_gaussian_log_likelihood(
    x: Float[Array, "*shape"],
    mean: Float[Array, "*shape"],
    log_std: Float[Array, "*#shape"],
) -> Float[Array, "*shape"]:
    """As `discretized_gaussian_log_likelihood`, with the approximations of published figures.

    `Phi(u) = (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2`, probabilities cut off at 1e-12:
    what guided-diffusion and DiT compute. For comparison with their numbers; the relative
    difference is about 1e-4.

    >>> wide = approximate_gaussian_log_likelihood(jnp.zeros(1), jnp.zeros(1), jnp.full(1, -9.0))
    >>> float(wide[0]) > -1e-6
    True
    """
    above, below = _bin_edges(x, mean, log_std)
    cdf = lambda u: 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    log = lambda p: jnp.log(jnp.maximum(p, 1e-12))
    return _open_ends(x, log(cdf(above)), log(cdf(above) - cdf(below)), log(1 - cdf(below)))


def _bin_edges(x: Array, mean: Array, log_std: Array) -> tuple[Array, Array]:
    """The upper and the lower edge of the bin, in standard deviations from the mean."""
    inverse_std = jnp.exp(-log_std)
    return (x - mean + 1 / 255) * inverse_std, (x - mean - 1 / 255) * inverse_std


def _open_ends(x: Array, first: Array, inside: Array, last: Array) -> Array:
    return jnp.where(x < -0.999, first, jnp.where(x > 0.999, last, inside))


def prior_bits(
    path: AbstractPath,
    x0: Float[Array, "*shape"],
    *,
    prior_std: float | None = None,
    t: float = 1.0,
) -> Float[Array, ""]:
    """`KL(q(x_t | x0) || N(0, prior_std^2))` at the noisy end, in bits a dimension.

    Near 0 for a schedule that leaves no signal (Ho et al. 2020, eq. 5, `L_T`). `prior_std` is by
    default the path's own, and where sampling starts at `t < 1`, smaller by `sigma(t) / sigma(1)`.

    >>> from eqxldm import LinearFlow
    >>> float(prior_bits(LinearFlow(), jnp.ones(3)))
    0.0
    """
    if prior_std is None:
        prior_std = path.prior_std * float(path.sigma(t)) / float(path.sigma(1.0))
    if not (prior_std > 0 and math.isfinite(prior_std)):
        raise ValueError(f"prior_bits: prior_std must be positive, got {prior_std}.")
    x0, at = x0.astype(at_least_float32(x0.dtype)), path.coefficients(t)
    logvar = jnp.asarray(2 * np.log(at.sigma), x0.dtype)
    prior = jnp.asarray(2 * math.log(prior_std), x0.dtype)
    mean = jnp.asarray(at.alpha, x0.dtype) * x0
    return jnp.mean(normal_kl(mean, logvar, jnp.zeros_like(x0), prior)) / NATS_A_BIT


class StepTable(eqx.Module):
    """What the bound needs of a step `t -> s`: numbers, with one entry a step.

    >>> from eqxldm import LinearFlow, uniform_times
    >>> step_table(LinearFlow(), uniform_times(4)).c0.shape
    (4,)
    """

    t: Any
    c0: Any
    posterior_logvar: Any
    low: Any
    high: Any
    decodes: Any


def step_table(path: AbstractPath, times: Grid, variance: Variance = fixed_small) -> StepTable:
    """The table of a grid, computed in float64, in JAX's default dtype.

    `variance` is `fixed_small`, `fixed_large` or `learned_range`, as for `solvers.DDPM`.

    >>> from eqxldm import LinearFlow, uniform_times
    >>> step_table(LinearFlow(), uniform_times(4)).decodes
    Array([False, False, False,  True], dtype=bool)
    """
    times = check_times(times)
    if times[0] < times[-1]:
        raise ValueError("step_table: times must descend.")
    i = intervals(path, times)
    low, high = variance(i)
    c0, _, posterior = posterior_coefficients(i.at_s, i.at_t)
    decodes = np.asarray(i.s == 0)
    table = StepTable(i.t, c0, np.log(np.where(decodes, 1.0, posterior)), low, high, decodes)
    dtype = jax.dtypes.canonicalize_dtype
    return jax.tree.map(lambda a: jnp.asarray(a, dtype(np.asarray(a).dtype)), table)


def step_bits(
    table: StepTable,
    x0: Float[Array, "*shape"],
    estimate: Estimate,
    log_likelihood: LogLikelihood = discretized_gaussian_log_likelihood,
) -> Float[Array, ""]:
    """The bound's term of one step, in bits a dimension; `table` holds one entry.

    For `s > 0`, `KL(q(x_s | x_t, x0) || p(x_s | x_t))`: both means share `ct x_t`, so they differ
    by `c0 (x0 - estimate.x0)`. For `s = 0`, the decoder's `-log p(x0 | x_t)` (Ho et al. 2020,
    eq. 5 and 13).

    >>> from eqxldm import LinearFlow, uniform_times
    >>> table = jax.tree.map(lambda a: a[0], step_table(LinearFlow(), uniform_times(4)))
    >>> float(step_bits(table, jnp.ones(2), Estimate(jnp.ones(2), jnp.zeros(2))))
    0.0
    """
    x0 = x0.astype(at_least_float32(x0.dtype))
    cast = lambda a: a.astype(x0.dtype) if jnp.issubdtype(a.dtype, jnp.inexact) else a
    table = jax.tree.map(cast, table)
    logvar = log_variance(table.low, table.high, estimate)
    logvar = jnp.broadcast_to(logvar, x0.shape)
    error = table.c0 * (x0 - estimate.x0)
    kl = normal_kl(error, table.posterior_logvar, jnp.zeros_like(x0), logvar)
    nll = -log_likelihood(x0, estimate.x0, logvar / 2)
    return jnp.mean(jnp.where(table.decodes, nll, kl)) / NATS_A_BIT


class Bound(eqx.Module):
    """The variational bound of one example, in bits a dimension.

    >>> bound = Bound(jnp.array(0.5), jnp.array([1.0, 2.0]))
    >>> float(bound.total)
    3.5
    """

    prior: Float[Array, "*b"]
    steps: Float[Array, "*b steps"]

    @property
    def total(self) -> Float[Array, "*b"]:
        """The prior's term and all steps', the decoder's among them."""
        return self.prior + jnp.sum(self.steps, axis=-1)


def variational_bound(
    denoiser: Denoiser,
    diffusion: Diffusion,
    times: Grid,
    x0: Float[Array, "*shape"],
    cond: PyTree = None,
    *,
    key: Key[Array, ""],
    variance: Variance = fixed_small,
    log_likelihood: LogLikelihood = discretized_gaussian_log_likelihood,
    prior_std: float | None = None,
) -> Bound:
    """`-log p(x0) <= prior + sum of steps`, with one draw of `x_t` for each step of the grid.

    `x0` is 8-bit data scaled to [-1, 1]. An unbiased estimate of the bound (Ho et al. 2020,
    eq. 5; Nichol & Dhariwal 2021); `len(times) - 1` network calls. For latents, which are not
    8-bit, only the terms with `s > 0` mean something. `prior_std` is that of `prior_bits`.

    >>> from eqxldm import CosineVP, predict_x0, uniform_times
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.ones_like(x_t)
    >>> bound = variational_bound(denoiser, Diffusion(CosineVP(), predict_x0), uniform_times(5),
    ...                           jnp.ones(3), key=jax.random.key(0))
    >>> bound.steps.shape
    (5,)
    """
    check_combination(diffusion, DDPM(variance), times)
    if times[-1] != 0:
        raise ValueError(f"variational_bound: times must end at 0, got {times[-1]}.")
    path = diffusion.path
    table = step_table(path, times, variance)

    def one(_, row):
        i, row = row
        eps = jax.random.normal(jax.random.fold_in(key, i), x0.shape, x0.dtype)
        estimate, _ = estimate_at(denoiser, diffusion, x0, row.t, eps, cond, None)
        return None, step_bits(row, x0, estimate, log_likelihood)

    _, steps = jax.lax.scan(one, None, (jnp.arange(len(table.t)), table))
    return Bound(prior_bits(path, x0, prior_std=prior_std, t=float(times[0])), steps)


def estimate_at(
    denoiser: Denoiser,
    diffusion: Diffusion,
    x0: Float[Array, "*shape"],
    t: Float[Array, ""],
    eps: Float[Array, "*shape"],
    cond: Any,
    key: Any,
) -> tuple[Estimate, Float[Array, "*shape"]]:
    """The estimate at `x_t`, in float32 at least, and the raw output of the mean's part.

    >>> from eqxldm import LinearFlow, predict_x0
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.ones_like(x_t)
    >>> flow = Diffusion(LinearFlow(), predict_x0)
    >>> _, out = estimate_at(
    ...     denoiser, flow, jnp.zeros(2), jnp.array(0.5), jnp.zeros(2), None, None
    ... )
    >>> out
    Array([1., 1.], dtype=float32)
    """
    x_t = diffusion.noise(x0, t, eps)
    out = denoiser(x_t, t, cond, key=key)
    estimate = diffusion.estimate(x_t, t, out)
    return estimate, split_output(diffusion.prediction, x_t, out)[0]
