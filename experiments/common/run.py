"""The run folder: configuration, log, metrics, and files that appear whole or not at all."""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eqxldm.durable import is_temporary, replacing

from .terminal import UserError, console

PACKAGES = ("jax", "jaxlib", "equinox", "optax", "grain", "tensorstore", "numpy")


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """What a file holds; None if it is not there or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


class RunFolder:
    """One run's folder, held by one command at a time.

    Of a run's processes only the `primary` one writes; `MADE` may be there before a run is opened.
    """

    MADE = (".lock", "images")

    def __init__(self, path: Path, *, primary: bool = True):
        self.path, self.primary = path, primary
        self.checkpoints = path / "checkpoints"
        self._unlogged = False

    def open(self, config: Mapping[str, Any], *, overwrite: bool) -> None:
        """Begins or resumes a run in the folder; refuses another configuration than its own.

        `overwrite` deletes what a run wrote there before, and nothing else.
        """
        if not self.primary:
            return
        known = self.path / "config.json"
        if not known.exists():
            if not all(e.name in self.MADE or is_temporary(e, known) for e in self.path.iterdir()):
                raise UserError(
                    f"{self.path} holds files but no config.json: not a run folder. "
                    "Use another --run-dir."
                )
            write_json(known, config)
            return
        if overwrite:
            self._delete()
            write_json(known, config)
            return
        differences = _differences(self.config(), json.loads(json.dumps(config)))
        if differences:
            lines = "\n".join(f"  {line}" for line in differences)
            raise UserError(
                f"{self.path} was made with another configuration:\n{lines}\n"
                "Use another --run-dir, the same options, or --overwrite to start anew."
            )

    def _delete(self) -> None:
        """What a run writes; files of others stay."""
        folders = ("checkpoints", "snapshots", "latents", "parts", "tensorboard", "wandb")
        for folder in folders:
            place = (self.path / folder).resolve()  # which may be on another disk, behind a link
            shutil.rmtree(place, ignore_errors=True)
            if (self.path / folder).is_symlink():
                place.mkdir(parents=True)
        for pattern in (
            "*.png",
            "*.npz",
            "*.jsonl",
            "autoencoder.json",
            "autoencoder-loss.json",
            "autoencoder.safetensors",
            "data.json",
            "metrics.json",
        ):
            for entry in self.path.glob(pattern):
                entry.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder against other commands; creates it where it is missing."""
        if not self.primary:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.path} is in use by another process.") from None
            yield

    def config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(
                f"no run in {self.path}: {path.name} is not there. Train first."
            ) from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged: {error}") from None

    def metrics(self) -> dict[str, Any] | None:
        """What metrics.json says; None if the run has not got there."""
        path = self.path / "metrics.json"
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged: {error}. Delete it and train.") from None

    def log(self, **entry: Any) -> None:
        """Adds a line to log.jsonl. That it cannot be written is said once; the run goes on."""
        if not self.primary:
            return
        path = self.path / "log.jsonl"
        before = "\n" if self._unlogged else ""  # the end of a line that was cut
        try:
            with open(path, "a") as file:
                file.write(before + json.dumps(entry) + "\n")
            self._unlogged = False
        except OSError as error:
            if not self._unlogged:
                console.print(f"{path}: {error.strerror}. Going on without these lines.")
            self._unlogged = True

    def log_entries(self) -> list[dict[str, Any]]:
        path = self.path / "log.jsonl"
        entries = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run
                entries.append(json.loads(line))
        return entries

    def rewind_log(self, stage: str, step: int) -> None:
        """Drops what a stage logged after `step`: a resumed run logs those steps again."""
        if not self.primary:
            return
        entries = self.log_entries()
        kept = [e for e in entries if e.get("stage") != stage or e.get("step", 0) <= step]
        if len(kept) < len(entries):
            with replacing(self.path / "log.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(e) + "\n" for e in kept))


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*new, *old])
        return [
            line
            for key in keys
            for line in _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"--{name.replace('_', '-')}: the folder has {old}, now {new}"]


def as_dict(config: Any) -> dict[str, Any]:
    """A dataclass as JSON would give it back: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
