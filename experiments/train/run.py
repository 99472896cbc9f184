"""The run folder: its configuration, log, results, and the list of what the run wrote."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from beartype.door import is_bearable

from eqxldm.checkpoints import check_folder
from eqxldm.durable import is_temporary, read_file, replacing

from .terminal import UserError, say

PACKAGES = ("jax", "jaxlib", "equinox", "optax", "grain", "tensorstore", "numpy")
CONTENT = "content"  # of a configuration, where it says what the data are
CONFIG, MANIFEST, METRICS, LOG = "config.json", "manifest.json", "metrics.json", "log.jsonl"


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path, kinds: Mapping[str, Any] = {}, *, repair: str) -> dict[str, Any]:
    """The object in a JSON file; `UserError` says what is damaged.

    `kinds` are the types of the values that are needed; what may be None may be missing. `repair`
    is what the user can do about a damaged file. **Raises** `FileNotFoundError` where there is
    none.
    """
    try:
        found = json.loads(read_file(path))
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}, not an object")
        for name, kind in kinds.items():
            if name not in found and not is_bearable(None, kind):
                raise ValueError(f"it lacks {name}")
            if not is_bearable(found.get(name), kind):
                raise ValueError(f"{name} is {found[name]!r}")
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError, too
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is damaged ({reason}). {repair}") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    return found


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunFolder:
    """One run's folder, used by one command at a time.

    Of a run's processes only the `primary` one writes. `file` and `folder` give the paths to write
    to, and note them in manifest.json first, so that `--overwrite` deletes those and nothing else.
    """

    def __init__(self, path: Path, *, primary: bool = True):
        self.path, self.primary = path, primary
        self.checkpoints = path / "checkpoints"
        self._unlogged = False
        self._noted: set[str] | None = None

    def file(self, name: str) -> Path:
        """Where the run writes a file or folder of this name, relative to its own folder."""
        if self.primary:
            if self._noted is None:
                self._noted = set(self._manifest())
            if name not in self._noted:
                self._noted.add(name)
                write_json(self.path / MANIFEST, {"wrote": sorted(self._noted)})
        return self.path / name

    def _manifest(self) -> list[str]:
        try:
            found = read_json(
                self.path / MANIFEST, {"wrote": list},
                repair="Delete the run folder by hand, or use another --run-dir.",
            )["wrote"]  # fmt: skip
        except FileNotFoundError:
            return []
        inside = lambda name: (
            isinstance(name, str) and name.isprintable() and not Path(name).is_absolute()
        )
        if not all(
            inside(name) and ".." not in Path(name).parts and Path(name).parts for name in found
        ):
            raise UserError(f"{self.path / MANIFEST} is damaged: it lists more than names.")
        return found

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other commands out; creates the folder where it is missing, and nothing else."""
        if not self.primary:
            yield
            return
        check_folder(self.path)
        self._refuse_foreign()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open(self.path / ".lock", "a")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"--run-dir {self.path}: {error.strerror or error}.") from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise UserError(f"{self.path} is in use by another process.") from None
                say(f"{self.path}: its file system has no locks; start no second run there.")
            yield

    def _refuse_foreign(self) -> None:
        known = self.path / CONFIG
        try:
            if known.exists() or not self.path.exists():
                return
            entries = [e for e in self.path.iterdir() if e.name not in (".lock", MANIFEST)]
            if known.exists():  # of a run that began just now; whoever has the lock goes on
                return
        except OSError as error:
            raise UserError(f"--run-dir {self.path}: {error.strerror or error}.") from None
        if not all(
            is_temporary(e, known) or is_temporary(e, self.path / MANIFEST) for e in entries
        ):
            raise UserError(
                f"{self.path} holds files but no {CONFIG}: not a run folder. Use another --run-dir."
            )

    def open(
        self, config: Mapping[str, Any], *, overwrite: bool, defaults: Mapping[str, Any] = {}
    ) -> None:
        """Begins or resumes a run; refuses another configuration than the folder's own, in which
        options that an earlier version did not have are as in `defaults`.

        `overwrite` deletes what the run wrote there before, and nothing else.
        """
        if not self.primary:
            return
        self._refuse_foreign()
        if (self.path / CONFIG).exists() and not overwrite:
            differences = _differences(self.config(defaults), json.loads(json.dumps(config)))
            if differences:
                lines = "\n".join(f"  {line}" for line in differences)
                raise UserError(
                    f"{self.path} was made with another configuration:\n{lines}\n"
                    "Use another --run-dir, the same options, or --overwrite to start anew."
                )
            return
        self.delete()
        write_json(self.file(CONFIG), config)

    def delete(self) -> None:
        """Deletes what the run wrote, as its manifest says; never what is behind a link."""
        if (self.path / CONFIG).exists() and not (self.path / MANIFEST).exists():
            raise UserError(
                f"--overwrite: {self.path} has no {MANIFEST}, which lists what the run wrote. "
                "Delete the folder by hand, or use another --run-dir."
            )
        paths = [self.path / name for name in self._manifest()]
        for path in paths:  # before anything is gone
            parts = [p for p in (path, *path.parents) if self.path in p.parents]
            link = next((p for p in parts if p.is_symlink()), None)
            if link is not None and link.exists() and (link.is_file() or any(link.iterdir())):
                raise UserError(
                    f"--overwrite: {link} is a link, and what is behind links is not deleted. "
                    "Remove the link or empty what it points to."
                )
        for path in paths:
            if path.is_symlink():
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths} - {self.path}:
            with contextlib.suppress(OSError):  # it holds something else, too
                folder.rmdir()
        (self.path / MANIFEST).unlink(missing_ok=True)
        self._noted = None

    def config(self, defaults: Mapping[str, Any] = {}) -> dict[str, Any]:
        """The configuration; what an earlier version did not have is as in `defaults`."""
        try:
            repair = "It cannot be resumed; --overwrite starts anew."
            found = read_json(self.path / CONFIG, repair=repair)
        except FileNotFoundError:
            raise UserError(f"no run in {self.path}: no {CONFIG}. Train first.") from None
        config, added = _with_defaults(found, defaults)
        if added:
            shown = ", ".join(added[:3]) + (f" and {len(added) - 3} more" if added[3:] else "")
            say(f"{self.path / CONFIG}: of an earlier version; {shown} are taken by default.")
        return config

    def metrics(self) -> dict[str, Any] | None:
        """What metrics.json says; None if the run has not got there."""
        try:
            kinds = {"timings": dict, "autoencoder": dict | None, "diffusion": dict | None}
            return read_json(self.path / METRICS, kinds, repair="Delete it and train.")
        except FileNotFoundError:
            return None

    def log(self, **entry: Any) -> None:
        """Adds a line to log.jsonl. That it cannot be written is said once; the run goes on."""
        if not self.primary:
            return
        path = self.file(LOG)
        before = "\n" if self._unlogged else ""  # the end of a line that was cut
        try:
            with open(path, "a") as file:
                file.write(before + json.dumps(entry) + "\n")
            self._unlogged = False
        except OSError as error:
            if not self._unlogged:
                say(f"{path}: {error.strerror}. Going on without these lines.")
            self._unlogged = True

    def log_entries(self) -> list[dict[str, Any]]:
        """The lines of the log, without damaged ones, such as the last of a killed run."""
        try:
            lines = (self.path / LOG).read_bytes().splitlines()
        except FileNotFoundError:
            return []
        entries = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("stage"), str):
                    entries.append(entry)
        return entries

    def rewind_log(self, stage: str, step: int) -> None:
        """Drops damaged lines, and what a stage logged after `step`: it is logged again."""
        path = self.path / LOG
        if not self.primary or not path.exists():
            return
        entries = self.log_entries()
        later = lambda at: isinstance(at, (int, float)) and at > step
        stays = lambda e: e["stage"] != stage or not later(e.get("step", 0))
        remaining = [entry for entry in entries if stays(entry)]
        text = "".join(json.dumps(entry) + "\n" for entry in remaining)
        if text.encode() != path.read_bytes():
            with replacing(path) as temporary:
                temporary.write_text(text)


def _with_defaults(found: Any, defaults: Any, name: str = "") -> tuple[dict[str, Any], list[str]]:
    """The values with those that are missing, and the names of these."""
    values, added = dict(found), []
    for key, default in defaults.items():
        if key not in found:
            values[key] = default
            added.append(name + key)
        elif isinstance(found[key], dict) and isinstance(default, dict):
            values[key], below = _with_defaults(found[key], default, f"{name}{key}.")
            added += below
    return values, added


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        # As on the command line, where the options of the data have no group's name.
        below = lambda key: key if name in ("", "pictures", "clips") else f"{name}.{key}"
        return [
            line
            for key in dict.fromkeys([*new, *old])
            for line in _differences(old.get(key), new.get(key), below(key))
        ]
    if old == new:
        return []
    if name == CONTENT:
        return ["the data are not those that it was made of"]
    return [f"--{name.replace('_', '-')}: the folder has {old}, now {new}"]


def as_dict(options: Any) -> dict[str, Any]:
    """A dataclass as JSON would give it back: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))
