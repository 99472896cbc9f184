"""Weights of the denoising loss.

A weight multiplies the mean square error of what the network outputs. The named ones are defined
in the literature for one prediction; here each takes the prediction that it is to be used with, and
means the same loss for all of them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .paths import Coefficients
from .predictions import Prediction

Weight = Callable[[Coefficients], Float[Array, ""]]


def constant_weight(at: Coefficients) -> Float[Array, ""]:
    """`w = 1`: for eps this is `L_simple` (Ho et al. 2020, eq. 14).

    >>> from eqxldm.paths import LinearFlow
    >>> float(constant_weight(LinearFlow().coefficients(jnp.array(0.5))))
    1.0
    """
    return jnp.ones_like(at.alpha)


def _weighted(prediction: Prediction, of_x0: Callable[[Any, Any], Any]) -> Weight:
    """The weight `of_x0(alpha^2, sigma^2) / sigma^2` of an x0 loss, as one of `prediction`'s.

    An error `d` of the output is an error `-sigma / D d` of x0, so the weight of the output is
    `of_x0 / D^2`, in which nothing is infinite that need not be: only D can be 0. At such ends it
    is taken just beside, with alpha and sigma of 1e-6 at least, which gives a finite limit; an
    infinite one becomes a large number.
    """

    def weight(at: Coefficients) -> Float[Array, ""]:
        tiny = 1e-6
        beside = Coefficients(
            jnp.maximum(at.alpha, tiny), jnp.maximum(at.sigma, tiny), at.dalpha, at.dsigma
        )
        a, b = prediction(beside)
        determinant = beside.alpha * b - beside.sigma * a
        return of_x0(beside.alpha**2, beside.sigma**2) / determinant**2

    return weight


def snr_weight(prediction: Prediction) -> Weight:
    """`w = SNR` of the x0 loss, `SNR = alpha^2 / sigma^2`, as a weight of `prediction`'s loss.

    The same loss as `constant_weight` with eps (Salimans & Ho 2022, section 4).

    >>> from eqxldm import LinearFlow, predict_eps
    >>> float(snr_weight(predict_eps)(LinearFlow().coefficients(jnp.array(0.25))))
    1.0
    """
    return _weighted(prediction, lambda a2, s2: a2)


def truncated_snr_weight(prediction: Prediction) -> Weight:
    """`w = max(SNR, 1)` of the x0 loss: the larger of the errors of x0 and of eps.

    (Salimans & Ho 2022, section 4)

    >>> from eqxldm import LinearFlow, predict_x0
    >>> float(truncated_snr_weight(predict_x0)(LinearFlow().coefficients(jnp.array(0.75))))
    1.0
    """
    return _weighted(prediction, jnp.maximum)


def min_snr_weight(prediction: Prediction, gamma: float = 5.0) -> Weight:
    """`w = min(SNR, gamma)` of the x0 loss: of eps `min(SNR, gamma) / SNR`, of v on a VP path
    `min(SNR, gamma) / (SNR + 1)` (Hang et al. 2023).

    >>> from eqxldm import LinearFlow, predict_x0
    >>> float(min_snr_weight(predict_x0)(LinearFlow().coefficients(jnp.array(0.25))))
    5.0
    """
    _check_positive("min_snr_weight", "gamma", gamma)
    return _weighted(prediction, lambda a2, s2: jnp.minimum(a2, gamma * s2))


def velocity_weight(prediction: Prediction, clip: float = 0.05) -> Weight:
    """`w = (D_v / max(|D|, clip))^2`: the loss of the velocity that a prediction's output means.

    An error of the output is `D / D_v` times one of `d x_t / d t`, with `D_v = alpha sigma' - sigma
    alpha'`. For x0 on `LinearFlow` it is `1 / max(t, clip)^2`: the network says what the data is
    and is judged by where it leads, except for the last `clip` of the way, where the division by
    `t` would be all that counts (Li & He 2025, JiT, section 4; clip 0.05 as in their code).

    >>> from eqxldm import LinearFlow, predict_x0
    >>> float(velocity_weight(predict_x0)(LinearFlow().coefficients(jnp.array(0.5))))
    4.0
    """
    _check_positive("velocity_weight", "clip", clip)

    def weight(at: Coefficients) -> Float[Array, ""]:
        a, b = prediction(at)
        size = jnp.maximum(jnp.abs(at.alpha * b - at.sigma * a), clip)
        return ((at.alpha * at.dsigma - at.sigma * at.dalpha) / size) ** 2

    return weight


def p2_weight(prediction: Prediction, gamma: float = 1.0, k: float = 1.0) -> Weight:
    """`w = 1 / (k + SNR)^gamma` of the eps loss: less for the last, imperceptible noise.

    (Choi et al. 2022)

    >>> from eqxldm import LinearFlow, predict_eps
    >>> float(p2_weight(predict_eps)(LinearFlow().coefficients(jnp.array(0.5))))
    0.5
    """
    _check_positive("p2_weight", "gamma", gamma)
    _check_positive("p2_weight", "k", k)
    return _weighted(prediction, lambda a2, s2: a2 * (s2 / (k * s2 + a2)) ** gamma)


def elbo_weight(prediction: Prediction) -> Weight:
    """`w = -1/2 d logSNR / dt` of the eps loss: with uniform `t`, the variational bound.

    The integral over `t` of this loss, times the number of dimensions, is the diffusion part of
    the negative ELBO in nats (Kingma et al. 2021). It grows without bound towards t = 0,
    where a large number stands for infinity.

    >>> from eqxldm import CosineVP, predict_eps
    >>> round(float(elbo_weight(predict_eps)(CosineVP().coefficients(jnp.array(0.5)))), 4)
    3.1416
    """
    return _logsnr_weighted(prediction, lambda logsnr: 1.0)


def sigmoid_weight(prediction: Prediction, bias: float = 2.0) -> Weight:
    """`w = -1/2 d logSNR / dt sigmoid(bias - logSNR)` of the eps loss.

    The ELBO's weight, less for what is nearly clean (Kingma & Gao 2023; Hoogeboom et al.
    2024). For times that are not uniform, divide by their density.

    >>> from eqxldm import CosineVP, predict_eps
    >>> weight = sigmoid_weight(predict_eps, bias=0.0)
    >>> round(float(weight(CosineVP().coefficients(jnp.array(0.5)))), 4)
    1.5708
    """
    if not math.isfinite(bias):
        raise ValueError(f"sigmoid_weight: bias must be finite, got {bias}.")
    return _logsnr_weighted(prediction, lambda logsnr: jax.nn.sigmoid(bias - logsnr))


def _logsnr_weighted(prediction: Prediction, of_logsnr: Callable[[Any], Any]) -> Weight:
    def weight(at: Coefficients) -> Float[Array, ""]:
        def of_x0(a2: Any, s2: Any) -> Any:
            rate = at.dsigma / jnp.sqrt(s2) - at.dalpha / jnp.sqrt(a2)  # -1/2 d logSNR / dt
            return a2 * rate * of_logsnr(jnp.log(a2) - jnp.log(s2))

        return _weighted(prediction, of_x0)(at)

    return weight


def convert_weight(weight: Weight, source: Prediction, to: Prediction) -> Weight:
    """The weight with which the loss of `to` equals that of `source` weighted by `weight`.

    `w_to = w_source (D_to / D_source)^-2 = w_source (D_source / D_to)^2`, `D = alpha b - sigma a`:
    an error of the output is `-D / sigma` times an error of x0.

    >>> from eqxldm import LinearFlow, predict_eps, predict_x0
    >>> weight = convert_weight(constant_weight, predict_eps, predict_x0)
    >>> float(weight(LinearFlow().coefficients(jnp.array(0.25)))).__round__(4)
    9.0
    """

    def converted(at: Coefficients) -> Float[Array, ""]:
        of_source = _weighted(source, lambda a2, s2: 1.0)(at)
        return weight(at) * _weighted(to, lambda a2, s2: 1.0)(at) / of_source

    return converted


def _check_positive(name: str, argument: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: {argument} must be positive and finite, got {value}.")
