"""The hybrid loss, which learns variances by the variational bound: DiT's."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from ..diffusion import Diffusion, Estimate
from ..likelihood import (
    LogLikelihood,
    discretized_gaussian_log_likelihood,
    estimate_at,
    step_bits,
    step_table,
)
from ..paths import DiscreteVP, at_least_float32, check_concrete_time
from ..predictions import Denoiser, LearnedRange
from ..solvers import learned_range
from ..times import discrete_time, timestep_times
from .base import AbstractObjective, Aux, Context


def hybrid_loss(
    denoiser: Denoiser,
    diffusion: Diffusion,
    x0: Float[Array, "*shape"],
    t: Float[Array, ""],
    cond: Any,
    *,
    key: Key[Array, ""],
    vlb_weight: float = 1.0,
    log_likelihood: LogLikelihood = discretized_gaussian_log_likelihood,
) -> Float[Array, ""]:
    """`mean (out - target)^2 + vlb_weight L_vlb(t)`, in `L_vlb` the mean without gradient.

    DiT's loss and `L_hybrid` (Nichol & Dhariwal 2021, eq. 16, where the weight is 0.001 of a sum
    over T; DiT takes 1). The diffusion is a `DiscreteVP` with a `LearnedRange`. `t` is one of the
    table's own times, `(i + 1) / T`, as `discrete_time(T)` draws them, or is rounded to the
    nearest; `L_vlb(t)` is its step's term of the bound, in bits a dimension.

    **Raises** `ValueError` for another path or prediction.

    >>> from eqxldm import alpha_bar_from_betas, linear_betas, predict_eps
    >>> path = DiscreteVP(alpha_bar_from_betas(linear_betas(10, 0.01, 0.5)))
    >>> diffusion = Diffusion(path, LearnedRange(predict_eps))
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.zeros(2 * x_t.shape[0])
    >>> loss = hybrid_loss(denoiser, diffusion, jnp.ones(3), jnp.array(0.5), None,
    ...                    key=jax.random.key(0))
    >>> bool(loss > 0)
    True
    """
    path = _table_path(diffusion)
    timesteps = path.timesteps
    table = step_table(path, timestep_times(timesteps, np.arange(timesteps)), learned_range)
    check_concrete_time(t)
    i = jnp.clip(jnp.round(t * timesteps).astype(int), 1, timesteps)
    t, step = i.astype(t.dtype) / timesteps, timesteps - i
    row = jax.tree.map(lambda a: a[step], table)
    eps_key, denoiser_key = jax.random.split(key)
    eps = jax.random.normal(eps_key, x0.shape, x0.dtype)
    estimate, out = estimate_at(denoiser, diffusion, x0, t, eps, cond, denoiser_key)
    work = at_least_float32(x0.dtype)
    error = out.astype(work) - diffusion.target(x0, t, eps).astype(work)
    frozen = Estimate(jax.lax.stop_gradient(estimate.x0), estimate.eps, estimate.range)
    return jnp.mean(error * error) + vlb_weight * step_bits(row, x0, frozen, log_likelihood)


class Hybrid(AbstractObjective):
    """Train a denoiser and its variances: `hybrid_loss` at the timesteps of the table.

    **Raises** `ValueError` unless the diffusion is a `DiscreteVP` with a `LearnedRange`.

    >>> from eqxldm import alpha_bar_from_betas, linear_betas, predict_eps
    >>> path = DiscreteVP(alpha_bar_from_betas(linear_betas(1000)))
    >>> Hybrid(Diffusion(path, LearnedRange(predict_eps))).times(jax.random.key(0), 3).shape
    (3,)
    """

    diffusion: Diffusion
    vlb_weight: float = eqx.field(static=True, default=1.0)
    log_likelihood: LogLikelihood = eqx.field(
        static=True, default=discretized_gaussian_log_likelihood
    )

    def __check_init__(self):
        _table_path(self.diffusion)

    def times(self, key: Key[Array, ""], n: int) -> Float[Array, " n"]:
        return discrete_time(_table_path(self.diffusion).timesteps)(key, n)

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
        options: dict[str, Any] = dict(
            vlb_weight=self.vlb_weight, log_likelihood=self.log_likelihood
        )
        return hybrid_loss(denoiser, self.diffusion, x0, times, cond, key=key, **options), {}


def _table_path(diffusion: Diffusion) -> DiscreteVP:
    path = diffusion.path
    if not isinstance(path, DiscreteVP) or not isinstance(diffusion.prediction, LearnedRange):
        raise ValueError(
            "the hybrid loss needs a table of timesteps and a network that outputs its variance: "
            "Diffusion(DiscreteVP(alpha_bar), LearnedRange(predict_eps)); got a path "
            f"{type(path).__name__} and the prediction {diffusion.prediction}."
        )
    return path
