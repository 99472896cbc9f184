"""The images of one side of a comparison, in order and a batch at a time."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int64, UInt8

from eqxldm.data import DataError, ImageSource, center_crop, decode_image, open_images
from eqxldm.data.image_source import sample_digest
from eqxldm.data.npz_images import NpzImages

from ..train.terminal import UserError

Batch = UInt8[np.ndarray, "b h w 3"]


class Pictures(Protocol):
    """Images of one size with three channels."""

    def __len__(self) -> int: ...
    @property
    def labels(self) -> Int64[np.ndarray, " n"] | None: ...
    def batches(self, size: int, *, start: int = 0) -> Iterator[Any]: ...
    def digest(self) -> str: ...


def open_pictures(path: Path, size: int | None) -> Pictures:
    """An npz, or a source of images; `size` cuts the latter to a square."""
    if path.suffix.lower() == ".npz":
        if size is not None:
            raise UserError(
                f"{path}: --size is for folders; the images of an npz stay as they are."
            )
        return NpzImages(path)
    return SourcePictures(open_images(path), size)


class SourcePictures:
    """Files, decoded by several threads; all of one size, or cut to one."""

    def __init__(self, source: ImageSource, size: int | None):
        self._source, self._size = source, size

    def __len__(self) -> int:
        return len(self._source)

    @property
    def labels(self) -> Int64[np.ndarray, " n"] | None:
        found = getattr(self._source, "labels", None)
        return None if found is None else found.astype(np.int64)

    def batches(self, size: int, *, start: int = 0) -> Iterator[Any]:
        shape: tuple[int, ...] | None = None
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for first in range(start, len(self), size):
                found = list(pool.map(self._read, range(first, min(first + size, len(self)))))
                for name, image in found:
                    shape = image.shape if shape is None else shape
                    if image.shape != shape:
                        raise UserError(
                            f"{name} is {image.shape[0]} x {image.shape[1]}, others are "
                            f"{shape[0]} x {shape[1]}: images must have one size. --size 256 cuts "
                            "them as ADM does."
                        )
                yield np.stack([image for _, image in found])

    def digest(self) -> str:
        """Over names and sizes of files, what is in some of them, and `--size`."""
        return f"{self._source.digest()} {self._content} {self._size}"

    @cached_property
    def _content(self) -> str:
        return sample_digest(self._source)

    def _read(self, index: int) -> tuple[str, UInt8[np.ndarray, "h w 3"]]:
        record = self._source[index]
        image = decode_image(record.image, name=record.id)
        return record.id, image if self._size is None else center_crop(image, self._size)


def as_colour(images: UInt8[np.ndarray, "b h w c"]) -> Batch:
    """Grey ones with three equal channels."""
    return images if images.shape[3] == 3 else np.repeat(images, 3, axis=3)


def label_balance(
    labels: Int64[np.ndarray, " n"] | None, count: int | None = None
) -> dict[str, int] | None:
    """How many classes the first `count` images have, and the fewest and the most of one.

    >>> label_balance(np.array([0, 0, 3]))
    {'classes': 2, 'fewest': 1, 'most': 2}
    """
    if labels is None:
        return None
    counts = np.unique(labels[:count], return_counts=True)[1]
    return {"classes": len(counts), "fewest": int(counts.min()), "most": int(counts.max())}


__all__ = ["DataError", "Pictures", "as_colour", "label_balance", "open_pictures"]
