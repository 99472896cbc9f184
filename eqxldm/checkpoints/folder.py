"""The checkpoints of a run: which there are, which stay, and the newest good one."""

import contextlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import PyTree

from ..fingerprints import named_leaves, plain, start_fingerprints
from ._about import ABOUT, check_files, compare, described, listed, read_about, write_about
from ._processes import agreed, raise_together, shared
from ._reading import read_arrays
from ._writing import TEMPORARY, Write
from .errors import CheckpointError, CheckpointMismatch, not_saved, reason


@runtime_checkable
class Positioned(Protocol):
    """An iterator with a position, such as grain's; the state must be JSON-able."""

    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


class Checkpoints:
    """The checkpoints of one training run in one folder.

    The newest `keep` stay, every one whose step is a multiple of `every`, and the one with the
    lowest metric. Others are deleted by the next call after a newer one is complete.

    Saves are asynchronous: `save` returns when the state is copied, and the next one waits for the
    last. Use as a context manager, which waits on leaving. Opening a folder changes nothing in it.
    With several processes every method but `steps` and `best` is called by all of them in the same
    order, and the folder is one that all of them see.

    **Raises** `ValueError` if `keep` or `every` is less than 1.

    >>> import tempfile
    >>> import numpy as np
    >>> with Checkpoints(Path(tempfile.mkdtemp())) as checkpoints:
    ...     checkpoints.save(7, {"w": np.ones(2)}, info={"note": "ones"}, metric=0.5)
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
        self._pending: Write | None = None
        self._damaged: set[int] = set()  # those that could not be renamed
        self._metrics: dict[int, float | None] = {}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if error is None:
            self.wait()
        elif self._pending is not None:  # other processes may be elsewhere: agree on nothing
            failed = self._finish_own()
            if failed is not None:
                error.add_note(str(failed))

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        try:
            names = [entry.name for entry in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {reason(error)}") from error
        steps = {int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name)}
        return sorted(steps - self._damaged)

    def best(self) -> int | None:
        """The step whose metric is lowest, the newest of equal ones; None if none has a metric."""
        metrics = [(self._metric(step), -step) for step in self.steps()]
        known = [(metric, step) for metric, step in metrics if metric is not None]
        return -min(known)[1] if known else None

    def _metric(self, step: int) -> float | None:
        if step not in self._metrics:
            try:
                self._metrics[step] = read_about(self.folder / str(step))["metric"]
            except CheckpointError:
                return None
        return self._metrics[step]

    def save(
        self,
        step: int,
        state: PyTree,
        data: Positioned | None = None,
        info: dict[str, Any] | None = None,
        *,
        metric: float | None = None,
    ) -> None:
        """Starts to save a tree of arrays, the position of an iterator and a JSON-able dict.

        When it returns or raises, the state may be changed or donated. `metric` is better when
        lower; one that is not finite counts as none.

        **Raises** `CheckpointError`, one line with the path and the system's reason, if this save
        cannot be started, as when there is a checkpoint of the step already, or if the one before
        it failed; in that case this one has been started all the same. The older checkpoints stay,
        and a later save can succeed. `ValueError` if a leaf is not an array, or `info` or the
        position is not JSON-able.
        """
        arrays = named_leaves(state)
        if not any(array.size for array in arrays.values()):
            raise ValueError("Checkpoints.save: the state has no array with elements.")
        sums = start_fingerprints(arrays)
        about = {
            "step": step,
            "arrays": {name: described(array) for name, array in arrays.items()},
            "metric": None if metric is None or not math.isfinite(metric) else float(metric),
            "data": None if data is None else data.get_state(),
            "info": info or {},
        }
        try:
            about = json.loads(json.dumps(about))  # a copy, with keys as they will be read
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Checkpoints.save: info and the data position must be JSON-able: {error}."
            ) from None
        failed = [self._finish(), self._start(step, arrays, about, sums)]
        messages = [str(error) for error in failed if error is not None]
        if messages:
            raise CheckpointError("; ".join(messages))

    def _start(
        self, step: int, arrays: dict[str, Any], about: dict[str, Any], sums: Callable[[], Any]
    ) -> CheckpointError | None:
        folder = self.folder / str(step)
        error: Exception | None = None
        if jax.process_index() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_remains()
                probe = self.folder / f"{step}{TEMPORARY}"  # before the others wait for orbax's
                probe.mkdir()
                probe.rmdir()
                if folder.exists() and step in self._damaged:
                    _set_aside(folder, "damaged")
                if folder.exists():
                    raise FileExistsError("there is one of this step already")
            except OSError as failed:
                error = failed
        if not agreed(error is None):
            return not_saved(folder, error or RuntimeError("process 0 could not write"))
        self._damaged.discard(step)
        self._metrics[step] = about["metric"]

        def seal() -> None:
            """In the background on process 0, when all files are written, before the rename."""
            (written,) = self.folder.glob(f"{step}{TEMPORARY}*")
            about["fingerprints"] = sums()
            write_about(written, about)

        items = {name: plain(array) for name, array in arrays.items() if array.size}
        self._pending = Write(folder, items, seal)
        # Where one process fails at once, the others do not know yet; they will when all wait.
        if self._pending.error is not None and jax.process_count() == 1:
            return self._finish()
        return None

    def wait(self) -> None:
        """Returns when the last save is on disk, and deletes what need not stay.

        **Raises** `CheckpointError` if that save failed.
        """
        error = self._finish()
        if error is not None:
            raise error

    def _finish(self) -> CheckpointError | None:
        """Waits for the last save; all processes come to the same result: what process 0 sees."""
        if self._pending is None:
            return None
        folder = self._pending.folder
        error = self._finish_own()
        if agreed(error is None):
            if jax.process_index() == 0:
                self._delete_old()
            return None
        return error or not_saved(folder, RuntimeError("process 0 did not complete it"))

    def _finish_own(self) -> CheckpointError | None:
        assert self._pending is not None
        write, self._pending = self._pending, None
        error = write.finish()
        if jax.process_index() == 0:
            if os.path.exists(write.folder / ABOUT):  # it has its name: it is complete
                return None
            with contextlib.suppress(OSError):  # the space may be needed
                self._remove_remains()
            error = error or RuntimeError("it did not get its name")
        if error is None:
            return None
        self._metrics.pop(int(write.folder.name), None)
        return not_saved(write.folder, error)

    def _remove_remains(self) -> None:
        for entry in self.folder.glob(f"*{TEMPORARY}*"):
            shutil.rmtree(entry)

    def _delete_old(self) -> None:
        try:
            steps = self.steps()
        except CheckpointError:
            return
        keep = {*steps[-self._keep :], self.best()}
        if self._every is not None:
            keep.update(step for step in steps if step % self._every == 0)
        for step in sorted(set(steps) - keep):
            gone = self.folder / f"{step}{TEMPORARY}-deleted"
            # By another name first: killed in between, it must not look like a damaged checkpoint.
            with contextlib.suppress(OSError):
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

        **Raises** `CheckpointError` if a file is missing or damaged, or if the arrays differ from
        those that were saved; `CheckpointMismatch`, one of them, if names, shapes or dtypes are
        not those of `like`, or the data position is not one of `data`.
        """
        folder, wanted = self.folder / str(step), named_leaves(like)
        error, arrays, about = None, {}, {}
        try:
            about = read_about(folder)
            compare(folder, about, wanted, part)
            check_files(folder, about["files"])
            arrays = read_arrays(folder, wanted)
        except CheckpointError as failed:
            error = failed
        raise_together(folder, error)
        found = start_fingerprints(arrays)()
        changed = [name for name in found if found[name] != about["fingerprints"][name]]
        if changed:
            raise CheckpointError(f"{folder}: not what was saved: {listed(changed)}.")
        if data is not None:
            if about["data"] is None:
                raise CheckpointMismatch(f"{folder}: it was saved without a data position.")
            try:
                data.set_state(about["data"])
            except Exception as failed:
                raise CheckpointMismatch(f"{folder}: the data position: {failed}") from failed
        leaves = [arrays[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), about["info"]

    def restore_newest(
        self,
        like: PyTree,
        data: Positioned | None = None,
        *,
        part: bool = False,
        report: Callable[[str], None] = _to_stderr,
    ) -> tuple[int, PyTree, dict[str, Any]]:
        """The newest checkpoint that is not damaged: its step, state and dict, as from `restore`.

        The damaged ones that are newer are reported and renamed to `<step>.damaged`, so that they
        count no more; none is deleted.

        **Raises** `CheckpointError` if none is usable, with the reason of each, and
        `CheckpointMismatch` as soon as one is of another configuration. Then all stay as they are.
        """
        steps, damaged = shared(self.steps()), []
        for step in reversed(steps):
            try:
                state, info = self.restore(step, like, data, part=part)
            except CheckpointMismatch:
                raise
            except CheckpointError as error:
                damaged.append((step, str(error)))
                continue
            for bad, message in damaged:
                self._set_aside(bad, message, report)
            return step, state, info
        if not steps:
            raise CheckpointError(f"{self.folder}: there is no checkpoint.")
        lines = "\n  ".join(message for _, message in damaged)
        raise CheckpointError(f"{self.folder}: no checkpoint is usable:\n  {lines}")

    def _set_aside(self, step: int, message: str, report: Callable[[str], None]) -> None:
        self._damaged.add(step)
        self._metrics.pop(step, None)
        if jax.process_index() != 0:
            return
        try:
            new = _set_aside(self.folder / str(step), "damaged")
            report(f"damaged checkpoint {message} Renamed to {new.name}.")
        except OSError as error:
            report(f"damaged checkpoint {message} It cannot be renamed: {reason(error)}.")


def _set_aside(folder: Path, why: str) -> Path:
    """Renames a checkpoint so that it counts no more."""
    names = (f"{folder.name}.{why}{'-' * (k > 0)}{k or ''}" for k in range(1000))
    new = next(path for path in map(folder.with_name, names) if not path.exists())
    return folder.rename(new)
