"""ILSVRC tar files, read where they lie: an index says where each image begins."""

import contextlib
import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, SupportsIndex

import numpy as np

from ...durable import check_is_file
from ..download import cache_dir
from ..errors import DataError, reading
from ..image_source import (
    ImageRecord,
    Listing,
    Strings,
    check_classes,
    checked_index,
    is_image,
)

_BLOCK = 512  # of the tar format
# The arrays of an index and their kinds.
_INDEX = dict(class_names="U", labels="i", ends="i", joined="u", tar="i", offset="i", size="i")


class ImageTars:
    """A folder of class tars (`n01440764.tar`), or the one tar that holds them; never unpacked.

    The names and positions of all images are read once and kept below `cache_dir()`, as long as
    the tars keep size and time. Records, their order and the digest equal those of an `ImageFolder`
    of the unpacked files; those of a single class tar have no labels.

    **Raises** `DataError` if a tar is compressed, damaged or truncated, or holds no class tars.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("cat", "dog"):
    ...         with tarfile.open(Path(folder, f"{name}.tar"), "w") as tar:
    ...             member = tarfile.TarInfo(f"{name}_1.JPEG")
    ...             member.size = 3
    ...             tar.addfile(member, io.BytesIO(b"..."))
    ...     ImageTars(folder, index_dir=folder)[1]
    ImageRecord(image=b'...', id='dog/dog_1.JPEG', label=1, caption=None, sound=None)
    """

    def __init__(self, path: str | Path, *, index_dir: str | Path | None = None):
        self.path = Path(path)
        with reading(path):
            files = sorted(self.path.glob("*.tar")) if self.path.is_dir() else [self.path]
            for file in files:
                check_is_file(file)
            stats = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        folder = Path(index_dir) if index_dir is not None else cache_dir() / "tars"
        kept = folder / f"{hashlib.sha256(repr(stats).encode()).hexdigest()[:32]}.npz"
        self._files = files
        index = _load(kept, [size for _, size, _ in stats])
        if index is None:
            index = _index(self.path, files)
            _save(kept, index)
        names = Strings(index["ends"], index["joined"].tobytes())
        class_names = tuple(index["class_names"].tolist())
        self._listing = Listing(class_names, names, index["labels"] if class_names else None, None)
        self.class_names, self.has_captions = class_names, False
        self.labels = self._listing.labels
        self._file, self._offset, self._size = (index[n] for n in ("tar", "offset", "size"))

    def __len__(self) -> int:
        return len(self._listing)

    def __getitem__(self, index: SupportsIndex) -> ImageRecord:
        i = checked_index(index, len(self))
        path, name, size = self._files[self._file[i]], self._listing.names[i], int(self._size[i])
        # Open for one read: there is no limit on tars.
        with reading(path), open(path, "rb", buffering=0) as file:
            file.seek(int(self._offset[i]))
            content = file.read(size)
        if len(content) != size:
            raise DataError(f"{path}: {name} ends after {len(content)} of {size} bytes.")
        return self._listing.record(i, content)

    def digest(self) -> str:
        return self._listing.digest(self._size.tolist())


def _index(path: Path, files: list[Path]) -> dict[str, np.ndarray]:
    """Every image's name, label, file, offset and size, in the order of an `ImageFolder`."""
    tars: list[tuple[str, int, int, int]] = []  # class, file, begin, size
    for k, file in enumerate(files):
        if path.is_dir():
            tars.append((file.stem, k, 0, file.stat().st_size))
        else:
            with _opened(file) as stream:
                inner = list(_members(file, stream, 0, file.stat().st_size))
            tars += [(Path(n).stem, k, at, size) for n, at, size in inner if n.endswith(".tar")]
            if not tars:
                raise DataError(
                    f"{file}: expected a tar of class tars (n01440764.tar, ...), got "
                    f"{len(inner)} other files. Unpack it and give the folder of class folders."
                )
    rows: list[tuple[int, str, int, int, int]] = []
    tars.sort()
    class_names = [name for name, *_ in tars]
    counts = []
    for label, (name, k, begin, size) in enumerate(tars):
        with _opened(files[k]) as stream:
            found = [
                (label, f"{name}/{member}", k, at, length)
                for member, at, length in sorted(_members(files[k], stream, begin, size))
                if is_image(member)
            ]
        counts.append(len(found))
        rows += found
    check_classes(str(path), class_names, counts)
    labels, names, file_of, offsets, sizes = zip(*rows, strict=True)
    listing = Listing.of(names, class_names, labels)
    return {
        "class_names": np.array(listing.class_names, np.str_),
        "labels": np.array(labels, np.int32),
        "ends": listing.names.ends,
        "joined": np.frombuffer(listing.names.joined, np.uint8),
        "tar": np.array(file_of, np.int32),
        "offset": np.array(offsets, np.int64),
        "size": np.array(sizes, np.int64),
    }


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    with reading(file), open(file, "rb") as stream:
        yield stream


def _members(file: Path, stream: BinaryIO, begin: int, size: int) -> Iterator[tuple[str, int, int]]:
    """`(name, offset in the file, size)` of each regular file of the tar at `begin`."""
    end = begin + size
    stream.seek(begin)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > end:
                    raise DataError(
                        f"{file}: is truncated: {member.name} ends at byte "
                        f"{member.offset_data + member.size} of {end}. Copy the file again."
                    )
                if member.isreg():
                    yield member.name, member.offset_data, member.size
            stopped = tar.offset
    except tarfile.TarError as error:
        raise DataError(
            f"{file}: cannot be read as an uncompressed tar file: {error}. If it is compressed, "
            "decompress it first, as images are read where they lie; if not, it is truncated or "
            "damaged: copy it again."
        ) from error
    # tarfile takes a damaged header for the end; the end is a block of zeros.
    stream.seek(stopped)
    if stream.read(_BLOCK) != bytes(_BLOCK):
        raise DataError(
            f"{file}: is truncated or damaged at byte {stopped} of {end}: no end of archive there. "
            "Copy the file again."
        )


def _load(path: Path, file_sizes: list[int]) -> dict[str, np.ndarray] | None:
    """An index that was kept, of files of these sizes; None for what is not there or no such."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            index = dict(file)
    except Exception:  # not there, or damaged: numpy and zipfile raise half a dozen kinds
        return None
    if {name: array.dtype.kind for name, array in index.items()} != _INDEX:
        return None
    rows = [index[name] for name in ("labels", "ends", "tar", "offset", "size")]
    same = all(array.shape == rows[0].shape and array.ndim == 1 for array in rows)
    if not same or not index["class_names"].ndim == index["joined"].ndim == 1:
        return None
    within = lambda name, count: np.all((index[name] >= 0) & (index[name] < count))
    if not within("labels", len(index["class_names"])) or not within("tar", len(file_sizes)):
        return None
    ends, offset, size = index["ends"], index["offset"], index["size"]
    most = np.array(file_sizes, np.int64)[index["tar"]]
    inside = np.all((offset >= 0) & (size >= 0) & (offset <= most) & (size <= most - offset))
    ordered = np.all(np.diff(ends, prepend=0) >= 0) and within("ends", len(index["joined"]) + 1)
    return index if inside and ordered else None


def _save(path: Path, index: dict[str, np.ndarray]) -> None:
    """Keeps the index; a folder that cannot be written only costs the time of the next call."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tars-") as scratch:
            part = Path(scratch, path.name)
            np.savez(part, **index)  # pyright: ignore[reportArgumentType]
            os.replace(part, path)
