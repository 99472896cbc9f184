"""Whether fakes lie among the reals and reals among the fakes, by neighbours in feature space.

Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Real = Float[np.ndarray, "n d"]
Fake = Float[np.ndarray, "m d"]
Distances = Float[np.ndarray, "n m"]


class Manifold(NamedTuple):
    """Shares of one set that lie on the other's manifold; the density can be above 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(
    real: Real,
    fake: Fake,
    *,
    k: int = 3,
    k_density: int = 5,
    half: bool = False,
    block: int = 1024,
) -> Manifold:
    """Precision, recall, density and coverage together: each distance is computed once.

    A set's manifold is the union of balls around its points, each reaching to the point's `k`-th
    nearest neighbour in the set, not counting itself (Kynkäänniemi et al. 2019, eq. 1-2). Precision
    is the share of the fakes on the real manifold, recall that of the reals on the fake one.

    Density and coverage take balls around the reals alone, to the neighbour `k_density`, without
    their surface (Naeem et al. 2020, eq. 4 and 6): density is how many balls a fake lies in, over
    `k_density`; coverage the share of the balls that hold a fake. Neither grows with an outlier as
    the first two do.

    **Arguments**: `half` has the distances in float16, as ADM's evaluator does (and in float32
    where one of a block is beyond its range): the third digit can differ. `block` rows of the
    matrix of distances are in memory at a time; no result depends on it but that of such a range.

    **Raises** `ValueError` for a number of neighbours below 1 or not below both counts.

    >>> points = np.arange(8.0)[:, None]
    >>> manifold_scores(points, points, k=2, k_density=2)
    Manifold(precision=1.0, recall=1.0, density=0.625, coverage=1.0)
    """
    for name, count in (("k", k), ("k_density", k_density)):
        if not 1 <= count < min(len(real), len(fake)):
            raise ValueError(
                f"manifold_scores: {name} must be 1 or more and below both counts, "
                f"{len(real)} and {len(fake)}; got {count}."
            )
    kind = np.float32 if half else np.float64
    real, fake = real.astype(kind), fake.astype(kind)
    (real_radii, ball_radii) = _radii(real, (k, k_density), half, block)
    (fake_radii,) = _radii(fake, (k,), half, block)
    fake_inside, real_inside, covered = np.zeros(len(fake), bool), [], []
    balls = 0
    for rows, d in _rows(real, fake, half, block):
        fake_inside |= (d <= real_radii[rows, None]).any(0)
        real_inside.append((d <= fake_radii).any(1))
        held = d < ball_radii[rows, None]
        balls += int(held.sum())
        covered.append(held.any(1))
    return Manifold(
        float(np.mean(fake_inside)),
        float(np.mean(np.concatenate(real_inside))),
        balls / (k_density * len(fake)),
        float(np.mean(np.concatenate(covered))),
    )


def precision_recall(
    real: Real, fake: Fake, *, k: int = 3, half: bool = False, block: int = 1024
) -> tuple[float, float]:
    """`(precision, recall)` of `manifold_scores`.

    >>> points = np.arange(8.0)[:, None]
    >>> precision_recall(points, points + 100.0, k=2)
    (0.0, 0.0)
    """
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"precision_recall: k must be 1 or more and below both counts, got {k}.")
    found = manifold_scores(real, fake, k=k, k_density=k, half=half, block=block)
    return found.precision, found.recall


def density_coverage(
    real: Real, fake: Fake, *, k: int = 5, block: int = 1024
) -> tuple[float, float]:
    """`(density, coverage)` of `manifold_scores`.

    >>> points = np.arange(8.0)[:, None]
    >>> density_coverage(points, points + 100.0, k=2)
    (0.0, 0.0)
    """
    found = manifold_scores(real, fake, k=k, k_density=k, block=block)
    return found.density, found.coverage


def _squared_distances(x: Real, y: Fake) -> Distances:
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None]
    return np.maximum(squares - 2 * x @ y.T, 0)


def _half_distances(x: Real, y: Fake) -> Distances:
    """The same in float16, sums in float32: what a GPU gives; in float32 where one is beyond it."""
    with np.errstate(over="ignore", invalid="ignore"):
        x16, y16 = x.astype(np.float16), y.astype(np.float16)
        squares = lambda f: (f * f).sum(1, dtype=np.float32).astype(np.float16)
        products = (x16.astype(np.float32) @ y16.astype(np.float32).T).astype(np.float16)
        found = squares(x16)[:, None] - np.float16(2) * products + squares(y16)[None]
    if not np.isfinite(found).all():
        return _squared_distances(x, y)
    return np.maximum(found, np.float16(0)).astype(np.float32)


def _rows(x: Real, y: Fake, half: bool, block: int) -> Iterator[tuple[slice, Distances]]:
    distances = _half_distances if half else _squared_distances
    for i in range(0, len(x), block):
        rows = slice(i, min(i + block, len(x)))
        yield rows, distances(x[rows], y)


def _radii(
    points: Real, ks: tuple[int, ...], half: bool, block: int
) -> list[Float[np.ndarray, " n"]]:
    """The squared distances to the k-th neighbours, the point itself not counted."""
    found = [np.partition(d, ks, axis=1)[:, ks] for _, d in _rows(points, points, half, block)]
    return list(np.concatenate(found).T)
