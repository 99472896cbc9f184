"""Images of an npz file, such as those that evaluators exchange, a batch in memory at a time."""

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from ..durable import check_is_file
from .errors import DataError


class NpzImages:
    """The array `arr_0` of an npz, uint8 `(n, h, w, c)`, and the labels `arr_1` if it has them.

    What ADM's sampling scripts write and its evaluator reads. A file of 50,000 images is 10 GB: it
    is read from its beginning to its end, compressed or not, and nothing is unpickled.

    **Raises** `DataError` for a file that is none, and for images of another form.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "samples.npz"
    >>> np.savez(path, np.zeros((5, 8, 8, 3), np.uint8), np.arange(5))
    >>> images = NpzImages(path)
    >>> images.shape, [len(batch) for batch in images.batches(2, start=1)], images.labels.tolist()
    ((5, 8, 8, 3), [2, 2], [0, 1, 2, 3, 4])
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._array("arr_0") as (_, shape, dtype):
            if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
                raise DataError(
                    f"{path}: its arr_0 is {dtype} {shape}; images must be uint8 (n, h, w, 3), or "
                    "1 for grey. Floats in [-1, 1] are rounded by eqxldm.data.to_uint8."
                )
            self.shape: tuple[int, ...] = shape

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def labels(self) -> Int64[np.ndarray, " n"] | None:
        """`arr_1`, if it is there and has an integer for each image."""
        if "arr_1.npy" not in self._names():
            return None
        with self._array("arr_1") as (file, shape, dtype):
            if shape != self.shape[:1] or dtype.kind not in "iu":
                return None
            content = self._read(file, shape[0] * dtype.itemsize)
        return np.frombuffer(content, dtype).astype(np.int64)

    def batches(self, size: int, *, start: int = 0) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """The images from number `start` on, `size` at a time, the last ones fewer.

        **Raises** `DataError` where the file ends too early or is damaged.
        """
        each = int(np.prod(self.shape[1:]))
        with self._array("arr_0") as (file, _, _):
            left = start * each
            while left:  # a compressed file cannot be entered in the middle
                left -= len(self._read(file, min(left, 2**24)))
            for first in range(start, len(self), size):
                count = min(size, len(self) - first)
                content = self._read(file, count * each)
                yield np.frombuffer(content, np.uint8).reshape(count, *self.shape[1:])

    def digest(self) -> str:
        """SHA-256 over the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _names(self) -> list[str]:
        with zipfile.ZipFile(self.path) as file:
            return file.namelist()

    def _read(self, file: Any, count: int) -> bytes:
        try:
            content = file.read(count)
        except Exception as error:  # each of zip's compressions has its own ways to fail
            raise DataError(f"{self.path} is damaged: {error}.") from error
        if len(content) < count:
            raise DataError(f"{self.path} is truncated.")
        return content

    @contextmanager
    def _array(self, name: str) -> Iterator[tuple[Any, tuple[int, ...], np.dtype]]:
        try:
            check_is_file(self.path)
            archive = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise DataError(f"{self.path} cannot be read as an npz: {error}.") from error
        with archive:
            try:
                file = archive.open(f"{name}.npy")
            except KeyError:
                held = ", ".join(archive.namelist())[:200]
                raise DataError(
                    f"{self.path} has no array {name}; it has {held or 'none'}. Write images by "
                    "np.savez(path, images)."
                ) from None
            except Exception as error:  # encrypted, or by a compression that is not known
                raise DataError(f"{self.path}: {name} is damaged: {error}.") from error
            with file:
                try:
                    version = np.lib.format.read_magic(file)
                    read = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }[version]
                    shape, fortran, dtype = read(file)
                    if not all(isinstance(n, int) and n >= 0 for n in shape):
                        raise ValueError(f"its shape is {shape}")
                except Exception as error:
                    raise DataError(f"{self.path}: {name} is damaged: {error}.") from error
                if fortran:
                    raise DataError(f"{self.path}: {name} is in Fortran's order; write it in C's.")
                yield file, shape, dtype
