"""Files that appear whole or not at all, and stay; and reading what may be no file."""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error.

    Its content is on the disk before it has the name, so that neither a killed process nor a lost
    machine leaves half a file at `path`. Of two writers at the same time the last one stays. What
    killed ones have left is removed by the next one, where the file system has locks. Write into
    the temporary file; one that is put in its place is not known to be in use. An `OSError` of the
    block has `path` as its file name, unless it has one.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder, "a.txt")) as temporary:
    ...         _ = temporary.write_text("1")
    ...     os.listdir(folder)
    ['a.txt']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for found in path.parent.iterdir():
        if is_temporary(found, path):
            _remove_if_left(found)
    temporary, claim = _claimed(path)
    with claim:
        try:
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError as error:  # a write to an open file names none
            error.filename = error.filename or str(path)
            raise
        finally:
            temporary.unlink(missing_ok=True)


def check_is_file(path: str | Path) -> None:
    """`OSError` for a pipe, a socket or a device: to open or to read one may never end.

    >>> check_is_file(os.devnull)
    Traceback (most recent call last):
    OSError: [Errno 22] is a pipe, a socket or a device, and not a file: '/dev/null'
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        what = "is a pipe, a socket or a device, and not a file"
        raise OSError(errno.EINVAL, what, str(path))


def read_file(path: str | Path) -> bytes:
    """The bytes of a file that someone else may have put there.

    **Raises** `OSError`, also for what is no file (`check_is_file`).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a").write_bytes(b"1")
    ...     read_file(Path(folder, "a"))
    b'1'
    """
    check_is_file(path)
    return Path(path).read_bytes()


def is_temporary(found: Path, path: Path) -> bool:
    """Whether a file has the name of a temporary one of `path`.

    >>> is_temporary(Path(".a.txt-77ab03d5.txt"), Path("a.txt"))
    True
    """
    name = re.escape(f".{path.name}-") + "[0-9a-f]{8}" + re.escape(path.suffix)
    return re.fullmatch(name, found.name) is not None


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _claimed(path: Path) -> tuple[Path, IO[bytes]]:
    """A new temporary file of `path`, and the handle that locks it while it is open."""
    while True:
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}{path.suffix}")
        claim = open(temporary, "xb")  # noqa: SIM115 (the caller closes it)
        # Before it was locked, another writer could take it for one that was left, and remove it.
        if not _lock(claim, wait=True) or temporary.exists():
            return temporary, claim
        claim.close()


def _remove_if_left(temporary: Path) -> None:
    with contextlib.suppress(OSError), open(temporary, "rb") as file:
        if _lock(file, wait=False):
            temporary.unlink()


def _lock(file: IO[bytes], *, wait: bool) -> bool:
    """Locks a file while it is open, a sign that its writer lives; False if that cannot be."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True
