"""Shuffled, endless batches whose position can be saved and restored."""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from typing import Any

import cloudpickle
import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Bool, Int

from .conditions import Condition, example_condition, label_condition, stack_conditions
from .decode import MAX_PIXELS, Size, as_size, decode_and_crop
from .errors import DataError
from .image_source import ImageSource
from .latent_cache import Latents

Batch = dict[str, Any]
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

    `image_batches` and `latent_batches` make it; for data of another kind, `read(indices, epochs)`
    gives the batch of these records, each in its epoch, and the reasons for what it skipped:

    >>> x = np.arange(10.0)
    >>> batches = Batches(10, 4, lambda indices, epochs: ({"x0": x[indices]}, {}), seed=0)
    >>> next(batches)["x0"].shape, batches.get_state()["batches"]
    ((4,), 1)

    **Arguments**:

    - `length`: the number of records; `batch_size`: at most that.
    - `seed`: of the order.
    - `rows`: those of each global batch to read, ascending; by default all. With several processes
      `sharding.own_rows(batch_size, mesh)`, which is what `prefetch_to_device` takes.
    - `workers`: processes that read ahead; 0 reads in this one. They start fresh interpreters, so a
      script that asks for them needs its `if __name__ == "__main__":`, and get `read` pickled.
    - `threads`, `prefetch`: threads, and batches read ahead, in each worker or in this process.

    **Raises** `ValueError` if the batch size exceeds the number of records, or `rows` are not some
    of the batch's in ascending order.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        read: Read,
        *,
        seed: int,
        rows: Sequence[int] | np.ndarray | None = None,
        workers: int = 0,
        threads: int = 1,
        prefetch: int = 4,
    ):
        super().__init__()
        self._running: grain.DatasetIterator | None = None
        self._came, self._file = 0, None  # batches of `_running`; what its workers begin with
        if not 1 <= batch_size <= length:
            raise ValueError(f"batch_size must lie in 1 .. {length}, got {batch_size}.")
        own = np.arange(batch_size) if rows is None else np.asarray(rows)
        if not (own.size and own[0] >= 0 and own[-1] < batch_size and np.all(np.diff(own) > 0)):
            raise ValueError(
                f"rows must be some of 0 .. {batch_size - 1} in ascending order, "
                f"got {own.tolist()}."
            )
        self._shuffled = grain.MapDataset.range(length).seed(seed).shuffle().repeat()
        self._part = _Part(read, own, batch_size, length)
        self._order = {"records": length, "batch_size": batch_size, "seed": seed}
        self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        self._workers = workers
        self._taken = 0
        self.skipped: dict[str, str] = {}

    def __next__(self) -> Batch:
        self._assert_not_closed()
        self.start_prefetch()
        assert self._running is not None
        # The first batch starts the workers, in threads of grain.
        with contextlib.nullcontext() if self._came else _away_from_the_terminal():
            batch, skipped = next(self._running)
        self._came += 1
        if self._workers:  # out of shared memory, which a process that ends would leave behind
            batch = jax.tree.map(np.array, batch)
        if self._came == self._workers:  # one of each of them, which have read it
            self._remove_file()
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
            part = replace(self._part, read=_handed_over) if self._workers else self._part
            batches = self._shuffled.batch(part.batch_size).map_with_index(part)
            # A fresh pipeline over the rest, because the position of grain's own iterators depends
            # on the number of workers.
            rest = batches.slice(slice(self._taken, None)).to_iter_dataset(self._options)
            if self._workers:
                if not flags.FLAGS.is_parsed():  # grain asks for flags that absl programs parse
                    flags.FLAGS.mark_as_parsed()
                # In a file, because Python waits for ever for one that is killed before it has read
                # more than a pipe holds of what it is told at its start.
                handle, self._file = tempfile.mkstemp(prefix="eqxldm-reader-")
                with open(handle, "wb") as file:
                    cloudpickle.dump(self._part.read, file)
                options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
                rest = rest.mp_prefetch(options, functools.partial(_begin_worker, self._file))
            self._running, self._came = iter(rest), 0

    def close(self) -> None:
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None
        self._remove_file()

    def _remove_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._file)
            self._file = None


@contextlib.contextmanager
def _away_from_the_terminal() -> Iterator[None]:
    """Processes that are started in here do not get what a terminal sends to all processes of a
    command, Ctrl-C and its own end: whoever they read for tells them when to stop."""
    if not hasattr(signal, "pthread_sigmask"):  # threads and processes inherit it
        yield
        return
    resource_tracker.ensure_running()  # which would let SIGINT in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_read: Read | None = None  # of this worker


def _handed_over(indices: np.ndarray, epochs: np.ndarray) -> tuple[Batch, dict[str, str]]:
    assert _read is not None
    return _read(indices, epochs)


def _begin_worker(path: str, index: int, count: int) -> None:
    """Takes what it is to read with. grain's workers would wait for ever for a process that was
    killed: this one ends with it."""
    global _read
    with open(path, "rb") as file:
        _read = cloudpickle.load(file)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def image_batches(
    source: ImageSource,
    batch_size: int,
    *,
    size: Size,
    channels: int = 3,
    condition: Condition = label_condition,
    seed: int,
    flip: bool = True,
    skip_unreadable: bool = False,
    rows: Sequence[int] | np.ndarray | None = None,
    workers: int = 0,
    threads: int = 2,
    max_pixels: int = MAX_PIXELS,
) -> Batches:
    """Endless batches of decoded, cropped, flipped images, in the order that `Batches` describes.

    A batch has `image`, uint8 `(b, height, width, channels)`; `cond`, the conditions of the images
    as one PyTree with a leading axis of the batch, or `None`; and `index`, the record's position in
    the source, int32 `(b,)`. `b` is the number of `rows`.

    **Arguments**:

    - `batch_size`: of all processes together, at most the records.
    - `size`: the side, or `(height, width)`, of ADM's crop (`center_crop`).
    - `channels`: 1 for grey, 3 for colours, 4 with opacity; of pixels in memory, what they have.
    - `condition(record)`: what the network is told: `label_condition`, `caption_bytes(n)`,
      `no_condition`, or one's own.
    - `seed`: of the order and of the flips; the flip of a record depends on the seed, the epoch and
      the record alone.
    - `skip_unreadable`: an unreadable image gives its place to the next record of the source, and
      `skipped` has its id and the reason. Otherwise it raises `DataError`.
    - `rows`, `workers`: see `Batches`.
    - `threads`: that read ahead, in each worker or in this process; 0 reads when asked.
    - `max_pixels`: a file with more is unreadable (`decode_image`).

    **Raises** `ValueError` if the batch size exceeds the number of records, or `rows` are not some
    of the batch's in ascending order; `DataError` if the images have not got what the condition
    needs.

    >>> from .sources.arrays import ImageArrays
    >>> digits = ImageArrays(np.zeros((10, 28, 28, 1), np.uint8), np.arange(10))
    >>> batches = image_batches(digits, 6, size=32, channels=1, seed=0)
    >>> batch = next(batches)
    >>> batch["image"].shape, batch["cond"].shape, batches.get_state()["batches"]
    ((6, 32, 32, 1), (6,), 1)
    """
    example_condition(source, condition)  # refuses now what no image would have
    size = as_size(size)
    read = _ReadImages(source, size, channels, condition, seed, flip, skip_unreadable, max_pixels)
    prefetch = 2 if threads else 0
    return Batches(
        len(source),
        batch_size,
        read,
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
) -> Batches:
    """Endless batches of cached posteriors, in the order that `Batches` describes.

    A batch has `mean` and `logvar`, `(b, *latent)` in the cache's dtype, of the image or, by a fair
    coin for each (seed, epoch, record), of its mirror image; `cond`, as the cache's writer was told
    to keep it; and `index`, the image's position in the source, int32 `(b,)`. The arguments are
    those of `image_batches`.

    A latent to train on is a fresh draw: `autoencoder.normalise(Posterior(mean, logvar)).sample(
    key)`, for each example and inside jit.
    """
    return Batches(
        len(latents),
        batch_size,
        _ReadLatents(latents, seed, flip),
        seed=seed,
        rows=rows,
        workers=workers,
        threads=threads,
        prefetch=4 if threads else 0,
    )


def flip_mask(
    seed: int, epochs: Int[np.ndarray, " n"], indices: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Which records are flipped, by a fair coin for each (seed, epoch, index).

    A record's coin does not depend on the others, on their order, on processes or on workers.

    >>> flip_mask(0, np.zeros(8, int), np.arange(8)).astype(int)
    array([0, 0, 1, 0, 0, 0, 0, 1])
    """
    bits = np.full(len(indices), seed, np.uint64)
    for value in (np.uint64(0), epochs.astype(np.uint64), indices.astype(np.uint64)):
        bits = _mixed(bits ^ value)
    return (bits >> np.uint64(63)).astype(bool)


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea & Flood 2014): each output bit depends on every input bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
    size: tuple[int, int]
    channels: int
    condition: Condition
    seed: int
    flip: bool
    skip_unreadable: bool
    max_pixels: int

    def __call__(self, indices: np.ndarray, epochs: np.ndarray) -> tuple[Batch, dict[str, str]]:
        n, length = len(indices), len(self.source)
        images = np.empty((n, *self.size, self.channels), np.uint8)
        used = np.empty(n, np.int32)
        conditions, ids = [], []
        skipped: dict[str, str] = {}
        for row, index in enumerate(indices.tolist()):
            used[row], record, images[row] = self._image(index, length, skipped)
            conditions.append(self.condition(record))
            ids.append(record.id)
        if self.flip:
            # The coin is that of the record that was used, so that a substitute keeps its own.
            flipped = flip_mask(self.seed, epochs, used)
            images[flipped] = images[flipped][:, :, ::-1]
        return {"image": images, "cond": stack_conditions(conditions, ids), "index": used}, skipped

    # No annotations: comparing them for every image takes longer than reading pixels in memory.
    def _image(self, index, length, skipped):
        """The record there or, if it is unreadable and may be skipped, the next that is not."""
        for step in range(_SUBSTITUTES):
            used = (index + step) % length
            record = self.source[used]
            if getattr(record.image, "shape", None) == (*self.size, self.channels):
                return used, record, record.image
            try:
                image = decode_and_crop(
                    record.image,
                    self.size,
                    self.channels,
                    name=record.id,
                    max_pixels=self.max_pixels,
                )
                return used, record, image
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
