"""The cache: files fetched once, from the first source that has them.

Nothing gets its name in the cache before its checksum is right, so that the cache can be filled by
several processes at once and interrupted at any time.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .idx import DataError
from .sources import PublishedFile, Source, check_md5

Log = Callable[[str], None]

_STALE_SECONDS = 86400


def cache_dir() -> Path:
    """The folder for what is fetched or computed once: `$EQXLDM_CACHE`, else the platform's.

    That is `eqxldm` in `$XDG_CACHE_HOME` or `~/.cache`, on macOS in `~/Library/Caches`, on Windows
    in `%LOCALAPPDATA%`. It need not exist.

    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, EQXLDM_CACHE="data"):
    ...     str(cache_dir())
    'data'
    """
    chosen = os.environ.get("EQXLDM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "eqxldm"


def fetch(
    files: Sequence[PublishedFile], sources: Sequence[Source], folder: Path, log: Log
) -> dict[str, bytes]:
    """The content of each file, from the cache `folder` or the first source that has it.

    A source is given up at its first failure, so that a host out of reach costs one attempt.
    `folder` keeps the uncompressed files; their checksums are verified on every call. `log` gets
    a line on each source tried, each that failed and each file found corrupt.

    **Raises** `DataError` if a file cannot be had, with the reason of each source, or if `folder`
    cannot be written.

    >>> file = PublishedFile("a", md5_gz="", md5="8d777f385d3dfec8815d20f7496026dc")
    >>> with tempfile.TemporaryDirectory() as cache:
    ...     _ = Path(cache, "a").write_bytes(b"data")
    ...     fetch([file], [], Path(cache), print)
    {'a': b'data'}
    """
    found: dict[str, bytes] = {}
    absent: list[str] = []
    failures: list[str] = []
    for file in files:
        try:
            content = (folder / file.name).read_bytes()
            check_md5(str(folder / file.name), content, file.md5)
            found[file.name] = content
        except FileNotFoundError:
            absent.append(file.name)
        except (DataError, OSError) as error:
            failures.append(f"cache: {error}")
            log(f"In the cache, {error}; fetching it again.")
    if absent:
        failures.append(f"cache {folder}: lacks {', '.join(absent)}")
    for source in sources:
        missing = [file for file in files if file.name not in found]
        if not missing:
            break
        log(f"Fetching {len(missing)} of {len(files)} files for {folder} from {source}.")
        with _scratch(folder) as scratch:
            try:
                for file, content in source.fetch(missing, scratch):
                    check_md5(file.name, content, file.md5)
                    part = scratch / f"{file.name}.part"
                    part.write_bytes(content)
                    os.replace(part, folder / file.name)
                    found[file.name] = content
            except (DataError, OSError) as error:
                failures.append(f"{source}: {error}")
                log(f"Failed: {error}.")
    missing = [file.name for file in files if file.name not in found]
    if missing:
        raise DataError(
            f"no source has {', '.join(missing)}:\n"
            + "".join(f"  - {failure.rstrip('.')}\n" for failure in failures)
            + f"Download {', '.join(file.name for file in files)} (gzip'd or not) into a folder by "
            "other means and pass it as data_dir (--data-dir)."
        )
    return found


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`: on its file system, so that a file moves atomically."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".fetch-*"):  # of processes that were killed
            with contextlib.suppress(FileNotFoundError):  # its owner may remove it right now
                if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        made = tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-", ignore_cleanup_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot write to the cache {folder}: {error.strerror or error}; set EQXLDM_CACHE to a "
            "folder that can be written."
        ) from error
    with made as scratch:
        yield Path(scratch)
