"""Mean and covariance of features that come in parts, in float64: what Fréchet distances need."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Features = Float[np.ndarray, "n d"]


class Moments(NamedTuple):
    """How many features there were, their mean, and the sum of `(f - mean) (f - mean)'`.

    >>> moments_of(np.array([[0.0], [2.0]])).covariance.tolist()
    [[2.0]]
    """

    n: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased covariance: the scatter over `count - 1`.

        **Raises** `ValueError` for fewer than two features.
        """
        if self.n < 2:
            raise ValueError(f"covariance: need at least 2 examples, got {self.n}.")
        return self.scatter / (self.n - 1)


def moments_of(features: Features) -> Moments:
    """The moments of some features, in float64 whatever theirs is.

    >>> moments_of(np.array([[0.0], [2.0]], np.float32)).mean.tolist()
    [1.0]
    """
    wide = features.astype(np.float64)
    mean = wide.mean(0) if len(wide) else np.zeros(features.shape[1])
    centred = wide - mean
    return Moments(len(wide), mean, centred.T @ centred)


def merge_moments(x: Moments, y: Moments) -> Moments:
    """The moments of two sets together, from those of each (Chan, Golub & LeVeque 1983, eq. 2.1).

        mean = (n_x m_x + n_y m_y) / n,  S = S_x + S_y + n_x n_y / n (m_y - m_x) (m_y - m_x)'

    In any order and however the features were divided, the result is that of all at once but for
    float64's rounding: nothing large cancels, as it would between `E[f f']` and `E[f] E[f]'`.

    >>> parts = np.array([[0.0], [2.0], [7.0]])
    >>> merge_moments(moments_of(parts[:1]), moments_of(parts[1:])).mean.tolist()
    [3.0]
    """
    count = x.n + y.n
    if not count:
        return x
    delta, share = y.mean - x.mean, y.n / count
    scatter = x.scatter + y.scatter + x.n * share * np.outer(delta, delta)
    return Moments(count, x.mean + share * delta, scatter)


def stream_moments(parts: Iterable[Features]) -> Moments:
    """The moments of features that come in parts, of which one is in memory at a time.

    **Raises** `ValueError` if there is no part.

    >>> stream_moments(np.ones((2, 3, 4)) for _ in range(0))
    Traceback (most recent call last):
    ...
    ValueError: stream_moments: there are no features.
    """
    total: Moments | None = None
    for part in parts:
        found = moments_of(part)
        total = found if total is None else merge_moments(total, found)
    if total is None:
        raise ValueError("stream_moments: there are no features.")
    return total
