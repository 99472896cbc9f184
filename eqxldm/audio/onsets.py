"""When sounds begin, and whether that is when it should be."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LAG = 3  # frames over which loudness must rise
APART = 4  # frames around an onset in which there is no other
LEAST = 1.5  # the rise, summed over bands, that is an onset


def onsets(y: Float[np.ndarray, "frames bands"], *, least: float = LEAST) -> list[int]:
    """The frames of a spectrogram of `MelSpectrogram` in which a sound begins.

    The spectral flux, `sum_k max(0, y[j, k] - max over bands k - 1 .. k + 1 of y[j - 3])`, is how
    much is louder than before; with the maximum over neighbours a pitch that wavers is no new sound
    (Böck & Widmer 2013, SuperFlux). An onset is where it is largest of nine frames and at least
    `least`.

    >>> y = -np.ones((30, 4), np.float32); y[10:, 1] = 1
    >>> onsets(y)
    [10]
    """
    padded = np.pad(y, ((LAG, 0), (1, 1)), mode="edge").astype(np.float64)
    padded[:LAG] = -1  # silence before the beginning
    before = np.maximum(np.maximum(padded[:-LAG, :-2], padded[:-LAG, 2:]), padded[:-LAG, 1:-1])
    flux = np.maximum(y - before, 0).sum(1)
    around = np.pad(flux, APART)
    largest = np.lib.stride_tricks.sliding_window_view(around, 2 * APART + 1).max(1)
    found: list[int] = []
    for j in np.flatnonzero((flux >= least) & (flux == largest)):
        if not found or j - found[-1] > APART:
            found.append(int(j))
    return found


class Matches(NamedTuple):
    """How many events were matched, found and wanted; counts of many clips can be added up.

    >>> Matches(3, 4, 6).precision, Matches(3, 4, 6).recall
    (0.75, 0.5)
    """

    matched: int
    found: int
    wanted: int

    @property
    def precision(self) -> float:
        """The share of what was found that was wanted; NaN of nothing."""
        return self.matched / self.found if self.found else float("nan")

    @property
    def recall(self) -> float:
        """The share of what was wanted that was found; NaN of nothing."""
        return self.matched / self.wanted if self.wanted else float("nan")

    @staticmethod
    def total(parts: Iterable["Matches"]) -> "Matches":
        """The sum over clips.

        >>> Matches.total([Matches(1, 2, 3), Matches(1, 1, 1)])
        Matches(matched=2, found=3, wanted=4)
        """
        parts = list(parts)
        return Matches(*(sum(column) for column in zip(*parts, strict=True))) if parts else NONE


NONE = Matches(0, 0, 0)


def match_events(found: Iterable[float], wanted: Iterable[float], tolerance: float) -> Matches:
    """The most pairs of times no further apart than `tolerance`, each time in one pair at most.

    >>> match_events([1.0, 1.1, 5.0], [1.05, 3.0], 0.2)
    Matches(matched=1, found=3, wanted=2)
    """
    a, b = sorted(found), sorted(wanted)
    i = j = matched = 0
    # Of two ordered lists the earliest that can be paired may as well be.
    while i < len(a) and j < len(b):
        if abs(a[i] - b[j]) <= tolerance:
            i, j, matched = i + 1, j + 1, matched + 1
        elif a[i] < b[j]:
            i += 1
        else:
            j += 1
    return Matches(matched, len(a), len(b))
