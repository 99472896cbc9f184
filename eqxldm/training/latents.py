"""The statistics that give latents unit variance."""

import numpy as np
from jaxtyping import Float

Moments = Float[np.ndarray, "n zc *spatial"]


def measure_latents(mean: Moments, logvar: Moments) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`(shift, scale)` for each channel, so that posterior samples have mean 0 and variance 1.

    `shift` is the mean over examples and positions, `1 / scale^2 = var(mean) + mean(exp(logvar))`:
    the variance of a sample by the law of total variance. Computed in float64.

    >>> shift, scale = measure_latents(np.ones((3, 1, 2, 2)), np.zeros((3, 1, 2, 2)))
    >>> shift, scale
    ((1.0,), (1.0,))
    """
    per_channel = lambda a: np.moveaxis(a, 1, 0).reshape(a.shape[1], -1).astype(np.float64)
    mean, logvar = per_channel(mean), per_channel(logvar)
    variance = mean.var(1) + np.exp(logvar).mean(1)
    if not np.all(variance > 0):
        raise ValueError("measure_latents: a latent channel has no variance.")
    return tuple(mean.mean(1).tolist()), tuple((variance**-0.5).tolist())
