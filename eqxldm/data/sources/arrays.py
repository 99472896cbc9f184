"""Images in memory."""

import hashlib
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int32, Integer, UInt8

from ..errors import DataError
from ..image_source import ImageRecord, checked_index


class ImageArrays:
    """One array of images as a source: any channels, labelled, with captions, or neither.

    **Arguments**:

    - `images`: uint8 `(n, h, w, c)`.
    - `labels`: integers `(n,)`, `0 .. len(class_names) - 1`. Without names there are as many
      classes as the largest label says, named by their numbers.
    - `captions`: a text for each image.
    - `name`: what the ids begin with, `name/0` and so on.

    **Raises** `DataError` if the lengths differ or a label is out of range.

    >>> images = np.zeros((3, 28, 28, 1), np.uint8)
    >>> source = ImageArrays(images, np.array([0, 1, 1]), class_names=("cat", "dog"))
    >>> source[2].label, source[2].id
    (1, 'image/2')
    """

    def __init__(
        self,
        images: UInt8[np.ndarray, "n h w c"],
        labels: Integer[np.ndarray, " n"] | None = None,
        *,
        class_names: Sequence[str] = (),
        captions: Sequence[str] | None = None,
        name: str = "image",
    ):
        self.images, self.name = images, name
        self.labels: Int32[np.ndarray, " n"] | None = None
        self.captions = None if captions is None else tuple(captions)
        if self.captions is not None and len(self.captions) != len(images):
            raise DataError(
                f"{name}: expected a caption for each of {len(images)} images, got "
                f"{len(self.captions)}."
            )
        self.class_names: tuple[str, ...] = ()
        self.has_captions = self.captions is not None
        if labels is not None:
            known = len(class_names) or int(labels.max(initial=0)) + 1
            outside = np.flatnonzero((labels < 0) | (labels >= known))
            if len(outside):
                raise DataError(
                    f"{name}: expected labels from 0 to {known - 1}, got {labels[outside[0]]} at "
                    f"index {outside[0]} ({len(outside)} such labels)."
                )
            self.labels = labels.astype(np.int32)
            self.class_names = tuple(class_names) or tuple(map(str, range(known)))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: SupportsIndex) -> ImageRecord:
        i = checked_index(index, len(self.images))
        label = None if self.labels is None else int(self.labels[i])
        caption = None if self.captions is None else self.captions[i]
        return ImageRecord(self.images[i], f"{self.name}/{i}", label, caption)

    def digest(self) -> str:
        """Over the pixels too, which are at hand here."""
        labels = None if self.labels is None else self.labels.tobytes()
        about = (self.class_names, self.images.shape, self.captions)
        sha = hashlib.sha256(repr(about).encode("utf-8", "surrogatepass"))
        sha.update(b"" if labels is None else labels)
        sha.update(np.ascontiguousarray(self.images).data)
        return sha.hexdigest()
