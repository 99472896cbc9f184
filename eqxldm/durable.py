"""Files that appear whole or not at all, and stay."""

import contextlib
import os
import re
import secrets
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_DAY = 24 * 3600.0


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error.

    Its content is on the disk before it has the name, so that neither a killed process nor a lost
    machine leaves half a file at `path`. Of two writers at the same time the last one stays. What
    killed ones have left is removed by the next one on the same host, or on any after a day. Write
    into the temporary file; one that is put in its place is not known to be in use.

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
    temporary = path.with_name(f".{path.name}-{_host()}-{secrets.token_hex(4)}{path.suffix}")
    with open(temporary, "xb") as claim:
        if not _lock(claim):
            claim.close()
        try:
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def is_temporary(found: Path, path: Path) -> bool:
    """Whether a file has the name of a temporary one of `path`.

    >>> is_temporary(Path(".a.txt-0f3c9a12-77ab03d5.txt"), Path("a.txt"))
    True
    """
    name = re.escape(f".{path.name}-") + "[0-9a-f]{8}-[0-9a-f]{8}" + re.escape(path.suffix)
    return re.fullmatch(name, found.name) is not None


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _remove_if_left(temporary: Path) -> None:
    with contextlib.suppress(OSError), open(temporary, "rb") as file:
        own = f"-{_host()}-" in temporary.name
        if (own and _lock(file)) or time.time() - os.fstat(file.fileno()).st_mtime > _DAY:
            temporary.unlink()


def _lock(file: IO[bytes]) -> bool:
    """Locks a file for as long as it is open: a sign, on this host, that its writer lives."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # there are no locks here, or another one has it
        return False
    return True


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
