"""`about.json`: what is in a checkpoint, and what of it is missing, damaged or not wanted."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from .errors import CheckpointError, CheckpointMismatch, reason

ABOUT = "about.json"
_UNREAD = ("_CHECKPOINT_METADATA", "commit_success.txt")


def described(array: Any) -> list[Any]:
    """Dtype and shape, as JSON gives them back."""
    return [str(array.dtype), list(array.shape)]


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Adds the files of a folder to its description and writes it; all is on the disk after."""
    text = sealed(about | {"files": described_files(folder)})
    with (folder / ABOUT).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sealed(about: dict[str, Any]) -> str:
    """The one text of a description, with its checksum in front."""
    text = json.dumps(about, sort_keys=True)
    return json.dumps({"checksum": hashlib.sha256(text.encode()).hexdigest(), **json.loads(text)})


def read_about(folder: Path) -> dict[str, Any]:
    """What was written, or `CheckpointError` with what is wrong with it."""
    try:
        text = (folder / ABOUT).read_text(encoding="utf-8")
    except FileNotFoundError:
        what = f"{ABOUT} is missing" if folder.is_dir() else "there is no such checkpoint"
        raise CheckpointError(f"{folder}: {what}.") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{folder}: {ABOUT} is damaged.") from None
    except OSError as error:
        raise CheckpointError(f"{folder}: {ABOUT}: {reason(error)}.") from error
    if not text:
        raise CheckpointError(f"{folder}: {ABOUT} is empty.")
    try:
        about = json.loads(text)
        del about["checksum"]
        if sealed(about) == text:
            return about
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CheckpointError(f"{folder}: {ABOUT} is damaged.")


def described_files(folder: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file, all of them on the disk when it returns."""

    def describe(path: Path) -> tuple[str, list[Any]]:
        with path.open("r+b") as file:
            sha = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        return path.relative_to(folder).as_posix(), [path.stat().st_size, sha]

    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as threads:
        return dict(threads.map(describe, (path for path in paths if path.name not in _UNREAD)))


def check_files(folder: Path, files: dict[str, list[Any]]) -> None:
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
            raise CheckpointError(f"{folder}: {name}: {reason(error)}.") from error

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(check, sorted(files)[jax.process_index() :: jax.process_count()]))


def compare(folder: Path, about: dict[str, Any], wanted: dict[str, Any], part: bool) -> None:
    """Raises `CheckpointMismatch` if what is wanted is not what, or a `part` of what, is there."""
    saved = about["arrays"]
    text = lambda described: f"{described[0]} {tuple(described[1])}"
    differ = [
        f"{name} was {text(saved[name])}, is now {text(described(like))}"
        for name, like in wanted.items()
        if name in saved and saved[name] != described(like)
    ]
    unsaved = [name for name in wanted if name not in saved]
    unknown = [] if part else [name for name in saved if name not in wanted]
    parts = [
        listed(differ, "; "),
        f"not in the checkpoint: {listed(unsaved)}" if unsaved else "",
        f"only in the checkpoint: {listed(unknown)}" if unknown else "",
    ]
    if any(parts):
        different = "; ".join(filter(None, parts))
        raise CheckpointMismatch(f"{folder} is of another configuration: {different}.")


def listed(names: list[str], separator: str = ", ", most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + rest
