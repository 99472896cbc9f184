"""Precision and recall of generated features (Kynkäänniemi et al. 2019)."""

import numpy as np
from jaxtyping import Bool, Float

Real = Float[np.ndarray, "n d"]
Fake = Float[np.ndarray, "m d"]


def precision_recall(
    real: Real, fake: Fake, *, k: int = 3, block: int = 1024
) -> tuple[float, float]:
    """`(precision, recall)`: the share of one set that lies on the other's estimated manifold.

    A set's manifold is the union of balls around its points, each reaching to the point's `k`-th
    nearest neighbour in the set (Kynkäänniemi et al. 2019, eq. 1-2). Precision asks it of the
    fakes on the real manifold, recall of the reals on the fake one. `block` rows of the distance
    matrix are in memory at a time.

    >>> points = np.arange(8.0)[:, None]
    >>> precision_recall(points, points + 100.0, k=2)
    (0.0, 0.0)
    """
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"precision_recall: k must be 1 or more and below both counts, got {k}.")
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    return (
        float(np.mean(_inside(fake, real, _radii(real, k, block), block))),
        float(np.mean(_inside(real, fake, _radii(fake, k, block), block))),
    )


def _squared_distances(x: Real, y: Fake) -> Float[np.ndarray, "n m"]:
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None]
    return np.maximum(squares - 2 * x @ y.T, 0)


def _radii(points: Real, k: int, block: int) -> Float[np.ndarray, " n"]:
    """The squared distance to the k-th neighbour, the point itself not counted."""
    rows = (points[i : i + block] for i in range(0, len(points), block))
    kth = [np.partition(_squared_distances(row, points), k, axis=1)[:, k] for row in rows]
    return np.concatenate(kth)


def _inside(
    queries: Real, points: Fake, radii: Float[np.ndarray, " m"], block: int
) -> Bool[np.ndarray, " n"]:
    rows = (queries[i : i + block] for i in range(0, len(queries), block))
    return np.concatenate([(_squared_distances(r, points) <= radii).any(1) for r in rows])
