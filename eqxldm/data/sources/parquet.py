"""Parquet shards as the Hugging Face hub publishes image datasets."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from ...durable import check_is_file
from ..errors import DataError
from ..image_source import ImageRecord, Strings, check_classes, checked_index

_GROUPS = 2  # row groups kept decoded: enough to read in order
_CAPTIONS = ("text", "caption")


class ImageParquet:
    """Parquet files with the column `image` (`{bytes, path}`), and `label`, `text` or none.

    `label` is an integer; labels of one class alone are none. `text`, or `caption`, is a text for
    each image. `path` is one file, or a folder with files in it or in its `data/`; of a folder with
    several splits, `train-*.parquet` is taken. Class names come from the schema's Hugging Face
    metadata, otherwise they are the labels' numbers. A whole row group is decoded to read one
    image, so that reading in order is fast and random access is not: `write_array_record` converts.

    **Raises** `DataError` without pyarrow or the column of images, if the files differ in their
    columns, for a label that is negative, has no name or leaves classes without an image, for a
    caption that is null, or if a file is damaged.

    >>> import io, tempfile
    >>> import pyarrow as pa, pyarrow.parquet
    >>> images = [{"bytes": b"...", "path": None}] * 2
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = pa.table({"image": images, "label": [0, 1]})
    ...     pa.parquet.write_table(table, f"{folder}/train.parquet")
    ...     ImageParquet(folder)[1]
    ImageRecord(image=b'...', id='train.parquet:1', label=1, caption=None, sound=None)
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files = _shards(self.path)
        groups: list[tuple[int, int, int]] = []  # file, row group, its first row in the file
        rows: list[int] = []
        labels: list[np.ndarray] = []
        captions: list[str] = []
        names: list[str] | None = None
        columns: set[str] | None = None
        for k, file in enumerate(self._files):
            opened = _open(file)
            with _reading(file):
                schema = opened.schema_arrow
            found = {"image", "label", *_CAPTIONS} & set(schema.names)
            columns = found if columns is None else columns
            if "image" not in found or found != columns:
                raise DataError(
                    f"{file}: expected the columns {', '.join(sorted(columns | {'image'}))}, got "
                    f"{', '.join(schema.names)}."
                )
            names = names or _class_names(schema)
            if "label" in found:
                labels.append(_labels(file, opened))
            captions += _captions(file, opened, found)
            first = 0
            for g in range(opened.num_row_groups):
                groups.append((k, g, first))
                rows.append(opened.metadata.row_group(g).num_rows)
                first += rows[-1]
        self._groups = groups
        self._starts = np.cumsum([0, *rows])
        self._captions = Strings.of(captions) if captions else None
        self.has_captions = self._captions is not None
        self.labels: np.ndarray | None = None
        self.class_names: tuple[str, ...] = ()
        if labels:
            self._set_labels(np.concatenate(labels), names)

    def _set_labels(self, labels: np.ndarray, names: list[str] | None) -> None:
        most = int(labels.max()) + 1 if len(labels) else 0
        count = len(names) if names else most
        if most > count:
            raise DataError(f"{self.path}: label {most - 1} has no name: there are {count}.")
        if not names and count > len(labels) + 1000:  # before as many names are made
            raise DataError(
                f"{self.path}: label {most - 1} among {len(labels)} images: most of the {count} "
                "classes have no image. Number the classes from 0 without gaps."
            )
        counts = np.bincount(labels.astype(np.int64), minlength=count).tolist()
        class_names = tuple(names or map(str, range(count)))
        check_classes(str(self.path), class_names, counts)
        if count > 1:
            self.labels, self.class_names = labels.astype(np.int32), class_names

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: SupportsIndex) -> ImageRecord:
        i = checked_index(index, len(self))
        at = int(np.searchsorted(self._starts, i, side="right")) - 1
        k, group, first = self._groups[at]
        file, row = self._files[k], i - int(self._starts[at])
        id = f"{file.name}:{first + row}"
        with _reading(file):
            image = _row_group(file, group)[row].as_py()
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes):
            raise DataError(
                f"{id}: expected the bytes of an image, got "
                + ("only a path. Save the dataset with its images embedded." if image else "null.")
            )
        label = None if self.labels is None else int(self.labels[i])
        return ImageRecord(content, id, label, self._captions[i] if self._captions else None)

    def digest(self) -> str:
        """Over the shards' names and sizes, labels and captions: sizes would need all images."""
        shards = [(file.name, file.stat().st_size) for file in self._files]
        sha = hashlib.sha256(repr((self.class_names, shards)).encode())
        sha.update(b"" if self.labels is None else self.labels.tobytes())
        if self._captions is not None:
            sha.update(self._captions.ends.tobytes() + self._captions.joined)
        return sha.hexdigest()


def _shards(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
    if not files:
        raise DataError(f"{path}: expected *.parquet in it or in {path / 'data'}, got none.")
    splits = {file.name.split("-")[0] for file in files}
    if "train" in splits:
        files = [file for file in files if file.name.startswith("train-")]
    return files


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            "reading parquet files needs pyarrow, which is not installed: pip install "
            "'eqxldm[parquet]'."
        ) from None
    return pyarrow.parquet


def _open(file: Path) -> Any:
    pq = _pyarrow()
    with _reading(file):
        check_is_file(file)
        return pq.ParquetFile(file, memory_map=True)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Arrow raises OSError, ValueError, KeyError and others for a damaged file: one line of it."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{file}: cannot be read as parquet: {reason}.") from error


def _labels(file: Path, opened: Any) -> np.ndarray:
    with _reading(file):
        column = opened.read(columns=["label"])["label"]
    try:
        labels = column.to_numpy()
        if column.null_count or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
            raise ValueError
    except (ValueError, TypeError, NotImplementedError):  # a type that NumPy has not
        raise DataError(
            f"{file}: expected an integer of at least 0 as every label, got {column.type}"
            f"{' with nulls' if column.null_count else ''} or -1, as unlabelled test splits have."
        ) from None
    return labels


def _captions(file: Path, opened: Any, columns: set[str]) -> list[str]:
    name = next((name for name in _CAPTIONS if name in columns), None)
    if name is None:
        return []
    with _reading(file):
        captions = opened.read(columns=[name])[name].to_pylist()
    for row, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise DataError(
                f"{file}: row {row}: expected a text in the column {name}, got {caption!r}."
            )
    return captions


@functools.lru_cache(maxsize=_GROUPS)
def _row_group(file: Path, group: int) -> Any:
    with _reading(file):
        return _open(file).read_row_group(group, columns=["image"])["image"]


def _class_names(schema: Any) -> list[str] | None:
    """The names of a `ClassLabel`, from what the datasets library writes into the schema."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return list(map(str, features["label"]["names"]))
    except (TypeError, KeyError, ValueError):
        return None
