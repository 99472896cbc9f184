"""What is in a folder that someone else made: listed whole, or refused."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from .errors import DataError, reading


def listed(folder: Path) -> list[os.DirEntry]:
    """What is in a folder and not hidden, sorted by name.

    **Raises** `DataError` where it cannot be listed: what is in it would be missing without a word.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("b", "a", ".c"):
    ...         Path(root, name).mkdir()
    ...     [entry.name for entry in listed(Path(root))]
    ['a', 'b']
    """
    with reading(folder, "cannot be listed"), os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def kind_of(
    path: Path, entry: os.DirEntry, wanted: Callable[[str], bool], what: str = "an image"
) -> Literal["folder", "file", "other"]:
    """What an entry is: a folder, a file whose name is `wanted`, or something else.

    **Raises** `DataError` for what would be missing without a word: a link to nothing, and what has
    a wanted name and is no file, such as a pipe.
    """
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file" if wanted(entry.name) else "other"
        entry.stat()
    except OSError as error:
        why = "is a link to nothing" if entry.is_symlink() else "cannot be read"
        raise DataError(
            f"{path}: {why} ({error.strerror or error}). Remove it, or restore what it stands for."
        ) from error
    if wanted(entry.name):
        raise DataError(f"{path}: is named like {what} and is no file. Remove it.")
    return "other"
