"""Grain pipelines: shuffled, endless batches whose position can be saved and restored."""

from collections.abc import Mapping

import grain
import numpy as np
from jaxtyping import Shaped

Arrays = Mapping[str, Shaped[np.ndarray, "n ..."]]


def training_batches(
    arrays: Arrays, batch_size: int, *, seed: int, threads: int = 1, prefetch: int = 4
) -> grain.DatasetIterator:
    """Endless batches of arrays that share their first axis, as dicts of NumPy arrays.

    Every epoch is one shuffle of all examples, another one each epoch; a batch may span two
    epochs. Only indices are shuffled, and a batch is gathered at once. The iterator is
    checkpointable: after restoring it the very next batch follows.

    **Raises** `ValueError` if the arrays differ in length or hold fewer examples than a batch.

    >>> batches = training_batches({"x": np.arange(10)}, 4, seed=0)
    >>> next(batches)["x"].shape
    (4,)
    """
    lengths = {name: len(array) for name, array in arrays.items()}
    n = next(iter(lengths.values()), 0)
    if set(lengths.values()) != {n}:
        raise ValueError(f"training_batches: arrays must be equally long, got {lengths}.")
    if not 1 <= batch_size <= n:
        raise ValueError(f"training_batches: batch_size must lie in 1 .. {n}, got {batch_size}.")
    gather = lambda indices: {name: array[indices] for name, array in arrays.items()}
    batches = grain.MapDataset.range(n).seed(seed).shuffle().repeat().batch(batch_size).map(gather)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))
