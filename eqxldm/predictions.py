"""What a network's output means.

A prediction says which mix `out = a x0 + b eps` the network is trained to output, as a function
of the path's coefficients. Together with `x_t = alpha x0 + sigma eps` that is a 2 x 2 system:

    [alpha sigma] [x0 ]   [x_t]
    [a     b    ] [eps] = [out]      determinant D = alpha b - sigma a

whose solution turns any prediction into `(x0, eps)`, and so into any other. Where D = 0 the
output says nothing that `x_t` does not say already; each prediction names where that is.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from .paths import Coefficients

Mix = tuple[Float[Array, ""], Float[Array, ""]]
Prediction = Callable[[Coefficients], Mix]


@runtime_checkable
class Denoiser(Protocol):
    """A network seen from the diffusion side: one noised example, its time, its condition."""

    def __call__(
        self, x_t: Float[Array, "*shape"], t: Float[Array, ""], cond: Any, /, *, key: Any = None
    ) -> Float[Array, "*shape"]: ...


def predict_eps(at: Coefficients) -> Mix:
    """`out = eps` (Ho et al. 2020). D = alpha: singular where alpha = 0, as `LinearFlow` at t = 1.

    >>> from eqxldm.paths import LinearFlow
    >>> a, b = predict_eps(LinearFlow().coefficients(jnp.array(0.5))); float(a), float(b)
    (0.0, 1.0)
    """
    return jnp.zeros_like(at.alpha), jnp.ones_like(at.alpha)


def predict_x0(at: Coefficients) -> Mix:
    """`out = x0`. D = -sigma: singular at t = 0, where `x_t` is `x0` already.

    >>> from eqxldm.paths import LinearFlow
    >>> a, b = predict_x0(LinearFlow().coefficients(jnp.array(0.5))); float(a), float(b)
    (1.0, 0.0)
    """
    return jnp.ones_like(at.alpha), jnp.zeros_like(at.alpha)


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
    return a.astype(x0.dtype) * x0 + b.astype(x0.dtype) * eps


def to_x0_eps(
    prediction: Prediction,
    at: Coefficients,
    x_t: Float[Array, "*shape"],
    out: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Solves `(x_t, out)` for `(x0, eps)`; inverts `target` together with `q_sample`.

    `x0 = (b x_t - sigma out) / D`, `eps = (alpha out - a x_t) / D`, `D = alpha b - sigma a`.
    Infinite or NaN where the prediction is singular.

    >>> from eqxldm.paths import LinearFlow
    >>> at = LinearFlow().coefficients(jnp.array(0.5))
    >>> x0, eps = to_x0_eps(predict_velocity, at, jnp.array([0.5]), jnp.array([-1.0]))
    >>> float(x0[0]), float(eps[0])
    (1.0, 0.0)
    """
    a, b = prediction(at)
    determinant = at.alpha * b - at.sigma * a
    from_x, from_out = b / determinant, -at.sigma / determinant
    x0 = from_x.astype(x_t.dtype) * x_t + from_out.astype(x_t.dtype) * out
    from_x, from_out = -a / determinant, at.alpha / determinant
    eps = from_x.astype(x_t.dtype) * x_t + from_out.astype(x_t.dtype) * out
    return x0, eps
