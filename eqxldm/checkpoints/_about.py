"""`about.json`: what is in a checkpoint, and what of it is missing, damaged or not wanted."""

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

from ..durable import read_file
from .errors import CheckpointError, CheckpointMismatch, reason

ABOUT = "about.json"
_END = 4096  # bytes: of a chunk they end with its CRC-32C, of a description they are all


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Adds the files of a folder to its description and writes it; it is on the disk after."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): _size_and_end(path) for path in paths}
    with (folder / ABOUT).open("w", encoding="utf-8") as file:
        file.write(_sealed(about | {"files": files}))
        file.flush()
        os.fsync(file.fileno())


def _sealed(about: dict[str, Any]) -> str:
    """The one text of a description, with its checksum in front."""
    text = json.dumps(about, sort_keys=True)
    return f'{{"checksum": "{hashlib.sha256(text.encode()).hexdigest()}", {text[1:]}'


def read_about(folder: Path) -> dict[str, Any]:
    """What was written, or `CheckpointError` with what is wrong with it."""
    try:
        text = read_file(folder / ABOUT).decode()
        about = json.loads(text)
        del about["checksum"]
        if _sealed(about) != text:
            raise ValueError
    except FileNotFoundError:
        what = f"{ABOUT} is missing" if folder.is_dir() else "there is no such checkpoint"
        raise CheckpointError(f"{folder}: {what}.") from None
    except OSError as error:
        raise CheckpointError(f"{folder}: {ABOUT}: {reason(error)}.") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{folder}: {ABOUT} is damaged.") from None
    if str(about["step"]) != folder.name:
        raise CheckpointError(f"{folder}: it is the checkpoint of step {about['step']}.")
    return about


def check_files(folder: Path, files: dict[str, list[int]]) -> None:
    """`CheckpointError` if one of the files is missing, is of another size or ends otherwise."""
    for name, written in files.items():
        try:
            found = _size_and_end(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder}: {name}: {error.strerror}.") from error
        if found != written:
            raise CheckpointError(f"{folder}: {name} is not the file that was written.")


def _size_and_end(path: Path) -> list[int]:
    """Size and CRC-32 of the last bytes of a file."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END))
        return [size, zlib.crc32(file.read())]


def compare(folder: Path, about: dict[str, Any], wanted: dict[str, Any], part: bool) -> None:
    """Raises `CheckpointMismatch` if what is wanted is not what, or a `part` of what, is there."""
    there = {n: f"{a['dtype']} {tuple(a['shape'])}" for n, a in about["arrays"].items()}
    asked = {name: f"{like.dtype} {like.shape}" for name, like in wanted.items()}
    different = [
        f"{name} was {there.get(name, 'not there')}, is now {asked.get(name, 'not asked for')}"
        for name in asked | ({} if part else there)
        if there.get(name) != asked.get(name)
    ]
    if different:
        rest = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise CheckpointMismatch(
            f"{folder} is of another configuration: {'; '.join(different[:3])}{rest}."
        )
