"""Labelled image files as records: what every source of images yields, and how it is listed."""

import hashlib
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64

from .idx import DataError

IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff",
)  # fmt: skip


class ImageRecord(NamedTuple):
    """One image as it is stored: the bytes of its file, its label and the name to report it by."""

    image: bytes
    label: int
    id: str


@runtime_checkable
class ImageSource(Protocol):
    """Random access to labelled images, cheap to pickle: workers get a copy.

    `source[i]` reads one `ImageRecord`, `0 <= i < len(source)`, its label an index into
    `class_names`. `digest()` is a SHA-256 over names, sizes and labels: not over the pixels.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> ImageRecord: ...

    def digest(self) -> str: ...


@dataclass(frozen=True)
class Listing:
    """Names and labels of many records, in three buffers instead of a million strings.

    >>> listing = Listing.of(("cat", "dog"), ["cat/a.png", "dog/b.png"], [0, 1])
    >>> listing.name(1), len(listing)
    ('dog/b.png', 2)
    """

    class_names: tuple[str, ...]
    labels: Int32[np.ndarray, " n"]
    ends: Int64[np.ndarray, " n"]
    joined: bytes

    @staticmethod
    def of(class_names: Sequence[str], names: Sequence[str], labels: Sequence[int]) -> "Listing":
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return Listing(tuple(class_names), np.asarray(labels, np.int32), ends, b"".join(encoded))

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.joined[start : self.ends[index]])

    def digest(self, sizes: Iterable[int]) -> str:
        """The same for the same files in the same order, whatever contains them."""
        rows = zip(map(self.name, range(len(self))), sizes, self.labels.tolist(), strict=True)
        return listing_digest(self.class_names, rows)


def listing_digest(class_names: Sequence[str], rows: Iterable[tuple[str, int, int]]) -> str:
    """SHA-256 over class names and `(name, size, label)` rows, in their order.

    >>> listing_digest(["a", "b"], [("a/1.png", 90, 0)])[:8]
    'c0f408fc'
    """
    sha = hashlib.sha256(repr(tuple(class_names)).encode("utf-8", "surrogateescape"))
    for name, size, label in rows:
        sha.update(f"\n{name}\0{size}\0{label}".encode("utf-8", "surrogateescape"))
    return sha.hexdigest()


def checked_index(index: SupportsIndex, length: int) -> int:
    """`index` as an int; `IndexError` outside `0 .. length - 1`, so that iterating ends.

    >>> checked_index(np.int64(3), 4)
    3
    """
    i = operator.index(index)
    if not 0 <= i < length:
        raise IndexError(f"record {i} of {length}")
    return i


def check_classes(where: str, class_names: Sequence[str], counts: Sequence[int]) -> None:
    """Raises `DataError` unless there are two classes or more and each has an image.

    >>> check_classes("images", ["cat", "dog"], [2, 1])
    """
    if len(class_names) < 2:
        raise DataError(
            f"{where}: expected at least two classes, got one ({', '.join(class_names) or 'none'})."
            " Give the folder above it, or divide the images into a folder a class."
        )
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty:
        shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise DataError(
            f"{where}: {len(empty)} of {len(class_names)} classes have no image: {shown}. Fill or "
            f"remove them, as labels count the classes. Image files end with "
            f"{', '.join(IMAGE_ENDINGS)}."
        )


def is_image(name: str) -> bool:
    """Whether a file name ends like an image and is not hidden.

    >>> is_image("n01440764/n01440764_10026.JPEG"), is_image("._a.png")
    (True, False)
    """
    return name.lower().endswith(IMAGE_ENDINGS) and not os.path.basename(name).startswith(".")
