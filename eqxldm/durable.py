"""Files that appear whole or not at all, and stay."""

import contextlib
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error.

    Its content is on the disk before it has the name, so that neither a killed process nor a lost
    machine leaves half a file at `path`. Of two writers at the same time the last one stays. What
    killed ones have left is removed by the next.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder, "a.txt")) as temporary:
    ...         _ = temporary.write_text("1")
    ...     os.listdir(folder)
    ['a.txt']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        _remove_if_left(left)
    temporary, handle = _claim(path)
    try:
        yield temporary
        # As the umask says, also where a library has put a file of its own in its place.
        temporary.chmod(os.fstat(handle).st_mode & 0o777)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def is_temporary(found: Path, path: Path) -> bool:
    """Whether `found` is what a killed writer of `path` has left.

    >>> is_temporary(Path(".a.txt-0f3c9a12.txt"), Path("a.txt"))
    True
    """
    return found.name.startswith(_prefix(path))


def _prefix(path: Path) -> str:
    return f".{path.name}-"


def _claim(path: Path) -> tuple[Path, int]:
    """A new file, locked for as long as its handle is open: a sign that its writer lives."""
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(4)}{path.suffix}")
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        _lock(handle, "LOCK_EX")
        if temporary.exists():  # and was not taken for left before it was locked
            return temporary, handle
        os.close(handle)


def _remove_if_left(temporary: Path) -> None:
    with contextlib.suppress(OSError), open(temporary, "rb") as file:
        if _lock(file.fileno(), "LOCK_SH", "LOCK_NB"):  # else its writer lives, or nobody can tell
            temporary.unlink()


def _lock(handle: int, *flags: str) -> bool:
    try:
        import fcntl

        fcntl.flock(handle, sum(getattr(fcntl, flag) for flag in flags))
    except (ImportError, OSError):  # held by another, or there are no locks here
        return False
    return True


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
