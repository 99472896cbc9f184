"""ArrayRecord files: read in bulk by index, written whole or not at all; images in them."""

import contextlib
import errno
import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from ...durable import replacing
from ..decode import encode_png
from ..errors import DataError
from ..image_source import ImageRecord, ImageSource, Row, checked_index, listing_digest

_FORMAT = "eqxldm images 2"
# The label, the bytes of the id and of the caption, -1 for none; then id, caption and image.
_HEAD = struct.Struct("<iii")
# Records are read one by one at random: no groups. Images and latents don't compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class RecordFiles:
    """The records of several files as one sequence; the last record of each file is its footer.

    A footer is no record of the sequence. Files open when first read from, again in each process
    that gets a pickled copy. Reading verifies the checksums in the files.

    **Raises** `DataError` if a file is missing or damaged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "a.arrayrecord")
    ...     with writing_records(path) as write:
    ...         for record in (b"zero", b"one", b"the footer"):
    ...             write(record)
    ...     files = RecordFiles([path])
    ...     files.read([1, 0]), files.footer(0)
    ([b'one', b'zero'], b'the footer')
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = tuple(paths)
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()
        counts = []
        for path in self.paths:
            reader = _reader(path)
            try:
                counts.append(reader.num_records() - 1)
                reader.close()
            except Exception as error:  # the reader raises what its status says
                raise _damaged(path, error) from error
            if counts[-1] < 0:
                raise DataError(f"{path}: expected at least a footer record, got none.")
        self.starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "starts": self.starts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _readers={}, _lock=threading.Lock())

    def read(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        """The records at these positions, in their order."""
        indices = np.asarray(indices)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"records {indices.min()} .. {indices.max()} of {len(self)}")
        files = np.searchsorted(self.starts, indices, side="right") - 1
        order = np.argsort(files, kind="stable")
        records: list[bytes] = [b""] * len(indices)
        bounds = np.flatnonzero(np.diff(files[order], prepend=-1))
        for chosen in np.split(order, bounds[1:]) if len(order) else []:
            k = int(files[chosen[0]])
            found = self._read(k, (indices[chosen] - self.starts[k]).tolist())
            for at, record in zip(chosen.tolist(), found, strict=True):
                records[at] = record
        return records

    def footer(self, k: int) -> bytes:
        """The last record of file `k`."""
        return self._read(k, [int(self.starts[k + 1] - self.starts[k])])[0]

    def _read(self, k: int, positions: list[int]) -> list[bytes]:
        # Seeking takes half the time of the reader's own read(positions), which goes through its
        # thread pool; but a seek and its read must not be parted.
        with self._lock:
            reader = self._readers.get(k)
            if reader is None:
                reader = self._readers[k] = _reader(self.paths[k])
            try:
                records = []
                for position in positions:
                    reader.seek(position)
                    records.append(reader.read())
                return records
            except Exception as error:
                raise _damaged(self.paths[k], error) from error


def _reader(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    try:
        return _array_record().ArrayRecordReader(str(path), _READER_OPTIONS)
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return DataError(
        f"{path}: cannot be read as an ArrayRecord file: {reason[0][:200]}. If it is one, it is "
        "damaged: delete it and write it again."
    )


def _array_record() -> Any:
    try:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        raise DataError(
            "ArrayRecord files need the package array_record, which is not installed: pip install "
            "array-record (Linux and macOS only)."
        ) from None
    return array_record_module


@contextlib.contextmanager
def writing_records(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Gives a function that adds a record; the file is at `path` when the block ends, or never.

    **Raises** `OSError`, with the system's number for it, if the disk is full or fails.
    """
    with replacing(path) as temporary:
        with _as_os_error(path):
            writer = _array_record().ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)

        def write(record: bytes) -> None:
            with _as_os_error(path):
                writer.write(record)

        try:
            yield write
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the reason
                writer.close()
            raise
        with _as_os_error(path):
            writer.close()


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """The writer raises RuntimeError with the system's words in its message."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error)
        number = next((n for n in errno.errorcode if os.strerror(n) in reason), errno.EIO)
        raise OSError(number, os.strerror(number), str(path)) from error


def write_array_record(
    source: ImageSource,
    path: str | Path,
    *,
    indices: Iterable[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Copies the images of a source, or those at `indices`, into one ArrayRecord file.

    Image files are stored as they are, pixels as PNG. Several files in one folder, each with a part
    of the indices, read as one source. `progress` gets the number of images written. The file
    appears whole or not at all.

    >>> class Two:
    ...     class_names, has_captions = ("cat", "dog"), False
    ...     __len__ = lambda self: 2
    ...     __getitem__ = lambda self, i: ImageRecord(b"...", f"{i}.png", label=i)
    ...     digest = lambda self: ""
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_array_record(Two(), f"{folder}/images.arrayrecord")
    ...     ImageArrayRecord(folder)[1]
    ImageRecord(image=b'...', id='1.png', label=1, caption=None, sound=None)
    """
    rows: list[Row] = []
    with writing_records(Path(path)) as write:
        for done, i in enumerate(range(len(source)) if indices is None else indices, 1):
            record = source[i]
            image = record.image if isinstance(record.image, bytes) else encode_png(record.image)
            name = record.id.encode("utf-8", "surrogateescape")
            caption = (record.caption or "").encode()
            label = -1 if record.label is None else record.label
            length = -1 if record.caption is None else len(caption)
            write(_HEAD.pack(label, len(name), length) + name + caption + image)
            rows.append((record.id, len(image), record.label, record.caption))
            if progress is not None:
                progress(done)
        digest = listing_digest(source.class_names, rows)
        about = {
            "format": _FORMAT,
            "class_names": source.class_names,
            "has_captions": source.has_captions,
            "digest": digest,
        }
        write(json.dumps(about).encode())


class ImageArrayRecord:
    """One file that `write_array_record` wrote, or a folder of `*.arrayrecord`, in sorted order.

    **Raises** `DataError` if a file is damaged or of another format, if the files differ in their
    class names, only some have captions, or a label has no name. `write_array_record` shows an
    example.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        paths = sorted(self.path.glob("*.arrayrecord")) if self.path.is_dir() else [self.path]
        if not paths:
            raise DataError(f"{path}: expected *.arrayrecord in it, got none.")
        self._files = RecordFiles(paths)
        abouts = [_about(self._files, k) for k in range(len(paths))]
        for file, about in zip(paths, abouts, strict=True):
            for name in ("class_names", "has_captions"):
                if about[name] != abouts[0][name]:
                    raise DataError(
                        f"{file}: its {name.replace('_', ' ')} differ from those of {paths[0]}."
                    )
        self.class_names: tuple[str, ...] = tuple(abouts[0]["class_names"])
        self.has_captions = bool(abouts[0]["has_captions"])
        digests = [about["digest"] for about in abouts]
        rows = [(digest, 0, 0, None) for digest in digests]
        self._digest = digests[0] if len(rows) == 1 else listing_digest(self.class_names, rows)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: SupportsIndex) -> ImageRecord:
        i = checked_index(index, len(self))
        (record,) = self._files.read([i])
        try:
            label, name, text = _HEAD.unpack_from(record)
            ends = np.cumsum([_HEAD.size, name, max(text, 0)])
            id = record[ends[0] : ends[1]].decode("utf-8", "surrogateescape")
            caption = None if text < 0 else record[ends[1] : ends[2]].decode()
            if name < 0 or ends[2] > len(record) or (text >= 0) != self.has_captions:
                raise ValueError
        except (struct.error, ValueError):
            raise DataError(
                f"{self.path}: record {i} is not of {_FORMAT}. Write the file again."
            ) from None
        if not -1 <= label < len(self.class_names) or (label < 0) != (not self.class_names):
            raise DataError(
                f"{self.path}: {id}: its label is {label}, but the file names "
                f"{len(self.class_names)} classes. Write the file again."
            )
        return ImageRecord(record[ends[2] :], id, None if label < 0 else label, caption)

    def digest(self) -> str:
        """Of one file: that of its source. Of several: over theirs."""
        return self._digest


def _about(files: RecordFiles, k: int) -> dict:
    try:
        about = json.loads(files.footer(k))
        names = about["class_names"]
        known = isinstance(names, list) and all(isinstance(name, str) for name in names)
        known = known and isinstance(about["has_captions"], bool)
        if about["format"] == _FORMAT and known and isinstance(about["digest"], str):
            return about
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise DataError(
        f"{files.paths[k]}: expected an ArrayRecord file of images that write_array_record wrote "
        f"({_FORMAT}); its last record says otherwise. Write it again from the images."
    )
