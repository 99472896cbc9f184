"""Scores of samples beside real images, by what a classifier sees in both."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from eqxldm.metrics import frechet_distance, precision_recall

from .classifier import Described


class Comparison(NamedTuple):
    """Samples beside real images, as an evaluator sees them; the labels are those asked for."""

    real: Described
    samples: Described
    labels: Int[np.ndarray, " n"] | None
    class_names: tuple[str, ...] = ()


def frechet(c: Comparison) -> dict[str, float]:
    """The distance of Gaussians fitted to the features (Heusel et al. 2017)."""
    return {"fd": frechet_distance(c.real.features, c.samples.features)}


def manifold(c: Comparison) -> dict[str, float]:
    """How many samples lie among real images, and the reverse (Kynkäänniemi et al. 2019)."""
    precision, recall = precision_recall(c.real.features, c.samples.features)
    return {"precision": precision, "recall": recall}


def accuracy(c: Comparison) -> dict[str, float]:
    """The share of samples whose class is found to be the one asked for."""
    if c.labels is None or c.samples.classes is None:
        return {}
    return {"accuracy": float(np.mean(c.samples.classes == c.labels))}


def accuracy_of_parts(c: Comparison) -> dict[str, float]:
    """The same of each part of the classes' names, where all are pairs, such as "food, noto"."""
    parts = [name.split(", ") for name in c.class_names]
    if c.labels is None or c.samples.classes is None or {len(p) for p in parts} != {2}:
        return {}
    names = np.array(parts)
    right = names[c.samples.classes] == names[c.labels]
    return {f"accuracy_part_{i + 1}": float(np.mean(right[:, i])) for i in range(2)}


# To add one, write a function from a Comparison to numbers by name.
Evaluator = Callable[[Comparison], dict[str, float]]
EVALUATORS: tuple[Evaluator, ...] = (frechet, manifold, accuracy, accuracy_of_parts)
