"""The judge: a small classifier trained on a job's own images, and what it says of samples.

Its features measure the Fréchet distance, precision and recall, and its logits the accuracy. The
figures compare runs of one experiment with each other, and not with published FIDs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int, UInt8

from eqxldm.data import to_float
from eqxldm.durable import replacing
from eqxldm.metrics import frechet_distance, precision_recall, psnr, ssim

from .batching import map_images
from .classifier import ConvClassifier

Images = UInt8[np.ndarray, "n h w c"]
VALUES = 2**23  # that PSNR and SSIM see at a time


class Judged(NamedTuple):
    """What the judge says of images: its features, and the class that it finds likeliest."""

    features: Float[np.ndarray, "n d"]
    classes: Int[np.ndarray, " n"]


def judge(classifier: ConvClassifier, images: Images) -> Judged:
    """The classifier's features and predicted classes."""
    apply = lambda classifier, images: jax.vmap(classifier)(to_float(images))
    features, logits = map_images(apply, classifier, images)
    return Judged(features, logits.argmax(1))


def classifier_loss(model: ConvClassifier, batch: Any, key: Any, context: Any) -> tuple[Any, dict]:
    """The cross entropy of a batch with `image`, uint8, and `label`."""
    _, logits = jax.vmap(model)(to_float(batch["image"]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["cond"])
    return jnp.mean(losses), {}


def read_judge(path: Path, like: ConvClassifier) -> ConvClassifier | None:
    """The judge that `write_judge` wrote; None if there is none or it is damaged."""
    if not path.exists():
        return None
    try:
        return eqx.tree_deserialise_leaves(path, like)
    except (RuntimeError, ValueError, EOFError, OSError):
        path.unlink()  # damaged: train it again
        return None


def write_judge(path: Path, model: ConvClassifier) -> None:
    with replacing(path) as temporary:
        eqx.tree_serialise_leaves(temporary, model)


def reconstruction_scores(
    classifier: ConvClassifier,
    originals: Images,
    rebuilt: Images,
    shrink: Callable[[Images], Images] = lambda images: images,
) -> dict[str, float]:
    """PSNR and SSIM of reconstructions, and their Fréchet distance.

    `shrink` makes of images what the judge sees.
    """
    as_unit = lambda u: jnp.asarray(np.moveaxis(u, -1, 1), jnp.float32) / 255
    size = max(1, VALUES // originals[0].size)
    scores = []
    for i in range(0, len(originals), size):
        x, y = as_unit(originals[i : i + size]), as_unit(rebuilt[i : i + size])
        scores.append((psnr(x, y), ssim(x, y)))
    of_each = [jnp.concatenate(parts) for parts in zip(*scores, strict=True)]
    real, fake = (judge(classifier, shrink(u)).features for u in (originals, rebuilt))
    return {
        "psnr_db": float(jnp.mean(of_each[0])),
        "ssim": float(jnp.mean(of_each[1])),
        "reconstruction_fd": frechet_distance(real, fake),
    }


def sample_scores(
    real: Judged, floor: Judged, fake: Judged, labels: Int[np.ndarray, " n"]
) -> dict[str, float]:
    """Of samples against real images, and of other real images, as many, for comparison."""
    precision, recall = precision_recall(real.features, fake.features)
    return {
        "fd": frechet_distance(real.features, fake.features),
        "fd_floor": frechet_distance(real.features, floor.features),
        "accuracy": float(np.mean(fake.classes == labels)),
        "precision": precision,
        "recall": recall,
    }
