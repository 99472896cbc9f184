"""The Inception score (Salimans et al. 2016)."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import log_softmax, logsumexp


class InceptionScore(NamedTuple):
    """The mean over the parts, and their standard deviation."""

    mean: float
    std: float


def inception_score(
    logits: Float[np.ndarray, "n classes"],
    *,
    splits: int | None = None,
    part: int = 5000,
    rng: np.random.Generator | np.random.RandomState | None = None,
) -> InceptionScore:
    """`exp(mean_i KL(p(y | x_i) | p(y)))`, `p(y) = mean_i p(y | x_i)`: between 1 and the classes.

    Of parts of the samples, whose scores are averaged: parts of `part`, as they come, the last
    one with what is left (ADM's evaluator); or `splits` equal ones (the original, and
    torch-fidelity). The score is lower for smaller parts: compare equal counts only. `rng` shuffles
    first; samples in the order of their classes must be.

    **Raises** `ValueError` where there are fewer samples than `splits`, or none.

    >>> sure = 50.0 * np.eye(4)[[0, 1, 2, 3, 0, 1, 2, 3]]
    >>> round(inception_score(sure).mean, 6), round(inception_score(0 * sure).mean, 6)
    (4.0, 1.0)
    """
    n = len(logits)
    if n < (splits or 1) or (splits is not None and splits < 1) or part < 1:
        raise ValueError(
            f"inception_score: {n} samples cannot be divided into {splits or 1} parts of 1 or more."
        )
    ends = [i * n // splits for i in range(splits + 1)] if splits else [*range(0, n, part), n]
    order = np.arange(n) if rng is None else rng.permutation(n)
    scores = []
    for begin, end in pairwise(ends):
        log_p = log_softmax(logits[order[begin:end]].astype(np.float64), axis=1)
        log_mean = logsumexp(log_p, axis=0) - np.log(end - begin)
        scores.append(np.exp(np.mean(np.sum(np.exp(log_p) * (log_p - log_mean), axis=1))))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
