"""The checkpoints of a run: which there are, which stay, and the newest good one."""

import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import PyTree

from ..durable import sync_folder
from ._about import check_files, compare, read_about, write_about
from ._arrays import is_key, key_like, named_leaves, on_host, read_arrays, write_arrays
from ._processes import together
from .errors import CheckpointError, CheckpointMismatch, reason, saving

_TEMPORARY = ".checkpoint-tmp"  # in the name of what is being written or deleted
_meetings = itertools.count()  # the same in all processes


@runtime_checkable
class Positioned(Protocol):
    """An iterator with a position, such as grain's; the state must be JSON-able."""

    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class Checkpoints:
    """The checkpoints of one training run in one folder.

    The newest `keep` stay, and every one whose step is a multiple of `every`. Others are deleted
    when a newer one is complete.

    Saves are asynchronous: `save` returns when the state is copied, and the next one waits for the
    last. Use as a context manager, which waits on leaving. Opening a folder changes nothing in it.
    With several processes every method but `steps` and `info` is called by all of them in the same
    order, and the folder is one that all of them see.

    **Raises** `ValueError` if `keep` or `every` is less than 1.

    >>> import tempfile
    >>> import numpy as np
    >>> with Checkpoints(Path(tempfile.mkdtemp())) as checkpoints:
    ...     checkpoints.save(7, {"w": np.ones(2)}, info={"note": "ones"})
    ...     checkpoints.wait()
    ...     step, state, info = checkpoints.restore_newest({"w": np.zeros(2)})
    >>> step, state["w"].tolist(), info
    (7, [1.0, 1.0], {'note': 'ones'})
    """

    def __init__(self, folder: Path, *, keep: int = 2, every: int | None = None):
        for name, value in (("keep", keep), ("every", every)):
            if value is not None and value < 1:
                raise ValueError(f"Checkpoints: {name} must be at least 1, got {value}.")
        self.folder = folder.absolute()
        self._keep, self._every = keep, every
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        try:
            self.wait()
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(str(failed))

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        try:
            names = [entry.name for entry in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {reason(error)}") from error
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))

    def save(
        self,
        step: int,
        state: PyTree,
        data: Positioned | None = None,
        info: dict[str, Any] | None = None,
    ) -> None:
        """Starts to save a tree of arrays, the position of an iterator and a JSON-able dict.

        When it returns or raises, the state may be changed or donated.

        **Raises** `CheckpointError`, one line with the path and the system's reason, if this save
        cannot be started, as when there is a checkpoint of the step already, or if the one before
        it failed; in that case this one has been started all the same. The older checkpoints stay,
        and a later save can succeed. `ValueError` if a leaf is not an array, or `info` or the
        position is not JSON-able.
        """
        arrays = named_leaves(state)
        about = {
            "step": step,
            "data": None if data is None else data.get_state(),
            "info": info or {},
        }
        try:
            about = json.loads(json.dumps(about))  # a copy, with keys as they will be read
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Checkpoints.save: info and the data position must be JSON-able: {error}."
            ) from None
        try:
            self.wait()
        except CheckpointError:
            self._start(arrays, about)
            raise
        self._start(arrays, about)

    def _start(self, arrays: dict[str, Any], about: dict[str, Any]) -> None:
        folder = self.folder / str(about["step"])
        temporary = folder.with_name(folder.name + _TEMPORARY)

        def prepare() -> None:
            with saving(folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in self.folder.glob(f"*{_TEMPORARY}*"):  # by a process that was killed
                    shutil.rmtree(left)
                if folder.exists():
                    raise FileExistsError("there is one of this step already")
                temporary.mkdir()

        together(f"{folder}-{next(_meetings)}", None, prepare)
        copies, meeting = on_host(arrays), f"{folder}-{next(_meetings)}"
        about["arrays"] = {name: entry for name, (entry, _) in zip(arrays, copies, strict=True)}

        def write() -> None:
            """In the background: all processes write, then process 0 gives the folder its name."""
            error = None
            try:
                with saving(folder):
                    write_arrays(temporary, copies)
            except CheckpointError as failed:
                error = failed
            try:
                together(meeting, error, complete)
            except CheckpointError:
                if jax.process_index() == 0:  # the space may be needed
                    shutil.rmtree(temporary, ignore_errors=True)
                raise

        def complete() -> None:
            with saving(folder):
                write_about(temporary, about)
                temporary.rename(folder)
                sync_folder(self.folder)
                self._delete_old()

        self._pending = self._writer.submit(write)

    def wait(self) -> None:
        """Returns when the last save is on disk and what need not stay is deleted.

        **Raises** `CheckpointError` if that save failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _delete_old(self) -> None:
        steps = self.steps()
        stay = set(steps[-self._keep :])
        if self._every is not None:
            stay.update(step for step in steps if step % self._every == 0)
        for step in sorted(set(steps) - stay):
            gone = self.folder / f"{step}{_TEMPORARY}-deleted"
            # By another name first: killed in between, it must not look like a damaged checkpoint.
            with suppress(OSError):
                (self.folder / str(step)).rename(gone)
                shutil.rmtree(gone)

    def info(self, step: int) -> dict[str, Any]:
        """The dict that was saved with a step; no array is read.

        **Raises** `CheckpointError` if there is none or its description is damaged.
        """
        return read_about(self.folder / str(step))["info"]

    def restore(
        self, step: int, like: PyTree, data: Positioned | None = None, *, part: bool = False
    ) -> tuple[PyTree, dict[str, Any]]:
        """The state of a step, placed and typed `like` a given tree, and its dict.

        The leaves of `like` are arrays or `jax.ShapeDtypeStruct`s; with a sharding they come as
        arrays so placed, on any mesh and number of processes, otherwise as NumPy's. `data` is moved
        to the saved position. With `part`, the checkpoint may hold more than `like`, which has None
        in the place of what it leaves out, and only that much is read.

        **Raises** `CheckpointError` if a file is missing, damaged or not this checkpoint's;
        `CheckpointMismatch`, one of them, if names, shapes or dtypes are not those of `like`, or
        the data position is not one of `data`.
        """
        folder, wanted = self.folder / str(step), named_leaves(like)
        error, arrays, about = None, {}, {}
        try:
            about = read_about(folder)
            compare(folder, about, wanted, part)
            entries = {name: about["arrays"][name] for name in wanted}
            read = {entry["folder"] for entry in entries.values()}
            files = about["files"].items()
            check_files(folder, {name: f for name, f in files if name.split("/")[0] in read})
            arrays = read_arrays(folder, entries, wanted)
        except CheckpointError as failed:
            error = failed
        together(f"{folder}-{next(_meetings)}", error)
        if data is not None:
            if about["data"] is None:
                raise CheckpointMismatch(f"{folder}: it was saved without a data position.")
            try:
                data.set_state(about["data"])
            except Exception as failed:
                raise CheckpointMismatch(f"{folder}: the data position: {failed}") from failed
        likes, structure = jax.tree.flatten(like)
        leaves = [
            key_like(arrays[name], leaf) if is_key(leaf) else arrays[name]
            for name, leaf in zip(wanted, likes, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves), about["info"]

    def restore_newest(
        self,
        like: PyTree,
        data: Positioned | None = None,
        *,
        part: bool = False,
        report: Callable[[str], None] = lambda message: print(message, file=sys.stderr),
    ) -> tuple[int, PyTree, dict[str, Any]]:
        """The newest checkpoint that is not damaged: its step, state and dict, as from `restore`.

        The damaged ones that are newer are reported and renamed to `<step>.damaged`, so that they
        count no more; none is deleted.

        **Raises** `CheckpointError` if none is usable, with the reason of each, and
        `CheckpointMismatch` as soon as one is of another configuration. Then all stay as they are.
        """
        steps = together(f"{self.folder}-{next(_meetings)}", None, self.steps)
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            try:
                state, info = self.restore(step, like, data, part=part)
            except CheckpointMismatch:
                raise
            except CheckpointError as error:
                damaged[step] = str(error)
                continue
            if jax.process_index() == 0:
                for bad, message in damaged.items():
                    report(f"damaged checkpoint {message} {_set_aside(self.folder / str(bad))}")
            return step, state, info
        if not steps:
            raise CheckpointError(f"{self.folder}: there is no checkpoint.")
        lines = "\n  ".join(damaged.values())
        raise CheckpointError(f"{self.folder}: no checkpoint is usable:\n  {lines}")


def _set_aside(folder: Path) -> str:
    """Renames a checkpoint so that it counts no more; says to what, or why it cannot."""
    names = (f"{folder.name}.damaged{'-' * (k > 0)}{k or ''}" for k in itertools.count())
    new = next(path for path in map(folder.with_name, names) if not path.exists())
    try:
        folder.rename(new)
    except OSError as error:
        return f"It cannot be renamed: {reason(error)}."
    return f"Renamed to {new.name}."
