"""The two splits of a dataset of the MNIST format."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eqxldm.data import DataError, ImageArrays, open_mnist


class Digits(NamedTuple):
    """Training and test images, with labels, as sources."""

    name: str
    train: ImageArrays
    test: ImageArrays

    @property
    def num_classes(self) -> int:
        return len(self.train.class_names)

    @property
    def train_images(self) -> np.ndarray:
        return self.train.images

    @property
    def test_images(self) -> np.ndarray:
        return self.test.images

    @property
    def test_labels(self) -> np.ndarray:
        assert self.test.labels is not None
        return self.test.labels


def load_digits(name: str, data_dir: Path | None, *, log: Callable[[str], None]) -> Digits:
    train, test = (open_mnist(name, data_dir, split=split, log=log) for split in ("train", "test"))
    sides = [source.images.shape[1:3] for source in (train, test)]
    if sides[0] != sides[1]:
        raise DataError(
            f"{data_dir or name}: the training images are {sides[0]} pixels, the test images "
            f"{sides[1]}. Needed is one size."
        )
    return Digits(name, train, test)
