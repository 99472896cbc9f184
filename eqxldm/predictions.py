"""What a network's output means.

A prediction says which mix `out = a x0 + b eps` the network is trained to output, as a function
of the path's coefficients. Together with `x_t = alpha x0 + sigma eps` that is a 2 x 2 system:

    [alpha sigma] [x0 ]   [x_t]
    [a     b    ] [eps] = [out]      determinant D = alpha b - sigma a

whose solution turns any prediction into `(x0, eps)`, and so into any other. Where D = 0 the
output says nothing that `x_t` does not say already; each prediction names where that is.

| prediction | `(a, b)` | D | singular |
|---|---|---|---|
| `predict_eps` | `(0, 1)` | `alpha` | x0 where alpha = 0 (t = 1 of most paths) |
| `predict_x0` | `(1, 0)` | `-sigma` | eps at t = 0 |
| `predict_v` | `(-sigma, alpha)` | `alpha^2 + sigma^2` | nowhere |
| `predict_velocity` | `(alpha', sigma')` | `alpha sigma' - sigma alpha'` | nowhere: D > 0 |
| `predict_score` | `(0, -1 / sigma)` | `-alpha / sigma` | x0 where alpha = 0, out at t = 0 |

What has a finite limit at a singular end is computed as that limit: of an eps network at alpha = 0,
eps; of an x0 network at t = 0, x0; of a score network at t = 0, both.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .paths import Coefficients, Time, combine

Mix = tuple[Time, Time]
Prediction = Callable[[Coefficients], Mix]


@runtime_checkable
class Denoiser(Protocol):
    """A network seen from the diffusion side: one noised example, its time, its condition.

    Any callable of this signature is one. The output has the shape of `x_t`; that of a network
    with `learned_range` variance has twice the entries along the first axis.

    >>> denoiser = lambda x_t, t, cond, key=None: jnp.zeros_like(x_t)
    >>> isinstance(denoiser, Denoiser)
    True
    """

    def __call__(
        self, x_t: Float[Array, "*shape"], t: Float[Array, ""], cond: Any, /, *, key: Any = None
    ) -> Float[Array, "*out"]: ...


def predict_eps(at: Coefficients) -> Mix:
    """`out = eps` (Ho et al. 2020). D = alpha: singular where alpha = 0, as `LinearFlow` at t = 1.

    >>> from eqxldm.paths import LinearFlow
    >>> a, b = predict_eps(LinearFlow().coefficients(jnp.array(0.5))); float(a), float(b)
    (0.0, 1.0)
    """
    return 0 * at.alpha, 1 + 0 * at.alpha


def predict_x0(at: Coefficients) -> Mix:
    """`out = x0`. D = -sigma: singular at t = 0, where `x_t` is `x0` already.

    >>> from eqxldm.paths import LinearFlow
    >>> a, b = predict_x0(LinearFlow().coefficients(jnp.array(0.5))); float(a), float(b)
    (1.0, 0.0)
    """
    return 1 + 0 * at.alpha, 0 * at.alpha


def predict_v(at: Coefficients) -> Mix:
    """`out = v = alpha eps - sigma x0` (Salimans & Ho 2022). D = alpha^2 + sigma^2: never singular.

    >>> from eqxldm.paths import LinearFlow
    >>> a, b = predict_v(LinearFlow().coefficients(jnp.array(0.5))); float(a), float(b)
    (-0.5, 0.5)
    """
    return -at.sigma, at.alpha


def predict_velocity(at: Coefficients) -> Mix:
    """`out = d x_t / d t = alpha' x0 + sigma' eps` (Lipman et al. 2023; SiT, Ma et al. 2024).

    `D = alpha sigma' - sigma alpha'` is positive on every path whose logSNR decreases; it is 1
    on the linear flow.

    >>> from eqxldm.paths import LinearFlow
    >>> a, b = predict_velocity(LinearFlow().coefficients(jnp.array(0.5))); float(a), float(b)
    (-1.0, 1.0)
    """
    return at.dalpha, at.dsigma


def predict_score(at: Coefficients) -> Mix:
    """`out = grad log q(x_t) = -E[eps | x_t] / sigma` (Song et al. 2021b; Vincent 2011).

    D = -alpha / sigma: `x0 = (x_t + sigma^2 out) / alpha`. Infinite as a target at t = 0.

    >>> from eqxldm.paths import LinearFlow
    >>> a, b = predict_score(LinearFlow().coefficients(jnp.array(0.5))); float(a), float(b)
    (0.0, -2.0)
    """
    with np.errstate(divide="ignore"):
        return 0 * at.sigma, -1 / at.sigma


class LearnedRange(eqx.Module):
    """A prediction whose network outputs, beside the mean's part, where its variance lies.

    The output has twice the entries along the first axis (channels): first what `prediction`
    says, then `u` in about [-1, 1], which means the log-variance `w log(beta) + (1 - w)
    log(beta-tilde)`, `w = (u + 1) / 2` (Nichol & Dhariwal 2021, eq. 15). `DDPM(learned_range)`
    and the variational bound use it; all other solvers leave it out.

    >>> from eqxldm.paths import LinearFlow
    >>> prediction = LearnedRange(predict_eps)
    >>> a, b = prediction(LinearFlow().coefficients(0.5)); float(a), float(b)
    (0.0, 1.0)
    """

    prediction: Prediction = eqx.field(static=True)

    def __call__(self, at: Coefficients) -> Mix:
        return self.prediction(at)


def split_output(
    prediction: Prediction, x_t: Float[Array, "*shape"], out: Float[Array, "*out"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"] | None]:
    """A network's output as what the prediction is about and the variance's part, or None.

    **Raises** `ValueError` if the output does not have the shape that the prediction asks for.

    >>> out, u = split_output(LearnedRange(predict_eps), jnp.zeros(2), jnp.arange(4.0))
    >>> out, u
    (Array([0., 1.], dtype=float32), Array([2., 3.], dtype=float32))
    """
    if isinstance(prediction, LearnedRange):
        if x_t.ndim == 0 or out.shape != (2 * x_t.shape[0], *x_t.shape[1:]):
            raise ValueError(
                f"The denoiser's output has the shape {out.shape}. LearnedRange needs twice the "
                f"channels of x_t, whose shape is {x_t.shape}: the mean's, then the variance's."
            )
        return out[: x_t.shape[0]], out[x_t.shape[0] :]
    if out.shape != x_t.shape:
        raise ValueError(
            f"The denoiser's output has the shape {out.shape}, x_t {x_t.shape}: they must be the "
            "same. Is it a network with a learned variance? Then wrap the prediction in "
            "LearnedRange."
        )
    return out, None


def target(
    prediction: Prediction,
    at: Coefficients,
    x0: Float[Array, "*shape"],
    eps: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    """What the network should output: `a x0 + b eps`.

    >>> from eqxldm.paths import LinearFlow
    >>> at = LinearFlow().coefficients(jnp.array(0.5))
    >>> target(predict_velocity, at, jnp.ones(2), jnp.zeros(2))
    Array([-1., -1.], dtype=float32)
    """
    a, b = prediction(at)
    return combine(a, x0, b, eps)


class Inverse(eqx.Module):
    """`x0 = x0_from_x x_t + x0_from_out out`, `eps = eps_from_x x_t + eps_from_out out`.

    >>> from eqxldm.paths import LinearFlow
    >>> i = inverse(predict_velocity, LinearFlow().coefficients(0.25))
    >>> float(i.x0_from_out), float(i.eps_from_out)
    (-0.25, 0.75)
    """

    x0_from_x: Time
    x0_from_out: Time
    eps_from_x: Time
    eps_from_out: Time


def inverse(prediction: Prediction, at: Coefficients) -> Inverse:
    """The rows of the inverse of the 2 x 2 system: `[[b, -sigma], [-a, alpha]] / D`.

    Where `a = 0` (eps, score) or `b = 0` (x0) the common factor is cancelled first, so that a
    coefficient with a finite limit at a singular end is that limit; the others are infinite.

    >>> from eqxldm.paths import LinearFlow
    >>> i = inverse(predict_eps, LinearFlow().coefficients(1.0))
    >>> float(i.eps_from_x), float(i.eps_from_out), float(i.x0_from_x)
    (0.0, 1.0, inf)
    """
    xp = jnp if isinstance(at.alpha, jax.Array) else np
    a, b = prediction(at)
    no_x0, no_eps = a == 0, b == 0
    one = xp.ones_like(at.alpha)
    # Every division has a harmless divisor where its result is not taken: gradients stay finite.
    with np.errstate(divide="ignore", invalid="ignore"):
        a1, b1 = xp.where(no_x0, one, a), xp.where(no_eps, one, b)
        alpha, sigma = xp.where(no_x0, at.alpha, one), xp.where(no_eps, at.sigma, one)
        determinant = xp.where(no_x0 | no_eps, one, at.alpha * b - at.sigma * a)

        def select(of_eps: Any, of_x0: Any, otherwise: Any) -> Any:
            return xp.where(no_x0, of_eps, xp.where(no_eps, of_x0, otherwise))

        return Inverse(
            select(1 / alpha, 0 * one, b / determinant),
            select(-at.sigma / b1 / alpha, 1 / a1, -at.sigma / determinant),
            select(0 * one, 1 / sigma, -a / determinant),
            select(1 / b1, -at.alpha / a1 / sigma, at.alpha / determinant),
        )


def to_x0_eps(
    prediction: Prediction,
    at: Coefficients,
    x_t: Float[Array, "*shape"],
    out: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Solves `(x_t, out)` for `(x0, eps)`; inverts `target` together with `q_sample`.

    `x0 = (b x_t - sigma out) / D`, `eps = (alpha out - a x_t) / D`, `D = alpha b - sigma a`.
    Infinite or NaN where the prediction is singular and the limit is not finite.

    >>> from eqxldm.paths import LinearFlow
    >>> at = LinearFlow().coefficients(jnp.array(0.5))
    >>> x0, eps = to_x0_eps(predict_velocity, at, jnp.array([0.5]), jnp.array([-1.0]))
    >>> float(x0[0]), float(eps[0])
    (1.0, 0.0)
    """
    return apply_inverse(inverse(prediction, at), x_t, out)


def apply_inverse(
    i: Inverse, x_t: Float[Array, "*shape"], out: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """`(x0, eps)` of `(x_t, out)` by ready coefficients; see `to_x0_eps`.

    >>> from eqxldm.paths import LinearFlow
    >>> i = inverse(predict_v, LinearFlow().coefficients(jnp.array(0.0)))
    >>> apply_inverse(i, jnp.array([2.0]), jnp.array([3.0]))
    (Array([2.], dtype=float32), Array([3.], dtype=float32))
    """
    x0 = combine(i.x0_from_x, x_t, i.x0_from_out, out)
    return x0, combine(i.eps_from_x, x_t, i.eps_from_out, out)


def convert(
    source: Prediction,
    to: Prediction,
    at: Coefficients,
    x_t: Float[Array, "*shape"],
    out: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    """The output that a network of prediction `to` would give where one of `source` gave `out`.

    `a' x0 + b' eps` of `to_x0_eps(source, at, x_t, out)`, the coefficients of `x_t` and `out`
    combined first. Finite wherever both predictions are regular; at a singular end, where the
    part that is infinite is not asked for (eps to score at alpha = 0, for example).

    >>> from eqxldm.paths import LinearFlow
    >>> at = LinearFlow().coefficients(jnp.array(0.5))
    >>> convert(predict_velocity, predict_x0, at, jnp.array([0.5]), jnp.array([-1.0]))
    Array([1.], dtype=float32)
    """
    if source is to:
        return out
    i, (a, b) = inverse(source, at), to(at)
    product = lambda c, d: jnp.where(c == 0, 0 * c, c * jnp.where(c == 0, 0 * d, d))
    with np.errstate(invalid="ignore"):  # of 0 times infinity, which is not taken
        from_x = product(a, i.x0_from_x) + product(b, i.eps_from_x)
        from_out = product(a, i.x0_from_out) + product(b, i.eps_from_out)
    return combine(from_x, x_t, from_out, out)
