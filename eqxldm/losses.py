"""Losses, one example at a time, their weights, and the samplers of training times.

A weight multiplies the mean square error of what the network outputs. The named ones are defined
in the literature for one prediction; here each takes the prediction that it is to be used with, and
means the same loss for all of them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .paths import AbstractPath, Coefficients, at_least_float32, q_sample
from .predictions import Denoiser, Prediction, split_output, target

Weight = Callable[[Coefficients], Float[Array, ""]]
TimeSampler = Callable[[Key[Array, ""], int], Float[Array, " batch"]]


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


def denoising_loss(
    denoiser: Denoiser,
    path: AbstractPath,
    prediction: Prediction,
    weight: Weight,
    x0: Float[Array, "*shape"],
    t: Float[Array, ""],
    cond: Any,
    *,
    key: Key[Array, ""],
) -> Float[Array, ""]:
    """`w(t) mean (denoiser(x_t, t, cond) - target)^2` for one example, float32 at least.

    `eps ~ N(0, I)` is drawn from `key`, `x_t = alpha x0 + sigma eps`, and `target` is what
    `prediction` says (Ho et al. 2020, eq. 14; Lipman et al. 2023).

    >>> from eqxldm.paths import LinearFlow
    >>> from eqxldm.predictions import predict_x0
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.zeros_like(x_t)
    >>> loss = denoising_loss(denoiser, LinearFlow(), predict_x0, constant_weight,
    ...                       2 * jnp.ones(3), jnp.array(0.5), None, key=jax.random.key(0))
    >>> float(loss)
    4.0
    """
    eps_key, denoiser_key = jax.random.split(key)
    eps = jax.random.normal(eps_key, x0.shape, x0.dtype)
    x_t, at = q_sample(path, x0, t, eps), path.coefficients(t)
    out, _ = split_output(prediction, x_t, denoiser(x_t, t, cond, key=denoiser_key))
    work = at_least_float32(x0.dtype)
    error = out.astype(work) - target(prediction, at, x0, eps).astype(work)
    return jnp.asarray(weight(at), work) * jnp.mean(error * error)


def uniform_time(key: Key[Array, ""], batch: int) -> Float[Array, " batch"]:
    """`t ~ U(0, 1]`, independent; never exactly 0, where some losses are infinite.

    >>> uniform_time(jax.random.key(0), 3).shape
    (3,)
    """
    return 1 - jax.random.uniform(key, (batch,))


def stratified_time(key: Key[Array, ""], batch: int) -> Float[Array, " batch"]:
    """`t_i = 1 - (u + i / n) mod 1`: each `U(0, 1]`, together evenly spread (Kingma et al. 2021).

    The batch mean of a loss has a lower variance than with `uniform_time`.

    >>> bool(jnp.ptp(jnp.diff(jnp.sort(stratified_time(jax.random.key(0), 4)))) < 1e-6)
    True
    """
    return 1 - (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0


def logit_normal_time(mean: float = 0.0, stddev: float = 1.0) -> TimeSampler:
    """`t = sigmoid(m + s n)`, `n ~ N(0, 1)`: middle times more often (Esser et al. 2024, eq. 19).

    A positive mean favours noisy times. Stratified over the batch: `n` are normal quantiles of
    stratified uniforms.

    >>> logit_normal_time(0.0, 1.0)(jax.random.key(0), 3).shape
    (3,)
    """
    if not math.isfinite(mean):
        raise ValueError(f"logit_normal_time: mean must be finite, got {mean}.")
    if not (stddev > 0 and math.isfinite(stddev)):
        raise ValueError(f"logit_normal_time: stddev must be positive, got {stddev}.")

    def sampler(key: Key[Array, ""], batch: int) -> Float[Array, " batch"]:
        # Keep the quantile finite: float32 uniforms can be exactly 0.
        u = jnp.clip(stratified_time(key, batch), 1e-6, 1 - 1e-6)
        return jax.nn.sigmoid(mean + stddev * jax.scipy.stats.norm.ppf(u))

    return sampler


def discrete_time(timesteps: int) -> TimeSampler:
    """`t = (i + 1) / T` with `i ~ U{0, ..., T-1}`: DDPM's own times, where `DiscreteVP` is exact.

    >>> discrete_time(1)(jax.random.key(0), 2)
    Array([1., 1.], dtype=float32)
    """
    if timesteps < 1:
        raise ValueError(f"discrete_time: timesteps must be at least 1, got {timesteps}.")
    return lambda key, batch: (
        (jax.random.randint(key, (batch,), 0, timesteps) + 1).astype(jnp.float32) / timesteps
    )


def kl_to_standard_normal(
    mean: Float[Array, "*shape"], logvar: Float[Array, "*shape"]
) -> Float[Array, ""]:
    """`KL(N(mean, exp(logvar)) || N(0, I)) = 1/2 sum (mean^2 + exp(logvar) - 1 - logvar)`, in nats.

    (Kingma & Welling 2014, appendix B)

    >>> float(kl_to_standard_normal(jnp.zeros(3), jnp.zeros(3)))
    0.0
    """
    return 0.5 * jnp.sum(mean**2 + jnp.expm1(logvar) - logvar)


def hinge_discriminator_loss(
    real: Float[Array, "*shape"], fake: Float[Array, "*shape"]
) -> Float[Array, ""]:
    """`1/2 (mean max(0, 1 - real) + mean max(0, 1 + fake))` of the logits (Lim & Ye 2017).

    >>> float(hinge_discriminator_loss(jnp.zeros(2), jnp.zeros(2)))
    1.0
    """
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def hinge_generator_loss(fake: Float[Array, "*shape"]) -> Float[Array, ""]:
    """`-mean fake` of the logits (Lim & Ye 2017).

    >>> float(hinge_generator_loss(jnp.ones(2)))
    -1.0
    """
    return -jnp.mean(fake)
