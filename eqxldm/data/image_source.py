"""Image files as records: what every source of images yields, and how it is listed."""

import hashlib
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8

from .errors import DataError

IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff",
)  # fmt: skip


class ImageRecord(NamedTuple):
    """One image as it is stored, and what is known of it.

    `image`: the bytes of an image file, or pixels, uint8 `(h, w, c)`. `id`: the name to report it
    by. `label`: an index into the source's class names; `caption`: a text; `sound`: the wave that
    belongs to it, of a clip; each `None` where there is none.
    """

    image: bytes | UInt8[np.ndarray, "h w c"]
    id: str
    label: int | None = None
    caption: str | None = None
    sound: Float32[np.ndarray, " samples"] | None = None


@runtime_checkable
class ImageSource(Protocol):
    """Random access to images, cheap to pickle: workers get a copy.

    `source[i]` reads one `ImageRecord`, `0 <= i < len(source)`. `class_names` is `()` if the images
    have no labels; `has_captions` says whether every image has a caption. `digest()` is a SHA-256
    over names, sizes, labels and captions, and not over the pixels of files. Those whose labels are
    known without reading the images have them as `labels`, int32 `(n,)` or None, too.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def has_captions(self) -> bool: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> ImageRecord: ...

    def digest(self) -> str: ...


@dataclass(frozen=True)
class Strings:
    """Many strings in two buffers instead of a million objects.

    >>> strings = Strings.of(["cat/a.png", "ä"])
    >>> len(strings), strings[1]
    (2, 'ä')
    """

    ends: Int64[np.ndarray, " n"]
    joined: bytes

    @staticmethod
    def of(strings: Sequence[str]) -> "Strings":
        # Names that are not UTF-8 have surrogates for their bytes, as os.fsdecode makes them.
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        return Strings(ends, b"".join(encoded))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.joined[start : self.ends[index]].decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Listing:
    """What is known of many images without reading them.

    >>> listing = Listing.of(["cat/a.png", "dog/b.png"], ("cat", "dog"), [0, 1])
    >>> listing.record(1, b"...")
    ImageRecord(image=b'...', id='dog/b.png', label=1, caption=None, sound=None)
    """

    class_names: tuple[str, ...]
    names: Strings
    labels: Int32[np.ndarray, " n"] | None
    captions: Strings | None

    @staticmethod
    def of(
        names: Sequence[str],
        class_names: Sequence[str] = (),
        labels: Sequence[int] | np.ndarray | None = None,
        captions: Sequence[str] | None = None,
    ) -> "Listing":
        """`labels` count for nothing where there are fewer than two classes."""
        if len(class_names) < 2:
            class_names, labels = (), None
        return Listing(
            tuple(class_names),
            Strings.of(names),
            None if labels is None else np.asarray(labels, np.int32),
            None if captions is None else Strings.of(captions),
        )

    def __len__(self) -> int:
        return len(self.names)

    def record(self, index: int, image: bytes) -> ImageRecord:
        return ImageRecord(image, self.names[index], self._label(index), self._caption(index))

    def _label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])

    def _caption(self, index: int) -> str | None:
        return None if self.captions is None else self.captions[index]

    def digest(self, sizes: Iterable[int]) -> str:
        """The same for the same files in the same order, whatever contains them."""
        facts = ((self.names[i], self._label(i), self._caption(i)) for i in range(len(self)))
        rows = zip(facts, sizes, strict=True)
        return listing_digest(self.class_names, ((n, s, y, c) for (n, y, c), s in rows))


Row = tuple[str, int, int | None, str | None]  # name, size, label, caption


def listing_digest(class_names: Sequence[str], rows: Iterable[Row]) -> str:
    """SHA-256 over class names and rows of a name, a size, a label and a caption, in their order.

    >>> listing_digest(["a", "b"], [("a/1.png", 90, 0, None)])[:8]
    'c0f408fc'
    """
    sha = hashlib.sha256(repr(tuple(class_names)).encode("utf-8", "surrogateescape"))
    for name, size, label, caption in rows:
        sha.update(f"\n{name}\0{size}\0{label}".encode("utf-8", "surrogateescape"))
        if caption is not None:
            # With its length, so that no caption can pass for a further row.
            sha.update(f"\0{len(caption)}\0{caption}".encode("utf-8", "surrogateescape"))
    return sha.hexdigest()


def sample_digest(source: ImageSource, *, most: int = 2000, sample: int = 200) -> str:
    """SHA-256 over the content of the images: of all up to `most`, of `sample` spread ones else.

    `source.digest()` knows a file by its size. Files of another content and the same size, as those
    of formats without compression are, are told apart by this, at the cost of reading them.

    **Raises** `DataError` if one cannot be read.

    >>> from .sources.arrays import ImageArrays
    >>> one, other = (ImageArrays(np.full((2, 4, 4, 3), k, np.uint8)) for k in (0, 1))
    >>> sample_digest(one) == sample_digest(other)
    False
    """
    count = len(source)
    chosen = range(count) if count <= most else range(0, count, count // sample)
    sha = hashlib.sha256()
    for i in chosen:
        image = source[i].image
        content = image if isinstance(image, bytes) else np.ascontiguousarray(image).data
        sha.update(hashlib.sha256(content).digest())
    return sha.hexdigest()


# Called for every image, so that it goes without annotations: comparing them takes longer.
def checked_index(index, length):
    """`index` as an int; `IndexError` outside `0 .. length - 1`, so that iterating ends.

    >>> checked_index(np.int64(3), 4)
    3
    """
    i = operator.index(index)
    if not 0 <= i < length:
        raise IndexError(f"record {i} of {length}")
    return i


def check_classes(where: str, class_names: Sequence[str], counts: Sequence[int]) -> None:
    """Raises `DataError` unless each class has an image.

    >>> check_classes("images", ["cat", "dog"], [2, 1])
    """
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty:
        raise DataError(
            f"{where}: {len(empty)} of {len(class_names)} classes have no image: {shown(empty)}. "
            "Fill or remove them, as labels count the classes. Image files end with "
            f"{', '.join(IMAGE_ENDINGS)}."
        )


def shown(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are.

    >>> shown(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def is_image(name: str) -> bool:
    """Whether a file name ends like an image and is not hidden.

    >>> is_image("n01440764/n01440764_10026.JPEG"), is_image("._a.png")
    (True, False)
    """
    return name.lower().endswith(IMAGE_ENDINGS) and not os.path.basename(name).startswith(".")
