"""Images in ArrayRecord files: fast at random, few files, checksums."""

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import SupportsIndex

from .idx import DataError
from .record_files import RecordFiles, writing_records
from .records import ImageRecord, ImageSource, checked_index, listing_digest

_FORMAT = "eqxldm images 1"
_HEAD = struct.Struct("<iI")  # label, bytes of the id; then the id and the image


def write_array_record(
    source: ImageSource,
    path: str | Path,
    *,
    indices: Iterable[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Copies the images of a source, or those at `indices`, into one ArrayRecord file.

    The images are stored as they are. Several files in one folder, each with a part of the
    indices, read as one source. `progress` gets the number of images written. The file appears
    whole or not at all.

    >>> class Two:
    ...     class_names = ("cat", "dog")
    ...     __len__ = lambda self: 2
    ...     __getitem__ = lambda self, i: ImageRecord(b"...", i, f"{i}.png")
    ...     digest = lambda self: ""
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_array_record(Two(), f"{folder}/images.arrayrecord")
    ...     ImageArrayRecord(folder)[1]
    ImageRecord(image=b'...', label=1, id='1.png')
    """
    rows: list[tuple[str, int, int]] = []
    with writing_records(Path(path)) as write:
        for done, i in enumerate(range(len(source)) if indices is None else indices, 1):
            record = source[i]
            name = record.id.encode("utf-8", "surrogateescape")
            write(_HEAD.pack(record.label, len(name)) + name + record.image)
            rows.append((record.id, len(record.image), record.label))
            if progress is not None:
                progress(done)
        digest = listing_digest(source.class_names, rows)
        about = {"format": _FORMAT, "class_names": source.class_names, "digest": digest}
        write(json.dumps(about).encode())


class ImageArrayRecord:
    """One file that `write_array_record` wrote, or a folder of `*.arrayrecord`, in sorted order.

    **Raises** `DataError` if a file is damaged or of another format, or if the files differ in
    their class names. `write_array_record` shows an example.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        paths = sorted(self.path.glob("*.arrayrecord")) if self.path.is_dir() else [self.path]
        if not paths:
            raise DataError(f"{path}: expected *.arrayrecord in it, got none.")
        self._files = RecordFiles(paths)
        abouts = [_about(self._files, k) for k in range(len(paths))]
        for file, about in zip(paths, abouts, strict=True):
            if about["class_names"] != abouts[0]["class_names"]:
                raise DataError(f"{file}: its class names differ from those of {paths[0]}.")
        self._class_names = tuple(abouts[0]["class_names"])
        digests = [about["digest"] for about in abouts]
        rows = [(digest, 0, 0) for digest in digests]
        self._digest = digests[0] if len(rows) == 1 else listing_digest(self._class_names, rows)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._class_names

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: SupportsIndex) -> ImageRecord:
        (record,) = self._files.read([checked_index(index, len(self))])
        label, length = _HEAD.unpack_from(record)
        start = _HEAD.size + length
        id = record[_HEAD.size : start].decode("utf-8", "surrogateescape")
        return ImageRecord(record[start:], label, id)

    def digest(self) -> str:
        """Of one file: that of its source. Of several: over theirs."""
        return self._digest


def _about(files: RecordFiles, k: int) -> dict:
    try:
        about = json.loads(files.footer(k))
        if about["format"] == _FORMAT:
            return about
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(
        f"{files.paths[k]}: expected an ArrayRecord file of images that write_array_record wrote "
        f"({_FORMAT}); its last record says otherwise."
    )
