"""Running a function over many images, a batch at a time."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import UInt8

BATCH = 500


def map_images(
    function: Callable[[Any, Any], Any],
    model: Any,
    images: UInt8[np.ndarray, "n h w c"],
    on_batch: Callable[[int], None] = lambda done: None,
) -> Any:
    """`function(model, images)` over all images, compiled once; the last batch is padded.

    `on_batch` is told how many images are done.
    """
    compiled, parts = eqx.filter_jit(function), []
    for i in range(0, len(images), BATCH):
        batch = images[i : i + BATCH]
        size = len(batch)
        outputs = compiled(model, np.pad(batch, [(0, BATCH - size)] + [(0, 0)] * 3))
        parts.append(jax.tree.map(lambda a, size=size: np.asarray(a)[:size], outputs))
        on_batch(i + size)
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)
