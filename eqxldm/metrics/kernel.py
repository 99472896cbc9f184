"""Distances of sets of features by kernels: KID and CMMD, two maximum mean discrepancies."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Real = Float[np.ndarray, "n d"]
Fake = Float[np.ndarray, "m d"]


class KID(NamedTuple):
    """The mean over the subsets, and their standard deviation: the error of one subset."""

    mean: float
    std: float


def kid(
    real: Real,
    fake: Fake,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    rng: np.random.Generator | np.random.RandomState | None = None,
) -> KID:
    """The kernel distance of two sets, unbiased however few they are (Bińkowski et al. 2018).

    The squared maximum mean discrepancy with the kernel `k(x, y) = (x . y / d + 1)^3`, without the
    terms of a point with itself,

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),

    of `subsets` random subsets of `subset_size` of each. It can be below 0 where the two are alike.

    `rng` draws each subset of the fakes and then that of the reals; None begins a generator at 0.

    **Raises** `ValueError` for subsets of fewer than 2, or of more than there are in a set.

    >>> x = np.random.default_rng(0).standard_normal((64, 4))
    >>> near, far = (kid(x, y, subsets=4, subset_size=32).mean for y in (x, x + 2))
    >>> near < 0.1 < far
    True
    """
    if not 2 <= subset_size <= min(len(real), len(fake)):
        raise ValueError(
            f"kid: subsets of {subset_size}, of {len(real)} real and {len(fake)} fake features. "
            "Take subset_size between 2 and the smaller count; 1000 is what is published."
        )
    rng = np.random.default_rng(0) if rng is None else rng
    found = []
    for _ in range(subsets):
        y = fake[rng.choice(len(fake), subset_size, replace=False)].astype(np.float64)
        x = real[rng.choice(len(real), subset_size, replace=False)].astype(np.float64)
        between = np.mean(_cubic(x, y))
        found.append(_without_diagonal(x) + _without_diagonal(y) - 2 * between)
    return KID(float(np.mean(found)), float(np.std(found)))


def cmmd(real: Real, fake: Fake, *, sigma: float = 10.0, block: int = 2048) -> float:
    """CMMD: 1000 times the squared discrepancy of CLIP's image features (Jayasumana et al. 2024).

    Features are divided by their norms; `k(x, y) = exp(-|x - y|^2 / (2 sigma^2))`; the means are
    over all pairs, a point with itself included, as published. `block` rows are in memory at once.

    **Raises** `ValueError` where a set is empty.

    >>> x = np.random.default_rng(0).standard_normal((64, 4))
    >>> round(cmmd(x, x), 6), cmmd(x, -x) > 0
    (0.0, True)
    """
    if not len(real) or not len(fake):
        raise ValueError("cmmd: a set of features is empty.")
    unit = lambda f: f / np.maximum(np.linalg.norm(f, axis=1, keepdims=True), 1e-12)
    x, y = unit(real.astype(np.float64)), unit(fake.astype(np.float64))

    def mean(a: Real, b: Fake) -> float:
        rows = (a[i : i + block] for i in range(0, len(a), block))
        # |a - b|^2 = 2 - 2 a . b, as both have norm 1.
        total = sum(float(np.sum(np.exp((row @ b.T - 1) / sigma**2))) for row in rows)
        return total / (len(a) * len(b))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def _cubic(x: Real, y: Fake) -> Float[np.ndarray, "n m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _without_diagonal(x: Real) -> float:
    kernel, n = _cubic(x, x), len(x)
    return float((np.sum(kernel) - np.trace(kernel)) / (n * (n - 1)))
