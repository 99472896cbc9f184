"""Grain pipelines: shuffled, endless batches whose position can be saved and restored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Shaped

from .decoding import decode_and_crop, flip_mask
from .idx import DataError
from .latents import Latents
from .records import ImageRecord as ImageRecord, ImageSource

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


Batch = dict[str, np.ndarray]
# (record indices, their epochs) -> the batch, and what was skipped: reasons by record id.
Read = Callable[[np.ndarray, np.ndarray], tuple[Batch, dict[str, str]]]

_SUBSTITUTES = 64  # unreadable images in a row before a pipeline gives up


class Batches(grain.DatasetIterator):
    """Endless batches in one global order, of which a process reads its rows.

    Every epoch is one shuffle of all records, another one each epoch, and epochs follow one another
    without a gap: a batch may span two, and none is dropped, padded or repeated. Global batch `k`
    holds the same records in the same order for every number of processes and workers.

    `get_state()` is the number of global batches taken and what the order depends on: small,
    JSON-able and the same in every process, so that any number of processes goes on from it.
    `skipped` has the reasons, by record id, of the images skipped so far in this process.

    `image_batches` and `latent_batches` make it.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        read: Read,
        *,
        seed: int,
        rows: Sequence[int] | np.ndarray | None = None,
        workers: int,
        threads: int,
        prefetch: int,
    ):
        super().__init__()
        self._running: grain.DatasetIterator | None = None
        if not 1 <= batch_size <= length:
            raise ValueError(f"batch_size must lie in 1 .. {length}, got {batch_size}.")
        own = np.arange(batch_size) if rows is None else np.asarray(rows)
        if not (own.size and own[0] >= 0 and own[-1] < batch_size and np.all(np.diff(own) > 0)):
            raise ValueError(
                f"rows must be some of 0 .. {batch_size - 1} in ascending order, "
                f"got {own.tolist()}."
            )
        order = grain.MapDataset.range(length).seed(seed).shuffle().repeat().batch(batch_size)
        self._batches = order.map_with_index(_Part(read, own, batch_size, length))
        self._order = {"records": length, "batch_size": batch_size, "seed": seed}
        self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        self._workers = workers
        self._taken = 0
        self.skipped: dict[str, str] = {}

    def __next__(self) -> Batch:
        self._assert_not_closed()
        self.start_prefetch()
        assert self._running is not None
        batch, skipped = next(self._running)
        self._taken += 1
        self.skipped.update(skipped)
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"batches": self._taken, **self._order}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position. **Raises** `DataError` if it belongs to another order."""
        came = {name: state.get(name) for name in self._order}
        if came != self._order:
            lines = [f"{k}: {came[k]}, now {v}" for k, v in self._order.items() if came[k] != v]
            raise DataError(
                "the saved data position belongs to another order of records:\n  "
                + "\n  ".join(lines)
            )
        self._stop()
        self._taken = state["batches"]

    def start_prefetch(self) -> None:
        if self._running is None:
            # A fresh pipeline over the rest, because the position of grain's own iterators depends
            # on the number of workers.
            rest = self._batches.slice(slice(self._taken, None)).to_iter_dataset(self._options)
            if self._workers:
                if not flags.FLAGS.is_parsed():  # grain asks for flags that absl programs parse
                    flags.FLAGS.mark_as_parsed()
                options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
                rest = rest.mp_prefetch(options)
            self._running = iter(rest)

    def close(self) -> None:
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


def image_batches(
    source: ImageSource,
    size: int,
    batch_size: int,
    *,
    seed: int,
    flip: bool = True,
    skip_unreadable: bool = False,
    rows: Sequence[int] | np.ndarray | None = None,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 2,
) -> Batches:
    """Endless batches of decoded, cropped, flipped images, in the order that `Batches` describes.

    A batch has `image`, uint8 `(b, size, size, 3)`, `label` and `index`, the record's position in
    the source, both int32 `(b,)`; `b` is the number of `rows`.

    **Arguments**:

    - `batch_size`: of all processes together, at most the records.
    - `seed`: of the order and of the flips; the flip of a record depends on the seed, the epoch and
      the record alone.
    - `skip_unreadable`: an unreadable image gives its place to the next record of the source, and
      `skipped` has its id and the reason. Otherwise it raises `DataError`.
    - `rows`: those of each global batch to read, ascending; by default all. With several processes
      `sharding.own_rows(batch_size, mesh)`, which is what `prefetch_to_device` takes.
    - `workers`: processes that read ahead; 0 reads in this one. They start fresh interpreters, so a
      script that asks for them needs its `if __name__ == "__main__":`.
    - `threads`, `prefetch`: threads, and batches read ahead, in each worker or in this process.

    **Raises** `ValueError` if the batch size exceeds the number of records, or `rows` are not some
    of the batch's in ascending order.

    >>> import io, PIL.Image
    >>> file = io.BytesIO()
    >>> PIL.Image.new("RGB", (12, 8)).save(file, "PNG")
    >>> class Black:
    ...     class_names = ("black", "white")
    ...     __len__ = lambda self: 10
    ...     __getitem__ = lambda self, i: ImageRecord(file.getvalue(), 0, f"{i}.png")
    ...     digest = lambda self: ""
    >>> batches = image_batches(Black(), 4, 6, seed=0)
    >>> next(batches)["image"].shape, batches.get_state()["batches"]
    ((6, 4, 4, 3), 1)
    """
    return Batches(
        len(source),
        batch_size,
        _ReadImages(source, size, seed, flip, skip_unreadable),
        seed=seed,
        rows=rows,
        workers=workers,
        threads=threads,
        prefetch=prefetch,
    )


def latent_batches(
    latents: Latents,
    batch_size: int,
    *,
    seed: int,
    flip: bool = True,
    rows: Sequence[int] | np.ndarray | None = None,
    workers: int = 0,
    threads: int = 1,
    prefetch: int = 4,
) -> Batches:
    """Endless batches of cached posteriors, in the order that `Batches` describes.

    A batch has `mean` and `logvar`, `(b, zc, zh, zw)` in the cache's dtype, of the image or, by a
    fair coin for each (seed, epoch, record), of its mirror image, and `label` and `index`, the
    image's position in the source, both int32 `(b,)`. The arguments are those of `image_batches`.
    """
    return Batches(
        len(latents),
        batch_size,
        _ReadLatents(latents, seed, flip),
        seed=seed,
        rows=rows,
        workers=workers,
        threads=threads,
        prefetch=prefetch,
    )


# Classes and not closures, because worker processes get them pickled.


@dataclass(frozen=True)
class _Part:
    """A process's part of global batch `k`, read."""

    read: Read
    rows: np.ndarray
    batch_size: int
    length: int

    def __call__(self, k: int, indices: np.ndarray) -> tuple[Batch, dict[str, str]]:
        epochs = (k * self.batch_size + np.arange(self.batch_size)) // self.length
        return self.read(indices[self.rows], epochs[self.rows])


@dataclass(frozen=True)
class _ReadImages:
    source: ImageSource
    size: int
    seed: int
    flip: bool
    skip_unreadable: bool

    def __call__(self, indices: np.ndarray, epochs: np.ndarray) -> tuple[Batch, dict[str, str]]:
        n = len(indices)
        images = np.empty((n, self.size, self.size, 3), np.uint8)
        labels, used = np.empty(n, np.int32), np.empty(n, np.int32)
        skipped: dict[str, str] = {}
        for row, index in enumerate(indices.tolist()):
            used[row], labels[row], images[row] = self._image(index, skipped)
        if self.flip:
            flipped = flip_mask(self.seed, epochs, used)
            images[flipped] = images[flipped][:, :, ::-1]
        return {"image": images, "label": labels, "index": used}, skipped

    def _image(self, index: int, skipped: dict[str, str]) -> tuple[int, int, np.ndarray]:
        """The record there or, if it is unreadable and may be skipped, the next that is not."""
        for step in range(_SUBSTITUTES):
            used = (index + step) % len(self.source)
            record = self.source[used]
            try:
                return used, record.label, decode_and_crop(record.image, self.size, record.id)
            except DataError as error:
                if not self.skip_unreadable:
                    raise
                skipped[record.id] = str(error)
        raise DataError(f"{_SUBSTITUTES} images in a row: {next(reversed(skipped.values()))}")


@dataclass(frozen=True)
class _ReadLatents:
    latents: Latents
    seed: int
    flip: bool

    def __call__(self, indices: np.ndarray, epochs: np.ndarray) -> tuple[Batch, dict[str, str]]:
        flipped = flip_mask(self.seed, epochs, indices) if self.flip else np.zeros_like(indices)
        return self.latents.read(indices, flipped.astype(bool)), {}
