"""Checkpoints by orbax: training state, data position and a digest, all or nothing.

A checkpoint is one folder named by its step. Orbax writes it under a temporary name and renames
it when it is complete, so a write that is killed leaves the ones before it as they were.
"""

import contextlib
import hashlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every step of a save


class CheckpointError(Exception):
    """A checkpoint that cannot be read or is not what was written."""


def digest(tree: PyTree) -> str:
    """SHA-256 over the paths, shapes, dtypes and bytes of a tree's arrays.

    Two training states have the same digest exactly if they are equal bit for bit.

    >>> digest({"a": np.zeros(2)}) == digest({"a": np.zeros(2)})
    True
    >>> digest({"a": np.zeros(2)}) == digest({"a": -np.zeros(2)})
    False
    """
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


class Checkpoints:
    """The checkpoints of one training run in one folder; the newest `keep` stay.

    Saves are asynchronous: `save` returns when the state is copied, and the next one waits for
    the last. Use as a context manager, which waits on leaving.

    >>> import tempfile
    >>> with Checkpoints(Path(tempfile.mkdtemp())) as checkpoints:
    ...     checkpoints.save(7, {"w": np.ones(2)})
    ...     checkpoints.wait()
    ...     state, info = checkpoints.restore(7, {"w": np.zeros(2)})
    >>> state["w"].tolist()
    [1.0, 1.0]
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"Checkpoints: keep must be at least 1, got {keep}.")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: PyTree,
        data: grain.DatasetIterator | None = None,
        info: dict[str, Any] | None = None,
    ) -> None:
        """Saves a tree of arrays, the position of a grain iterator and a JSON-able dict."""
        described = {"digest": digest(state), "info": info or {}}
        items: dict[str, Any] = {
            "state": ocp.args.StandardSave(state),
            "about": ocp.args.JsonSave(described),
        }
        if data is not None:
            items["data"] = grain.checkpoint.CheckpointSave(data)  # pyright: ignore[reportCallIssue]
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        self._manager.wait_until_finished()

    def restore(
        self, step: int, like: PyTree, data: grain.DatasetIterator | None = None
    ) -> tuple[PyTree, dict[str, Any]]:
        """The state of a step, placed and typed `like` a given tree, and its dict.

        `data`, a grain iterator, is moved to the saved position.

        **Raises** `CheckpointError` if a file is missing or damaged, or if the arrays differ from
        those that were saved.
        """
        items: dict[str, Any] = {
            "state": ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)),
            "about": ocp.args.JsonRestore(),
        }
        if data is not None:
            items["data"] = grain.checkpoint.CheckpointRestore(data)  # pyright: ignore[reportCallIssue]
        try:
            with _abandoned_reads_unreported():
                restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            about, state = restored["about"], restored["state"]
            expected, info = about["digest"], about["info"]
        except Exception as error:  # orbax, tensorstore and json raise a dozen kinds
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(f"{self.folder / str(step)}: {reason[0][:300]}") from error
        if digest(state) != expected:
            raise CheckpointError(f"{self.folder / str(step)}: the arrays are not those saved.")
        return state, info


@contextlib.contextmanager
def _abandoned_reads_unreported() -> Iterator[None]:
    """Keeps the terminal free of the reads that orbax leaves waiting when one of them fails.

    It closes their event loop, and Python reports each when it answers or is collected, with a
    traceback: pages around the line that says what is wrong. As they may come at any time later,
    after a failure the filter stays.
    """
    hook = sys.unraisablehook

    def report(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        if code is not None and "orbax" in code.co_filename:
            return
        if unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed":
            return
        hook(unraisable)

    def wanted(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "OCDBT" in str(record.exc_info[1]))

    sys.unraisablehook = report
    logging.getLogger("asyncio").addFilter(wanted)
    yield
    sys.unraisablehook = hook
    logging.getLogger("asyncio").removeFilter(wanted)
