"""The denoising loss: of an example at a time, and as an objective."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from ..diffusion import Diffusion
from ..loss_weights import Weight, constant_weight
from ..paths import at_least_float32
from ..predictions import Denoiser, split_output
from ..times import TimeSampler, uniform_time
from .base import AbstractObjective, Aux, Context


def denoising_loss(
    denoiser: Denoiser,
    diffusion: Diffusion,
    weight: Weight,
    x0: Float[Array, "*shape"],
    t: Float[Array, ""],
    cond: Any,
    *,
    key: Key[Array, ""],
) -> Float[Array, ""]:
    """`w(t) mean (denoiser(x_t, t, cond) - target)^2` for one example, float32 at least.

    `eps ~ N(0, I)` is drawn from `key`, `x_t = alpha x0 + sigma eps`, and `target` is what the
    diffusion's prediction says (Ho et al. 2020, eq. 14; Lipman et al. 2023).

    >>> from eqxldm import Diffusion, LinearFlow, constant_weight, predict_x0
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.zeros_like(x_t)
    >>> loss = denoising_loss(denoiser, Diffusion(LinearFlow(), predict_x0), constant_weight,
    ...                       2 * jnp.ones(3), jnp.array(0.5), None, key=jax.random.key(0))
    >>> float(loss)
    4.0
    """
    eps_key, denoiser_key = jax.random.split(key)
    eps = jax.random.normal(eps_key, x0.shape, x0.dtype)
    x_t = diffusion.noise(x0, t, eps)
    out, _ = split_output(diffusion.prediction, x_t, denoiser(x_t, t, cond, key=denoiser_key))
    work = at_least_float32(x0.dtype)
    error = out.astype(work) - diffusion.target(x0, t, eps).astype(work)
    return jnp.asarray(weight(diffusion.path.coefficients(t)), work) * jnp.mean(error * error)


class Denoising(AbstractObjective):
    """Train a denoiser: `w(t) mean (out - target)^2` at times of `time_sampler`.

    **Arguments**: `weight` is one of `eqxldm.loss_weights`, by default the constant 1;
    `time_sampler` one of `eqxldm.times`, by default `uniform_time`.

    >>> from eqxldm import CosineVP, Diffusion, logit_normal_time, min_snr_weight, predict_v
    >>> objective = Denoising(
    ...     Diffusion(CosineVP(), predict_v), min_snr_weight(predict_v), logit_normal_time()
    ... )
    >>> objective.times(jax.random.key(0), 3).shape
    (3,)
    """

    diffusion: Diffusion
    weight: Weight = eqx.field(static=True, default=constant_weight)
    time_sampler: TimeSampler = eqx.field(static=True, default=uniform_time)

    def times(self, key: Key[Array, ""], n: int) -> Float[Array, " n"]:
        return self.time_sampler(key, n)

    def loss(
        self,
        denoiser: Any,
        x0: Float[Array, "*shape"],
        times: Float[Array, ""],
        cond: PyTree,
        *,
        key: Any,
        context: Context | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        loss = denoising_loss(denoiser, self.diffusion, self.weight, x0, times, cond, key=key)
        return loss, {}
