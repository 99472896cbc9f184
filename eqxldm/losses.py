"""Losses, one example at a time, and the samplers of training times."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .paths import AbstractPath, Coefficients, q_sample
from .predictions import Denoiser, Prediction, target

Weight = Callable[[Coefficients], Float[Array, ""]]
TimeSampler = Callable[[Key[Array, ""], int], Float[Array, " batch"]]


def constant_weight(at: Coefficients) -> Float[Array, ""]:
    """`w = 1`: for eps this is `L_simple` (Ho et al. 2020, eq. 14).

    >>> from eqxldm.paths import LinearFlow
    >>> float(constant_weight(LinearFlow().coefficients(jnp.array(0.5))))
    1.0
    """
    return jnp.ones_like(at.alpha)


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
    """`w(t) mean (denoiser(x_t, t, cond) - target)^2` for one example, always float32.

    `eps ~ N(0, I)` is drawn from `key`, `x_t = alpha x0 + sigma eps`, and `target` is what
    `prediction` says (Ho et al. 2020, eq. 14; Lipman et al. 2023, eq. 14).

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
    out = denoiser(q_sample(path, x0, t, eps), t, cond, key=denoiser_key)
    at = path.coefficients(t)
    error = (out - target(prediction, at, x0, eps)).astype(jnp.float32)
    return weight(at).astype(jnp.float32) * jnp.mean(error * error)


def uniform_time(key: Key[Array, ""], batch: int) -> Float[Array, " batch"]:
    """`t ~ U(0, 1)`, independent.

    >>> uniform_time(jax.random.key(0), 3).shape
    (3,)
    """
    return jax.random.uniform(key, (batch,))


def stratified_time(key: Key[Array, ""], batch: int) -> Float[Array, " batch"]:
    """`t_i = (u + i / n) mod 1`: each `t_i ~ U(0, 1)`, together evenly spread (Kingma et al. 2021).

    The batch mean of a loss has a lower variance than with `uniform_time`.

    >>> bool(jnp.ptp(jnp.diff(jnp.sort(stratified_time(jax.random.key(0), 4)))) < 1e-6)
    True
    """
    return (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0


def logit_normal_time(mean: float = 0.0, stddev: float = 1.0) -> TimeSampler:
    """`t = sigmoid(m + s n)`, `n ~ N(0, 1)`: middle times more often (Esser et al. 2024, eq. 19).

    A positive mean favours noisy times. Stratified over the batch: `n` are normal quantiles of
    stratified uniforms.

    >>> logit_normal_time(0.0, 1.0)(jax.random.key(0), 3).shape
    (3,)
    """
    if not stddev > 0:
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
