"""Data whose diffusion is known in closed form: to test a solver, a loss or a guidance against.

A mixture of Gaussians stays one along every path, so its optimal denoiser, its marginals and, in
one dimension, the map of the probability-flow ODE are exact.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .paths import AbstractPath
from .predictions import Denoiser, Prediction, target

Numbers = Float[np.ndarray, "*shape"]


class GaussianMixture(eqx.Module):
    """`x0 ~ sum_k w_k N(m_k, s_k^2)`, independently for every element of `x0`.

    At `t` the marginal is `sum_k w_k N(alpha m_k, v_k)`, `v_k = alpha^2 s_k^2 + sigma^2`. A
    standard deviation may be 0: data at points.

    **Raises** `ValueError` unless the weights are positive and sum to 1.

    >>> data = GaussianMixture([0.3, 0.7], [-1.0, 1.0], [0.1, 0.2])
    >>> float(data.cdf(np.array(0.0), 1.0, 0.0).round(6))
    0.3
    """

    weights: Any
    means: Any
    stds: Any

    def __init__(self, weights: Sequence[float], means: Sequence[float], stds: Sequence[float]):
        self.weights, self.means, self.stds = (
            np.asarray(v, np.float64) for v in (weights, means, stds)
        )
        if not len(weights) == len(means) == len(stds) > 0:
            raise ValueError("GaussianMixture: weights, means and stds must have one length.")
        if not (np.all(self.weights > 0) and abs(np.sum(self.weights) - 1) < 1e-9):
            raise ValueError(f"GaussianMixture: weights must be positive, sum to 1; got {weights}.")
        if not np.all(self.stds >= 0):
            raise ValueError(f"GaussianMixture: stds must not be negative, got {stds}.")

    def denoiser(self, path: AbstractPath, prediction: Prediction) -> Denoiser:
        """The optimal network, `E[out | x_t]`, for any prediction.

        With the responsibilities `r_k = P(k | x_t)`: `E[x0 | x_t] = sum r_k (m_k + alpha s_k^2
        d_k)` and `E[eps | x_t] = sum r_k sigma d_k`, `d_k = (x_t - alpha m_k) / v_k`. For `t > 0`.

        >>> from eqxldm import LinearFlow, predict_x0
        >>> denoiser = GaussianMixture([1.0], [2.0], [0.0]).denoiser(LinearFlow(), predict_x0)
        >>> denoiser(jnp.zeros(1), jnp.array(0.5), None)
        Array([2.], dtype=float32)
        """

        def denoiser(x_t: Any, t: Any, cond: Any = None, /, *, key: Any = None) -> Any:
            at = path.coefficients(t)
            alpha, sigma = at.alpha.astype(x_t.dtype), at.sigma.astype(x_t.dtype)
            log_w, m, s = (
                jnp.asarray(v, x_t.dtype) for v in (np.log(self.weights), self.means, self.stds)
            )
            variance = alpha**2 * s**2 + sigma**2
            centred = (x_t[..., None] - alpha * m) / variance
            log_r = log_w - 0.5 * jnp.log(variance) - 0.5 * centred**2 * variance
            r = jax.nn.softmax(log_r, axis=-1)
            x0 = jnp.sum(r * (m + alpha * s**2 * centred), axis=-1)
            eps = jnp.sum(r * sigma * centred, axis=-1)
            return target(prediction, at, x0, eps)

        return denoiser

    def cdf(self, x: Numbers, alpha: Any, sigma: Any) -> Numbers:
        """`P(x_t <= x)` where the path has `alpha` and `sigma`; float64.

        >>> data = GaussianMixture([1.0], [0.0], [1.0])
        >>> float(data.cdf(np.array(0.0), 0.5, 0.5))
        0.5
        """
        return self._tails(np.asarray(x, np.float64), alpha, sigma)[0]

    def transport(self, path: AbstractPath, t: float, s: float, x: Numbers) -> Numbers:
        """Where the probability-flow ODE carries `x` at time `t` to at time `s`: `F_s^-1(F_t(x))`.

        In one dimension trajectories cannot cross, so the flow keeps quantiles; each element is
        a dimension of its own. By bisection, to about 1e-14. Needs a density at `s`.

        >>> from eqxldm import LinearFlow
        >>> data = GaussianMixture([1.0], [2.0], [0.5])
        >>> float(data.transport(LinearFlow(), 1.0, 0.0, np.array(1.0)).round(6))
        2.5
        """
        x = np.asarray(x, np.float64)
        at_t, at_s = path.coefficients(t), path.coefficients(s)
        below, above = self._tails(x, at_t.alpha, at_t.sigma)
        spread = np.sqrt(at_s.alpha**2 * np.max(self.stds) ** 2 + at_s.sigma**2)
        reach = 40 * spread + np.max(np.abs(at_s.alpha * self.means))
        low, high = np.full_like(x, -reach), np.full_like(x, reach)
        for _ in range(70):
            middle = (low + high) / 2
            below_m, above_m = self._tails(middle, at_s.alpha, at_s.sigma)
            # By the smaller tail, which has the more digits.
            left = np.where(below < above, below_m < below, above_m > above)
            low, high = np.where(left, middle, low), np.where(left, high, middle)
        return np.asarray((low + high) / 2)

    def draw(self, count: int, *, seed: int) -> Numbers:
        """`count` independent values of `x0`, float64.

        >>> GaussianMixture([0.5, 0.5], [-1.0, 1.0], [0.0, 0.0]).draw(4, seed=0).shape
        (4,)
        """
        rng = np.random.default_rng(seed)
        k = rng.choice(len(self.weights), size=count, p=self.weights)
        return self.means[k] + self.stds[k] * rng.standard_normal(count)

    def _tails(self, x: Any, alpha: Any, sigma: Any) -> tuple[np.ndarray, np.ndarray]:
        from scipy.special import ndtr  # a fifth of a second to import

        spread = np.sqrt(alpha**2 * self.stds**2 + sigma**2)
        z = (np.asarray(x)[..., None] - alpha * self.means) / spread
        below, above = np.sum(self.weights * ndtr(z), -1), np.sum(self.weights * ndtr(-z), -1)
        return np.asarray(below), np.asarray(above)
