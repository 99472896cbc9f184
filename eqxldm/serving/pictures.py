"""Pictures as PNG, and a bounded place in memory for those that clients fetch by URL."""

import io
import secrets
import threading
from collections import OrderedDict

import numpy as np


def png(image: np.ndarray) -> bytes:
    """A picture, uint8 `(h, w, 1 | 3 | 4)`, as the bytes of a PNG.

    >>> png(np.zeros((2, 2, 1), np.uint8))[1:4]
    b'PNG'
    """
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image))
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class Shelf:
    """The latest `most` pictures under names that cannot be guessed.

    >>> shelf = Shelf(1)
    >>> first, second = shelf.put(b"a"), shelf.put(b"b")
    >>> shelf.get(first), shelf.get(second)
    (None, b'b')
    """

    def __init__(self, most: int = 256):
        self._most, self._held, self._lock = most, OrderedDict(), threading.Lock()

    def put(self, data: bytes) -> str:
        """Keeps it, and drops the oldest if there are too many; returns the name."""
        name = secrets.token_urlsafe(24)
        with self._lock:
            self._held[name] = data
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        return name

    def get(self, name: str) -> bytes | None:
        with self._lock:
            return self._held.get(name)
