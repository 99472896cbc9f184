"""FD-loss: a one-step generator trained on the Fréchet distance of its features to real ones.

The distance is that of `metrics.frechet_distance`, in JAX and differentiable. It needs moments of
many more samples than a batch has, so those of the generated features are running averages, through
which the newest batch alone has a gradient (Yang et al. 2026, "FD-loss").
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..paths import at_least_float32


class FeatureMoments(eqx.Module):
    """The mean of features and of their outer products: what averages of batches are made of.

    >>> moments = feature_moments(jnp.array([[0.0], [2.0]]))
    >>> moments.mean, moments.covariance
    (Array([1.], dtype=float32), Array([[1.]], dtype=float32))
    """

    mean: Float[Array, " d"]
    second: Float[Array, "d d"]

    @property
    def covariance(self) -> Float[Array, "d d"]:
        """`E[f f'] - E[f] E[f]'`, of all examples and not unbiased."""
        return self.second - jnp.outer(self.mean, self.mean)


def feature_moments(features: Float[Array, "n d"]) -> FeatureMoments:
    """The moments of a batch of features, in float32 at least.

    >>> feature_moments(jnp.ones((4, 2))).mean
    Array([1., 1.], dtype=float32)
    """
    f = features.astype(at_least_float32(features.dtype))
    outer = jnp.matmul(f.T, f, precision=jax.lax.Precision.HIGHEST)
    return FeatureMoments(jnp.mean(f, 0), outer / len(f))


def update_moments(
    running: FeatureMoments, features: Float[Array, "n d"], decay: float
) -> FeatureMoments:
    """`decay running + (1 - decay) batch`; the gradient goes through the batch alone.

    >>> zero = FeatureMoments(jnp.zeros(1), jnp.zeros((1, 1)))
    >>> update_moments(zero, jnp.ones((2, 1)), 0.5).mean
    Array([0.5], dtype=float32)
    """
    if not 0 <= decay < 1:
        raise ValueError(f"update_moments: decay must lie in [0, 1), got {decay}.")
    mix = lambda old, new: decay * jax.lax.stop_gradient(old) + (1 - decay) * new
    return jax.tree.map(mix, running, feature_moments(features))


def moments_distance(x: FeatureMoments, y: FeatureMoments, *, ridge: float = 1e-6) -> Any:
    """`|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))`, differentiable in `y`.

    The trace of the root is `sum sqrt eig(R C_y R)`, `R = C_x^(1/2)`; eigenvalues below `ridge`
    times the largest count as that, where the root has no derivative. `x` are the real images'.

    >>> x, y = (feature_moments(jnp.array([[0.0], [2.0]]) + a) for a in (0.0, 3.0))
    >>> round(float(moments_distance(x, y)), 3)
    9.0
    """
    precise = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(x.covariance))
    root = precise(vectors * jnp.sqrt(jnp.maximum(values, 0)), vectors.T)
    product = precise(precise(root, y.covariance), root)
    eigenvalues = jnp.linalg.eigvalsh((product + product.T) / 2)
    least = ridge * jax.lax.stop_gradient(jnp.maximum(eigenvalues[-1], ridge))
    shared = jnp.sum(jnp.sqrt(jnp.maximum(eigenvalues, least)))
    traces = jnp.trace(x.covariance) + jnp.trace(y.covariance)
    return jnp.sum((x.mean - y.mean) ** 2) + traces - 2 * shared


def frechet_loss(
    features: Float[Array, "n d"],
    real: FeatureMoments,
    running: FeatureMoments,
    *,
    decay: float = 0.999,
    eps: float = 0.01,
) -> tuple[Float[Array, ""], tuple[FeatureMoments, Float[Array, ""]]]:
    """`FD / (sg(FD) + eps)` of the running moments with this batch in them, and those moments.

    For post-training a generator of one or few steps: `features` are those of a batch that it has
    just made (its own gradient comes through them), by any network. Sum the losses of several
    feature functions; one alone is overfitted. Begin `running` with the moments of some thousand
    samples of the untouched generator.

    **Returns** the loss and `(moments, FD)`: hand the moments to the next step.

    >>> real = feature_moments(jax.random.normal(jax.random.key(0), (64, 2)))
    >>> loss, (moments, distance) = frechet_loss(
    ...     3 + jax.random.normal(jax.random.key(1), (64, 2)), real, real, decay=0.5)
    >>> bool(distance > 0), moments.mean.shape
    (True, (2,))
    """
    moments = update_moments(running, features, decay)
    distance = moments_distance(real, moments)
    scaled = distance / (jax.lax.stop_gradient(distance) + eps)
    return scaled, jax.lax.stop_gradient((moments, distance))
