"""The Fréchet distance between Gaussians fitted to features (FID, Heusel et al. 2017)."""

import numpy as np
from jaxtyping import Float

Features = Float[np.ndarray, "n d"]


def gaussian_moments(
    features: Features,
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Mean and unbiased covariance of features, in float64.

    >>> mean, covariance = gaussian_moments(np.array([[0.0], [2.0]]))
    >>> mean.tolist(), covariance.tolist()
    ([1.0], [[2.0]])
    """
    if len(features) < 2:
        raise ValueError(f"gaussian_moments: need at least 2 examples, got {len(features)}.")
    features = features.astype(np.float64)
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """`|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^{1/2})` of the fitted Gaussians; at least 0.

    The trace of the root comes from symmetric eigendecompositions in float64:
    `tr (C_x C_y)^{1/2} = sum sqrt eig(R C_y R)`, `R = C_x^{1/2}`, which stays real and exact for
    singular covariances (features that are always 0).

    >>> x = np.array([[0.0], [2.0]])
    >>> frechet_distance(x, x + 3.0)
    9.0
    """
    (mean_x, cov_x), (mean_y, cov_y) = gaussian_moments(x), gaussian_moments(y)
    values, vectors = np.linalg.eigh(cov_x)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ cov_y @ root)
    trace = np.trace(cov_x) + np.trace(cov_y) - 2 * np.sum(np.sqrt(np.maximum(product, 0)))
    return float(max(np.sum((mean_x - mean_y) ** 2) + trace, 0.0))
