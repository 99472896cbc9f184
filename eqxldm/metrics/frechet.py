"""The Fréchet distance between Gaussians fitted to features (FID, Heusel et al. 2017)."""

import numpy as np
from jaxtyping import Float

from .moments import Features, moments_of

Mean = Float[np.ndarray, " d"]
Covariance = Float[np.ndarray, "d d"]


def gaussian_moments(features: Features) -> tuple[Mean, Covariance]:
    """Mean and unbiased covariance of features, in float64.

    >>> mean, covariance = gaussian_moments(np.array([[0.0], [2.0]]))
    >>> mean.tolist(), covariance.tolist()
    ([1.0], [[2.0]])
    """
    if len(features) < 2:
        raise ValueError(f"gaussian_moments: need at least 2 examples, got {len(features)}.")
    found = moments_of(features)
    return found.mean, found.covariance


def gaussian_distance(
    mean_x: Mean, covariance_x: Covariance, mean_y: Mean, covariance_y: Covariance
) -> float:
    """`|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^{1/2})` of two Gaussians; at least 0.

    FID where these are the moments of Inception's pooled features, such as the `mu` and `sigma` of
    a reference file. The trace of the root comes from symmetric eigendecompositions in float64:
    `tr (C_x C_y)^{1/2} = sum sqrt eig(R C_y R)`, `R = C_x^{1/2}`, which stays real and exact for
    singular covariances (features that are always 0, or fewer samples than features).

    **Raises** `ValueError` for moments that are not finite.

    >>> gaussian_distance(np.zeros(1), 4 * np.eye(1), np.ones(1), np.eye(1))
    2.0
    """
    arrays = (mean_x, covariance_x, mean_y, covariance_y)
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(
            "gaussian_distance: a mean or a covariance is not finite. Look for features that are "
            "not, such as those of images with NaNs."
        )
    mx, cx, my, cy = (array.astype(np.float64) for array in arrays)
    values, vectors = np.linalg.eigh(cx)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ cy @ root)
    trace = np.trace(cx) + np.trace(cy) - 2 * np.sum(np.sqrt(np.maximum(product, 0)))
    return float(max(np.sum((mx - my) ** 2) + trace, 0.0))


def frechet_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """`gaussian_distance` of the Gaussians fitted to two sets of features.

    >>> x = np.array([[0.0], [2.0]])
    >>> frechet_distance(x, x + 3.0)
    9.0
    """
    return gaussian_distance(*gaussian_moments(x), *gaussian_moments(y))
