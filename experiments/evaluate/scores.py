"""The numbers of a comparison, from features on disk and a reference's moments."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from eqxldm import metrics
from eqxldm.metrics.reference import Gaussian, Reference

from .options import Evaluate
from .store import Stored

NEIGHBOURS = 5  # the most that a score counts


@dataclass
class Side:
    """Images of one side: their features where it has images, and moments in place of theirs."""

    features: Stored | None
    moments: Reference | None
    count: int

    def gaussian(self, name: str) -> Gaussian | None:
        """The file's moments where it has them, else those of the images."""
        if self.moments is not None:
            given = self.moments.spatial if name == "spatial" else self.moments.pooled
            if given is not None:
                return given
        if self.features is None or name not in self.features.arrays or self.count < 2:
            return None
        found = metrics.stream_moments(self.features.parts(name))
        return Gaussian(found.mean, found.covariance)


def scores(samples: Side, reference: Side, options: Evaluate) -> tuple[dict[str, float], list[str]]:
    """The scores by name, and what is to be said of them: where there were too few images."""
    assert samples.features is not None
    found: dict[str, float] = {}
    notes: list[str] = []
    inception = options.features == "inception"
    pooled = samples.features["pooled"]
    width = pooled.shape[1]
    for side, name in ((samples, "samples"), (reference, "reference")):
        if side.features is not None and side.count <= width:
            notes.append(
                f"{side.count} {name} and {width} features: their covariance is singular, and the "
                f"distance far above that of many. At least {width + 1} are needed; 50,000 are "
                "what papers have."
            )
    names = {"pooled": "fid" if inception else "fd"} | ({"spatial": "sfid"} if inception else {})
    for array, score in names.items():
        x, y = reference.gaussian(array), samples.gaussian(array)
        if x is None or y is None:
            notes.append(f"{score}: the reference has no moments and no images for it.")
        else:
            found[score] = metrics.gaussian_distance(*x, *y)
    if inception:
        score = metrics.inception_score(samples.features["logits"], splits=options.splits)
        found |= {"inception_score": score.mean, "inception_score_std": score.std}
    if reference.features is None:
        notes.append("the reference has moments alone: no precision, recall, KID without images.")
        return found, notes
    real = reference.features["pooled"]
    fewest = min(len(real), len(pooled))
    if fewest > NEIGHBOURS:
        near = metrics.manifold_scores(real, pooled, half=options.half)
        found |= near._asdict()
    else:
        notes.append(f"{fewest} images: precision and coverage need {NEIGHBOURS + 1}.")
    if fewest >= options.kid_subset:
        kid = metrics.kid(real, pooled, subset_size=options.kid_subset)
        found |= {"kid": kid.mean, "kid_std": kid.std}
    else:
        notes.append(
            f"kid: subsets of {options.kid_subset} need as many images, there are {fewest}; "
            "--kid-subset takes fewer."
        )
    if options.features == "clip":
        found["cmmd"] = metrics.cmmd(real, pooled)
    return found, notes


def check_moments(moments: Reference | None, options: Evaluate) -> str | None:
    """What is wrong with a reference's moments for these features, or None."""
    if moments is None or moments.pooled is None:
        return None
    if options.features != "inception":
        return (
            "its moments are Inception's, and the features are "
            f"{options.features}'s: give images, or --features inception"
        )
    finite = all(np.isfinite(array).all() for array in moments.pooled)
    return None if finite else "its moments are not finite"


def protocol(options: Evaluate, about: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for two numbers to compare."""
    return {
        **about,
        "batch": options.batch,
        "half": options.half,
        "neighbours": {"precision and recall": 3, "density and coverage": NEIGHBOURS},
        "kid": {"subsets": 100, "subset": options.kid_subset, "kernel": "cubic, unbiased"},
        "inception_score": f"{options.splits} parts" if options.splits else "parts of 5000",
    }
