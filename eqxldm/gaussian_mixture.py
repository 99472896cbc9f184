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
from jax.scipy.special import log_ndtr
from jaxtyping import Float

from .paths import AbstractPath, Coefficients
from .predictions import Denoiser, Prediction, predict_velocity, target

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

    def flow_map(self, path: AbstractPath) -> Any:
        """`transport` in JAX, differentiable once: the exact `flow_maps.FlowMap` of the data.

        `(x_t, t, s, cond=None, key=None) -> x_s`. By bisection on the logarithm of the smaller
        tail, then a step of Newton's method that has the derivatives of the inverse in `x_t`, `t`
        and `s`. Needs a density at `s`.

        >>> from eqxldm import LinearFlow
        >>> step = GaussianMixture([1.0], [2.0], [0.5]).flow_map(LinearFlow())
        >>> round(float(step(jnp.array(1.0), jnp.array(1.0), jnp.array(0.0))), 5)
        2.5
        """

        def flow_map(x_t: Any, t: Any, s: Any, cond: Any = None, /, *, key: Any = None) -> Any:
            t, s = (jnp.asarray(time, x_t.dtype) for time in (t, s))
            at_t, at_s = path.coefficients(t), path.coefficients(s)
            below, above, _ = self._log_tails(x_t, at_t)
            lower = jax.lax.stop_gradient(below < above)  # by the smaller tail: it has more digits
            side = lambda b, a: jnp.where(lower, b, -a)  # both increase in x
            wanted = side(below, above)
            reach = 40 * jnp.hypot(at_s.alpha * max(self.stds), at_s.sigma)
            reach = reach + jnp.abs(at_s.alpha) * np.max(np.abs(self.means))

            def halve(_: Any, ends: Any) -> Any:
                middle = (ends[0] + ends[1]) / 2
                b, a, _ = self._log_tails(middle, at_s)
                left = side(b, a) < wanted
                return jnp.where(left, middle, ends[0]), jnp.where(left, ends[1], middle)

            ends = jnp.broadcast_to(-reach, x_t.shape), jnp.broadcast_to(reach, x_t.shape)
            ends = jax.lax.stop_gradient(ends)
            halvings = jnp.finfo(x_t.dtype).nmant + 8
            low, high = jax.lax.fori_loop(0, halvings, halve, ends)
            x = jax.lax.stop_gradient((low + high) / 2)
            b, a, log_density = self._log_tails(x, at_s)
            slope = jax.lax.stop_gradient(jnp.exp(log_density - jnp.where(lower, b, a)))
            return x + (wanted - side(b, a)) / slope

        return flow_map

    def average_velocity(self, path: AbstractPath) -> Any:
        """`u(x_t, t, h) = (x_t - x_s) / h`, `s = t - h`, and the velocity where `h = 0`.

        The network that mean flows are to learn, `(x_t, t, cond, key=None, h=0)`. Its digits are
        those of `x_t` divided by `h`: for small steps use float64.

        >>> from eqxldm import LinearFlow
        >>> u = GaussianMixture([1.0], [2.0], [0.5]).average_velocity(LinearFlow())
        >>> round(float(u(jnp.array(1.0), jnp.array(1.0), h=jnp.array(1.0))), 5)
        -1.5
        """
        flow_map, velocity = self.flow_map(path), self.denoiser(path, predict_velocity)

        def average(x_t: Any, t: Any, cond: Any = None, /, *, key: Any = None, h: Any = 0.0) -> Any:
            t, h = jnp.asarray(t, x_t.dtype), jnp.asarray(h, x_t.dtype)
            moved = x_t - flow_map(x_t, t, t - h)
            return jnp.where(h > 0, moved / jnp.where(h > 0, h, 1), velocity(x_t, t, None))

        return average

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

    def _log_tails(self, x: Any, at: Coefficients) -> tuple[Any, Any, Any]:
        """The logarithms of both tails and of the density at `x`."""
        log_w, m, s = (
            jnp.asarray(v, x.dtype) for v in (np.log(self.weights), self.means, self.stds)
        )
        spread = jnp.hypot(at.alpha * s, at.sigma)
        z = (x[..., None] - at.alpha * m) / spread
        total = lambda logs: jax.nn.logsumexp(log_w + logs, axis=-1)
        log_density = -0.5 * z**2 - jnp.log(spread * np.sqrt(2 * np.pi))
        return total(log_ndtr(z)), total(log_ndtr(-z)), total(log_density)
