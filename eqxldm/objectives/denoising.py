"""The denoising loss: of an example at a time, and as an objective."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from ..diffusion import Diffusion
from ..loss_weights import Weight, constant_weight
from ..paths import at_least_float32
from ..predictions import Denoiser, convert, predict_velocity, split_output, target
from ..times import TimeSampler, uniform_time
from .auxiliary import EXAMPLES, alignment_loss, cosine_loss, dispersive_loss
from .base import Aux, Context, OneTimeObjective


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


class Denoising(OneTimeObjective):
    """Train a denoiser: `w(t) mean (out - target)^2` at times of `time_sampler`.

    **Arguments**: `weight` is one of `eqxldm.loss_weights`, by default the constant 1;
    `time_sampler` one of `eqxldm.times`, by default `uniform_time`. The others are the weights of
    terms that are added, 0 by default:

    - `cosine`: of `cosine_loss`, of the velocities that output and target mean.
    - `early`: of the same loss of the auxiliary head, for `internal_guide` (Zhou et al. 2025).
    - `dispersive`: of `dispersive_loss` of the early tokens, over the batch of `make_loss`.
    - `alignment`: of `alignment_loss` of the early tokens, projected, and the batch's
      `"features"`. The network is an `nn.Aligned`.

    The last three need a network with `outputs`, a `DiT` of an `early_depth`. Each term is logged
    without its weight.

    **Raises** `ValueError` for a term that network or batch cannot give.

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
    cosine: float = eqx.field(static=True, default=0.0)
    early: float = eqx.field(static=True, default=0.0)
    dispersive: float = eqx.field(static=True, default=0.0)
    alignment: float = eqx.field(static=True, default=0.0)

    def __check_init__(self):
        for name in ("cosine", "early", "dispersive", "alignment"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"Denoising: {name} is the weight of a term and must be at least 0, got "
                    f"{getattr(self, name)}."
                )

    def loss(
        self,
        denoiser: Any,
        x0: Float[Array, "*shape"],
        times: Float[Array, ""],
        cond: PyTree,
        *,
        key: Any,
        context: Context | None = None,
        features: Float[Array, "n f"] | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        inside = self.early or self.dispersive or self.alignment
        if not (inside or self.cosine):
            loss = denoising_loss(denoiser, self.diffusion, self.weight, x0, times, cond, key=key)
            return loss, {}
        eps_key, denoiser_key = jax.random.split(key)
        eps = jax.random.normal(eps_key, x0.shape, x0.dtype)
        x_t = self.diffusion.noise(x0, times, eps)
        made: Any = None
        if inside:
            made = self._outputs(denoiser)(x_t, times, cond, key=denoiser_key)
        out = made.out if inside else denoiser(x_t, times, cond, key=denoiser_key)
        weight = self.weight(self.diffusion.path.coefficients(times))
        loss, terms = self._error(out, x_t, x0, times, eps) * weight, {}
        terms["error"] = loss
        if self.cosine:
            terms["cosine"] = self._cosine(out, x_t, x0, times, eps)
        if self.early:
            if made.early is None:
                raise ValueError("Denoising: early needs a DiT made with early_head=True.")
            terms["early"] = self._error(made.early, x_t, x0, times, eps) * weight
        if self.dispersive:
            terms["dispersive"] = dispersive_loss(_gathered(made.tokens))
        if self.alignment:
            terms["alignment"] = self._alignment(denoiser, made.tokens, features)
        added = sum(getattr(self, name) * v for name, v in terms.items() if name != "error")
        return loss + added, terms

    def _outputs(self, denoiser: Any) -> Any:
        found = getattr(denoiser, "outputs", None)
        if found is None:
            raise ValueError(
                "Denoising: early, dispersive and alignment look into the network, and "
                f"{type(denoiser).__name__} has no outputs(). Use a DiT with early_depth."
            )
        return found

    def _error(self, out: Any, x_t: Any, x0: Any, t: Any, eps: Any) -> Any:
        work = at_least_float32(x0.dtype)
        out, _ = split_output(self.diffusion.prediction, x_t, out)
        target = self.diffusion.target(x0, t, eps)
        return jnp.mean((out.astype(work) - target.astype(work)) ** 2)

    def _cosine(self, out: Any, x_t: Any, x0: Any, t: Any, eps: Any) -> Any:
        at, prediction = self.diffusion.path.coefficients(t), self.diffusion.prediction
        out, _ = split_output(prediction, x_t, out)
        found = convert(prediction, predict_velocity, at, x_t, out)
        return cosine_loss(found, target(predict_velocity, at, x0, eps))

    def _alignment(self, denoiser: Any, tokens: Any, features: Any) -> Any:
        project = getattr(denoiser, "project", None)
        if project is None or features is None:
            raise ValueError(
                'Denoising: alignment needs a network in nn.Aligned and "features" in the batch.'
            )
        return alignment_loss(project(tokens), features)


def _gathered(tokens: Any) -> Any:
    """The tokens of all examples of a batch, inside the loss of one of them."""
    if tokens is None:
        raise ValueError("Denoising: dispersive needs a DiT made with early_depth.")
    try:
        return jax.lax.all_gather(tokens, EXAMPLES)
    except NameError:
        raise ValueError(
            "Denoising: dispersive compares the examples of a batch, so that there is no loss of "
            f"one alone. Use make_loss, or jax.vmap(..., axis_name={EXAMPLES!r})."
        ) from None
