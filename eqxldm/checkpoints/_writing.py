"""One write by orbax, in the background, that all processes come out of together."""

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

# Orbax reports every step of a save, and prints the errors that it also raises.
logging.getLogger("absl").setLevel(logging.ERROR)
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of what is being written or deleted
_TIMEOUT = 600  # seconds that a process waits for the others' part of a checkpoint
_GRACE = 30  # seconds between processes that come to a meeting together
_writes = itertools.count()  # the same in all processes


class Write:
    """One write by orbax: starts at once, goes on in the background.

    Orbax's processes wait for each other when their shards are written and when process 0 has
    renamed the folder. One that fails does not come there, and the others would wait for the whole
    timeout. So here it does come, but not to a second meeting that follows at once.
    """

    def __init__(self, folder: Path, items: dict[str, Any], seal: Callable[[], None]):
        self.folder = folder
        self.error: Exception | None = None
        # Named processes make orbax use barriers that end by a timeout. A key for each write: after
        # a failure the processes may have passed unequal numbers of them.
        alone = jax.process_count() == 1
        processes = None if alone else set(range(jax.process_count()))
        self._barrier = ocp.multihost.get_barrier_sync_fn(processes=processes)
        self._key = f"{folder}-{next(_writes)}"
        self._met, self._others_failed = 0, False
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(),
            async_options=ocp.AsyncOptions(
                timeout_secs=_TIMEOUT,
                barrier_sync_fn=self._meet,
                post_finalization_callback=seal,
                create_directories_asynchronously=False,
            ),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix=self._key, active_processes=processes
            ),
        )
        try:
            self._checkpointer.save(folder, ocp.args.PyTreeSave(items))
        except Exception as failed:
            self.error = failed
        self._over = threading.Event()
        if alone:
            self._over.set()
        else:
            threading.Thread(target=self._watch, daemon=True).start()

    def finish(self) -> Exception | None:
        """Waits for the end; why it failed."""
        self._over.wait()
        for finish in (self._checkpointer.wait_until_finished, self._checkpointer.close):
            try:
                finish()
            except Exception as failed:
                self.error = self.error or failed
        return self.error

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        try:
            self._barrier(key=f"{self._key}-{self._met}", timeout_ms=timeout_ms)
            self._met += 1
            self._barrier(key=f"{self._key}-{self._met}-well", timeout_ms=1000 * _GRACE)
        except Exception as failed:
            self._others_failed = True
            raise RuntimeError("another process failed or did not answer") from failed

    def _watch(self) -> None:
        try:
            self._checkpointer.wait_until_finished()
        except Exception as failed:
            self.error = self.error or failed
        self._over.set()
        if self.error is not None and not self._others_failed:
            with contextlib.suppress(Exception):
                self._barrier(key=f"{self._key}-{self._met}", timeout_ms=1000 * _TIMEOUT)
