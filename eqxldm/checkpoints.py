"""Checkpoints by orbax that are whole or not there, and are what was saved or are refused.

A checkpoint is one folder named by its step. Orbax writes the arrays under a temporary name, each
process its own shards; then process 0 adds `about.json` and renames the folder. A write that is
killed or fails leaves the checkpoints before it as they were. `about.json` has

- a fingerprint of every array, made on the devices before the save and compared after a restore,
- the size and SHA-256 of every file, so that damage is found before orbax reads it,
- the data position, the metric and what else the caller gave, and a checksum of itself.

Orbax's `_CHECKPOINT_METADATA` and `commit_success.txt` come after it, and nothing reads them.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from .fingerprints import is_key, named_leaves, plain, start_fingerprints

# Orbax reports every step of a save, and prints the errors that it also raises.
logging.getLogger("absl").setLevel(logging.ERROR)
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

_ABOUT = "about.json"
_UNREAD = ("_CHECKPOINT_METADATA", "commit_success.txt")
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of what is being written or deleted
_TIMEOUT = 600  # seconds that a process waits for the others' part of a checkpoint
_GRACE = 30  # seconds between processes that come to a meeting together
_writes = itertools.count()  # the same in all processes


class CheckpointError(Exception):
    """A checkpoint that could not be written, cannot be read or is not what was written."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint of another configuration: undamaged, but not what was asked for."""


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
        self._pending: _Write | None = None
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
            raise CheckpointError(f"{self.folder}: {_reason(error)}") from error
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
                self._metrics[step] = _read_about(self.folder / str(step))["metric"]
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
            "arrays": {name: _described(array) for name, array in arrays.items()},
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
                probe = self.folder / f"{step}{_TEMPORARY}"  # before the others wait for orbax's
                probe.mkdir()
                probe.rmdir()
                if folder.exists() and step in self._damaged:
                    _set_aside(folder, "damaged")
                if folder.exists():
                    raise FileExistsError("there is one of this step already")
            except OSError as failed:
                error = failed
        if not _agreed(error is None):
            return _not_saved(folder, error or RuntimeError("process 0 could not write"))
        self._damaged.discard(step)
        self._metrics[step] = about["metric"]

        def seal() -> None:
            """In the background on process 0, when all files are written, before the rename."""
            (written,) = self.folder.glob(f"{step}{_TEMPORARY}*")
            about["fingerprints"] = sums()
            about["files"] = _files(written)
            with (written / _ABOUT).open("w", encoding="utf-8") as file:
                file.write(_sealed(about))
                file.flush()
                os.fsync(file.fileno())

        items = {name: plain(array) for name, array in arrays.items() if array.size}
        self._pending = _Write(folder, items, seal)
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
        if _agreed(error is None):
            if jax.process_index() == 0:
                self._delete_old()
            return None
        return error or _not_saved(folder, RuntimeError("process 0 did not complete it"))

    def _finish_own(self) -> CheckpointError | None:
        assert self._pending is not None
        write, self._pending = self._pending, None
        error = write.finish()
        if jax.process_index() == 0:
            if os.path.exists(write.folder / _ABOUT):  # it has its name: it is complete
                return None
            with contextlib.suppress(OSError):  # the space may be needed
                self._remove_remains()
            error = error or RuntimeError("it did not get its name")
        if error is None:
            return None
        self._metrics.pop(int(write.folder.name), None)
        return _not_saved(write.folder, error)

    def _remove_remains(self) -> None:
        for entry in self.folder.glob(f"*{_TEMPORARY}*"):
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
            gone = self.folder / f"{step}{_TEMPORARY}-deleted"
            # By another name first: killed in between, it must not look like a damaged checkpoint.
            with contextlib.suppress(OSError):
                (self.folder / str(step)).rename(gone)
                shutil.rmtree(gone)

    def info(self, step: int) -> dict[str, Any]:
        """The dict that was saved with a step; no array is read.

        **Raises** `CheckpointError` if there is none or its description is damaged.
        """
        return _read_about(self.folder / str(step))["info"]

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
            about = _read_about(folder)
            _compare(folder, about, wanted, part)
            _check_files(folder, about["files"])
            arrays = _read_arrays(folder, wanted)
        except CheckpointError as failed:
            error = failed
        _raise_together(folder, error)
        found = start_fingerprints(arrays)()
        changed = [name for name in found if found[name] != about["fingerprints"][name]]
        if changed:
            raise CheckpointError(f"{folder}: not what was saved: {_listed(changed)}.")
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
        steps, damaged = _shared(self.steps()), []
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
            report(f"damaged checkpoint {message} It cannot be renamed: {_reason(error)}.")


class _Write:
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


def _described(array: Any) -> list[Any]:
    return [str(array.dtype), list(array.shape)]


def _key_implementation(like: Any) -> Any:
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like)
    return found[0]


def _read_arrays(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a checkpoint, placed and typed as those wanted."""

    def described(array: Any) -> Any:
        if is_key(array):
            shape = jax.eval_shape(jax.random.key_data, array)
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=array.sharding)
        return ocp.utils.to_shape_dtype_struct(array)

    items = {name: described(array) for name, array in wanted.items() if array.size}
    arrays = {name: _empty(array) for name, array in wanted.items() if not array.size}
    if items:
        arguments = ocp.args.PyTreeRestore(
            items,
            restore_args=ocp.checkpoint_utils.construct_restore_args(items),
            partial_restore=True,
        )
        try:
            with _abandoned_reads_unreported():
                # The handler itself: a checkpointer would make the processes wait for each other.
                handler = ocp.PyTreeCheckpointHandler()
                arrays |= handler.restore(epath.Path(folder), args=arguments)
        except Exception as error:  # orbax and tensorstore raise a dozen kinds
            raise CheckpointError(f"{folder}: {_reason(error)}.") from error
    for name, like in wanted.items():
        if is_key(like) and like.size:
            arrays[name] = jax.random.wrap_key_data(arrays[name], impl=_key_implementation(like))
        if _described(arrays[name]) != _described(like):
            raise CheckpointError(f"{folder}: {name} was read as {_described(arrays[name])}.")
    return arrays


def _empty(like: Any) -> Any:
    """An array without elements; orbax writes none."""
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return np.zeros(like.shape, like.dtype)
    if is_key(like):
        shape = jax.eval_shape(jax.random.key_data, like)
        data = jnp.zeros(shape.shape, shape.dtype, device=sharding)
        return jax.random.wrap_key_data(data, impl=_key_implementation(like))
    return jnp.zeros(like.shape, like.dtype, device=sharding)


# about.json


def _sealed(about: dict[str, Any]) -> str:
    """The one text of a description, with its checksum in front."""
    text = json.dumps(about, sort_keys=True)
    return json.dumps({"checksum": hashlib.sha256(text.encode()).hexdigest(), **json.loads(text)})


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / _ABOUT).read_text(encoding="utf-8")
    except FileNotFoundError:
        what = f"{_ABOUT} is missing" if folder.is_dir() else "there is no such checkpoint"
        raise CheckpointError(f"{folder}: {what}.") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{folder}: {_ABOUT} is damaged.") from None
    except OSError as error:
        raise CheckpointError(f"{folder}: {_ABOUT}: {_reason(error)}.") from error
    if not text:
        raise CheckpointError(f"{folder}: {_ABOUT} is empty.")
    try:
        about = json.loads(text)
        del about["checksum"]
        if _sealed(about) == text:
            return about
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CheckpointError(f"{folder}: {_ABOUT} is damaged.")


def _files(folder: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file, all of them on the disk when it returns."""

    def describe(path: Path) -> tuple[str, list[Any]]:
        with path.open("r+b") as file:
            sha = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        return path.relative_to(folder).as_posix(), [path.stat().st_size, sha]

    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as threads:
        return dict(threads.map(describe, (path for path in paths if path.name not in _UNREAD)))


def _check_files(folder: Path, files: dict[str, list[Any]]) -> None:
    """Each process checks its share of the files."""

    def check(name: str) -> None:
        size, sha = files[name]
        try:
            found = (folder / name).stat().st_size
            if found != size:
                raise CheckpointError(f"{folder}: {name} has {found} bytes, {size} were written.")
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha:
                    raise CheckpointError(f"{folder}: {name} has other bytes than were written.")
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: {name} is missing.") from None
        except OSError as error:
            raise CheckpointError(f"{folder}: {name}: {_reason(error)}.") from error

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(check, sorted(files)[jax.process_index() :: jax.process_count()]))


def _compare(folder: Path, about: dict[str, Any], wanted: dict[str, Any], part: bool) -> None:
    saved = about["arrays"]
    text = lambda described: f"{described[0]} {tuple(described[1])}"
    differ = [
        f"{name} was {text(saved[name])}, is now {text(_described(like))}"
        for name, like in wanted.items()
        if name in saved and saved[name] != _described(like)
    ]
    unsaved = [name for name in wanted if name not in saved]
    unknown = [] if part else [name for name in saved if name not in wanted]
    parts = [
        _listed(differ, "; "),
        f"not in the checkpoint: {_listed(unsaved)}" if unsaved else "",
        f"only in the checkpoint: {_listed(unknown)}" if unknown else "",
    ]
    if any(parts):
        different = "; ".join(filter(None, parts))
        raise CheckpointMismatch(f"{folder} is of another configuration: {different}.")


def _listed(names: list[str], separator: str = ", ", most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + rest


# Errors


def _not_saved(folder: Path, error: Exception) -> CheckpointError:
    message = CheckpointError(f"{folder} was not saved: {_reason(error)}.")
    message.__cause__ = error
    return message


def _reason(error: BaseException) -> str:
    """The system's reason if there is one, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    code = re.search(r"os_error_code='(\d+)'", text)  # as tensorstore writes it
    return os.strerror(int(code[1])) if code else text[:300].removesuffix(".")


def _set_aside(folder: Path, why: str) -> Path:
    """Renames a checkpoint so that it counts no more."""
    names = (f"{folder.name}.{why}{'-' * (k > 0)}{k or ''}" for k in range(1000))
    new = next(path for path in map(folder.with_name, names) if not path.exists())
    return folder.rename(new)


# Several processes


def _agreed(ok: bool) -> bool:
    """What process 0 says."""
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.broadcast_one_to_all(np.int32(ok)))


def _shared(steps: list[int]) -> list[int]:
    """The steps that process 0 sees."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    ours = np.resize(np.array([*steps, 0], np.int32), count)
    return multihost_utils.broadcast_one_to_all(ours).tolist() if count else []


def _raise_together(folder: Path, error: CheckpointError | None) -> None:
    """Raises in every process if any has an error, a mismatch before damage."""
    if jax.process_count() > 1:
        own = 0 if error is None else 2 if isinstance(error, CheckpointMismatch) else 1
        codes = np.ravel(multihost_utils.process_allgather(np.int32(own)))
        if codes.max() > own:
            kind = CheckpointMismatch if codes.max() == 2 else CheckpointError
            raise kind(f"{folder}: process {int(codes.argmax())} cannot use it.") from error
    if error is not None:
        raise error


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
