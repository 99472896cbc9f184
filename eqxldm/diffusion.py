"""A diffusion: what is noised how, and what the network says of it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .paths import AbstractPath, at_least_float32, q_sample
from .predictions import Prediction, apply_inverse, inverse, split_output, target

X = Float[Array, "*shape"]


class Estimate(eqx.Module):
    """What one network call says: `x0`, `eps`, and where the variance lies if it is learned.

    `x_t = alpha x0 + sigma eps` holds. `range` is the network's `u` in about [-1, 1], or None
    (`predictions.LearnedRange`).

    >>> estimate = Estimate(jnp.ones(2), jnp.zeros(2))
    >>> estimate.range is None
    True
    """

    x0: X
    eps: X
    range: X | None = None


class Diffusion(eqx.Module):
    """A noising path and what the network predicts on it.

    `x_t = alpha(t) x0 + sigma(t) eps`, and the network is trained to output `a x0 + b eps`, with
    `(a, b) = prediction(path.coefficients(t))`. It holds no arrays: close over it, or pass it
    through `jax.jit`, as you like.

    **Arguments**:

    - `path`: `LinearFlow()`, `CosineVP()`, `DiscreteVP(alpha_bar)`, `VarianceExploding()`, or
      one of your own.
    - `prediction`: `predict_eps`, `predict_x0`, `predict_v`, `predict_velocity`, `predict_score`,
      or one of these in `LearnedRange` for a network that outputs its variance too.

    >>> from eqxldm import LinearFlow, predict_velocity
    >>> flow = Diffusion(LinearFlow(), predict_velocity)
    >>> flow.noise(jnp.ones(2), jnp.array(0.25), jnp.zeros(2))
    Array([0.75, 0.75], dtype=float32)
    """

    path: AbstractPath
    prediction: Prediction = eqx.field(static=True)

    @property
    def prior_std(self) -> float:
        """The standard deviation of `x_T`: see `paths.AbstractPath.prior_std`."""
        return self.path.prior_std

    def sample_prior(
        self, shape: tuple[int, ...], *, key: Key[Array, ""], dtype: Any = jnp.float32
    ) -> X:
        """Where sampling starts at `t = 1`: `x_T ~ N(0, prior_std^2)`, of one example.

        >>> from eqxldm import LinearFlow, predict_velocity
        >>> flow = Diffusion(LinearFlow(), predict_velocity)
        >>> flow.sample_prior((4, 8, 8), key=jax.random.key(0)).shape
        (4, 8, 8)
        """
        return jnp.asarray(self.prior_std, dtype) * jax.random.normal(key, shape, dtype)

    def noise(self, x0: X, t: Float[Array, ""] | float, eps: X) -> X:
        """`x_t = alpha(t) x0 + sigma(t) eps`: see `paths.q_sample`."""
        return q_sample(self.path, x0, t, eps)

    def target(self, x0: X, t: Float[Array, ""] | float, eps: X) -> X:
        """What the network should output at `x_t`: `a x0 + b eps`.

        >>> from eqxldm import LinearFlow, predict_velocity
        >>> flow = Diffusion(LinearFlow(), predict_velocity)
        >>> flow.target(jnp.ones(2), jnp.array(0.25), jnp.zeros(2))
        Array([-1., -1.], dtype=float32)
        """
        return target(self.prediction, self.path.coefficients(t), x0, eps)

    def estimate(self, x_t: X, t: Float[Array, ""] | float, out: Float[Array, "*out"]) -> Estimate:
        """What an output at `x_t` says of `x0` and `eps`, in float32 at least.

        Infinite or NaN where the prediction is singular (the table in `eqxldm.predictions`).

        **Raises** `ValueError` if the output does not have the shape that the prediction asks for.

        >>> from eqxldm import LinearFlow, predict_velocity
        >>> flow = Diffusion(LinearFlow(), predict_velocity)
        >>> flow.estimate(jnp.array([0.5]), jnp.array(0.5), jnp.array([-1.0])).x0
        Array([1.], dtype=float32)
        """
        out, variance = split_output(self.prediction, x_t, out)
        work = at_least_float32(x_t.dtype)
        rows = inverse(self.prediction, self.path.coefficients(t))
        x0, eps = apply_inverse(rows, x_t.astype(work), out.astype(work))
        return Estimate(x0, eps, None if variance is None else variance.astype(work))
