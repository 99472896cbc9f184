"""ArrayRecord files read in bulk by index, and written whole or not at all."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..durable import replacing
from .idx import DataError

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
    """Gives a function that adds a record; the file is at `path` when the block ends, or never."""
    with replacing(path) as temporary:
        writer = _array_record().ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
        try:
            yield writer.write
        finally:
            writer.close()
