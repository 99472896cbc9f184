"""The images of a run: where they come from, batches of them, and images as arrays."""

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from eqxldm.data import DataError, ImageSource, open_emoji, open_images, open_mnist
from eqxldm.data.decode import decode_and_crop

from .config import Config
from .shapes import shapes
from .terminal import UserError, say

Images = UInt8[np.ndarray, "n h w c"]
NO_IMAGES = """no images: --images (make: IMAGES=...) is needed. It can be
  - a folder of images, or with a folder for each class, such as ImageNet's train/;
  - the same with captions.json ({file: caption}) or metadata.jsonl (file_name, text) beside them;
  - a folder of class tars (n01440764.tar, ...), or ILSVRC2012_img_train.tar, which holds them;
  - .parquet files with the columns image and label or text, or .arrayrecord files.
All stages on images that the run makes itself, in two minutes on two cores:
  make train-imagenet SMOKE=1"""


@functools.cache
def open_folder(path: Path) -> ImageSource:
    """`open_images`, once: listing a million files takes a while."""
    return open_images(path.expanduser())


def open_source(config: Config, images: Path | None) -> ImageSource:
    """The training images."""
    data = config.pictures.data
    if data == "shapes" and images is None:
        return shapes()
    if data in ("mnist", "fashion-mnist"):
        return open_mnist(data, images, split="train", log=say)
    if data == "emoji":
        return open_emoji(images, split="train", log=say)
    if images is None:
        raise UserError(NO_IMAGES)
    return open_folder(images)


def open_test(
    config: Config, images: Path | None, test: Path | None, source: ImageSource
) -> ImageSource | None:
    """The held-out images, if there are any, of the same classes."""
    data = config.pictures.data
    if test is None and data in ("mnist", "fashion-mnist"):
        return open_mnist(data, images, split="test", log=say)
    if test is None and data == "emoji":
        return open_emoji(images, split="test", log=lambda line: None)
    if test is None:
        return None
    found = open_images(test)
    if found.class_names != source.class_names:
        raise UserError(
            f"--test-images {test}: its {len(found.class_names)} classes are not the "
            f"{len(source.class_names)} of --images."
        )
    return found


def decoded(
    source: ImageSource,
    indices: Int[np.ndarray, " n"],
    config: Config,
    *,
    strict: bool,
    at_once: int = 256,
) -> Iterator[tuple[Images, Int[np.ndarray, " n"] | None]]:
    """The images at `indices` and their labels, if they have any, some at a time.

    Unreadable ones are left out, or raise `DataError` if `strict`.
    """
    channels = config.pictures.channels

    def read(index: int) -> tuple[np.ndarray, int | None] | None:
        record = source[index]
        try:
            image = decode_and_crop(record.image, config.size, channels, name=record.id)
        except DataError:
            if strict:
                raise
            return None
        return image, record.label

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i in range(0, len(indices), at_once):
            part = indices[i : i + at_once].tolist()
            found = [r for r in pool.map(read, part) if r is not None]
            if found:
                images, labels = zip(*found, strict=True)
                yield np.stack(images), np.array(labels, np.int32) if source.class_names else None


def count_readable(
    source: ImageSource,
    indices: Int[np.ndarray, " n"],
    config: Config,
    *,
    enough: int,
    strict: bool,
) -> int:
    """How many of these images can be read, where fewer than `enough` can; else at least that."""
    found = 0
    for i in range(0, len(indices), enough):
        for images, _ in decoded(source, indices[i : i + enough], config, strict=strict):
            found += len(images)
        if found >= enough:
            break
    return found
