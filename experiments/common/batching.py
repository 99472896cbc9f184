"""Running a function over many images, a batch at a time."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import UInt8

BATCH = 500


def map_images(
    function: Callable[[Any, Any], Any],
    model: Any,
    images: UInt8[np.ndarray, "n h w c"],
    on_batch: Callable[[int], None] = lambda done: None,
    *,
    batch: int = BATCH,
    sharding: Sharding | None = None,
) -> Any:
    """`function(model, images)` over all images, compiled once; the last batch is padded.

    `on_batch` is told how many images are done. `sharding` divides a batch over devices, to which
    the model must have been copied.
    """
    compiled, parts = eqx.filter_jit(function), []
    for i in range(0, len(images), batch):
        part = images[i : i + batch]
        size = len(part)
        padded = np.pad(part, [(0, batch - size)] + [(0, 0)] * 3)
        outputs = compiled(model, padded if sharding is None else jax.device_put(padded, sharding))
        parts.append(jax.tree.map(lambda a, size=size: np.asarray(a)[:size], outputs))
        on_batch(i + size)
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)
