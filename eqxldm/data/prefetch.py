"""Batches placed on devices ahead of the step that takes them."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import PyTree


class DevicePrefetch(grain.DatasetIterator):
    """Up to `depth` batches on the devices ahead of the consumer; `prefetch_to_device` makes it.

    `get_state()` is the position after the last batch that was taken, not after those read ahead.
    `wait_seconds` is the time that `next` has waited for data so far, `taken` the batches taken.
    """

    def __init__(self, batches: grain.DatasetIterator, sharding: Sharding, depth: int):
        super().__init__()
        self._batches, self._sharding, self._depth = batches, sharding, depth
        self._state = batches.get_state()
        self._reader: _Reader | None = None
        self.wait_seconds, self.taken = 0.0, 0

    def __next__(self) -> PyTree:
        self._assert_not_closed()
        self.start_prefetch()
        assert self._reader is not None
        begin = time.perf_counter()
        batch, self._state = self._reader.take()
        self.wait_seconds += time.perf_counter() - begin
        self.taken += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop()
        self._batches.set_state(state)
        self._state = self._batches.get_state()

    def start_prefetch(self) -> None:
        if self._reader is None:
            self._reader = _Reader(self._batches, self._sharding, self._depth)

    def close(self) -> None:
        self._closed = True
        self._stop()
        self._batches.close()

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.stop()
            self._reader = None


def prefetch_to_device(
    batches: grain.DatasetIterator, sharding: Sharding, *, depth: int = 2
) -> DevicePrefetch:
    """The batches as global arrays of a sharding, `depth` of them placed ahead by a thread.

    Each process gives the rows of the global batch that lie on its devices, ascending, as
    `sharding.own_rows` counts them. An error in the pipeline is raised by
    the `next` that would have had its batch. `close()` ends the thread.

    >>> import numpy as np
    >>> from ..sharding import batch_sharding, make_mesh
    >>> from .loader import Batches
    >>> batches = Batches(8, 4, lambda indices, epochs: ({"x0": indices}, {}), seed=0)
    >>> ahead = prefetch_to_device(batches, batch_sharding(make_mesh()))
    >>> next(ahead)["x0"].shape, ahead.get_state()["batches"]
    ((4,), 1)
    >>> ahead.close()
    """
    if depth < 1:
        raise ValueError(f"prefetch_to_device: depth must be at least 1, got {depth}.")
    return DevicePrefetch(batches, sharding, depth)


class _Reader:
    """A thread that reads and places batches, never more than `depth` beyond those taken."""

    def __init__(self, batches: grain.DatasetIterator, sharding: Sharding, depth: int):
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._slots = threading.Semaphore(depth)
        self._stopping = threading.Event()
        self._error: Exception | None = None
        # The thread holds no reference to this object, so that a forgotten one can be collected.
        arguments = (batches, sharding, self._ready, self._slots, self._stopping)
        self._thread = threading.Thread(target=_read, args=arguments, daemon=True)
        self._thread.start()

    def take(self) -> tuple[PyTree, dict[str, Any]]:
        if self._error is None:
            batch, state, self._error = self._ready.get()
            if self._error is None:
                self._slots.release()
                return batch, state
        raise self._error

    def stop(self) -> None:
        self._stopping.set()
        self._slots.release()
        self._thread.join()

    def __del__(self) -> None:
        self._stopping.set()
        self._slots.release()


def _placer(sharding: Sharding) -> Callable[[np.ndarray], jax.Array]:
    """`rows -> array`: the rows on this process's devices as its part of the global array."""
    probe = (sharding.num_devices,)
    width = sharding.shard_shape(probe)[0]  # of one of the parts that the first axis has
    indices = sharding.addressable_devices_indices_map(probe).values()
    own = sorted({index[0].indices(*probe)[0] // width for index in indices if index is not None})

    def place(rows: np.ndarray) -> jax.Array:
        each, rest = divmod(len(rows), len(own))  # rows of a part
        if rest or not each:
            raise ValueError(
                f"prefetch_to_device: {len(rows)} rows do not divide by the {len(own)} parts of a "
                "batch on this process's devices."
            )

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            at = own.index((index[0].start or 0) // each) * each
            return rows[at : at + each]

        shape = (each * (probe[0] // width), *rows.shape[1:])
        return jax.make_array_from_callback(shape, sharding, shard)

    return place


def _read(batches, sharding, ready, slots, stopping) -> None:
    place = _placer(sharding)
    while True:
        slots.acquire()
        if stopping.is_set():
            return
        try:
            batch = jax.tree.map(place, next(batches))
            ready.put((batch, batches.get_state(), None))
        except Exception as error:  # StopIteration too
            ready.put((None, None, error))
            return
