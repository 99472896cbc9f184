"""Images for the smoke run, and images as arrays for measuring."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from eqxldm.data import DataError, ImageSource, decode_and_crop

Images = UInt8[np.ndarray, "n h w c"]
SHAPES = ("circle", "cross", "square", "triangle")
SIDE, EACH = 40, 100


def make_shapes(folder: Path) -> None:
    """Class folders of JPEGs with a coloured shape on a dark ground, if they are not there."""
    if folder.exists():
        return
    from PIL import Image

    rng = np.random.default_rng(0)
    part = folder.with_name(f".{folder.name}-part")
    shutil.rmtree(part, ignore_errors=True)
    for name in SHAPES:
        (part / name).mkdir(parents=True)
        for k in range(EACH):
            Image.fromarray(_shape(name, rng)).save(part / name / f"{k:03d}.jpg", quality=95)
    os.replace(part, folder)


def _shape(name: str, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    radius = rng.uniform(0.26, 0.36) * SIDE
    x0, y0 = rng.uniform(0.44, 0.56, 2) * SIDE
    x, y = (x - x0) / radius, (y - y0) / radius
    inside = {
        "circle": x * x + y * y < 1,
        "cross": np.minimum(abs(x), abs(y)) < 0.3,
        "square": np.ones_like(x, bool),
        "triangle": abs(x) < (y + 1) / 2,
    }[name] & (np.maximum(abs(x), abs(y)) < 1)
    light, dark = (
        rng.permutation(np.array([255, rng.integers(40, 160), 40])),
        rng.integers(0, 40, 3),
    )
    return np.where(inside[..., None], light, dark).astype(np.uint8)


def decoded(
    source: ImageSource, indices: Int[np.ndarray, " n"], size: int, *, strict: bool
) -> Iterator[tuple[Images, Int[np.ndarray, " m"]]]:
    """The images at `indices`, some hundred at a time, with their labels.

    Unreadable ones are left out, or raise `DataError` if `strict`.
    """

    def read(index: int) -> tuple[np.ndarray, int | None] | None:
        record = source[index]
        try:
            return decode_and_crop(record.image, size, name=record.id), record.label
        except DataError:
            if strict:
                raise
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i in range(0, len(indices), 256):
            found = [r for r in pool.map(read, indices[i : i + 256].tolist()) if r is not None]
            if found:
                images, labels = zip(*found, strict=True)
                yield np.stack(images), np.array(labels, np.int32)


def shrunk(images: Images, size: int) -> Images:
    """Each image as means of blocks, `size` pixels wide; `size` divides the side.

    >>> shrunk(np.full((1, 4, 4, 3), 7, np.uint8), 2).shape
    (1, 2, 2, 3)
    """
    n, h, w, c = images.shape
    if h == size:
        return images
    blocks = images.reshape(n, size, h // size, size, w // size, c)
    return np.rint(blocks.mean((2, 4), dtype=np.float32)).astype(np.uint8)
