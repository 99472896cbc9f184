"""Parquet shards as the Hugging Face hub publishes image datasets."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from .idx import DataError
from .records import ImageRecord, check_classes, checked_index

_GROUPS = 2  # row groups kept decoded: enough to read in order


class ImageParquet:
    """Parquet files with the columns `image` (`{bytes, path}`) and `label` (an integer).

    `path` is one file, or a folder with files in it or in its `data/`; of a folder with several
    splits, `train-*.parquet` is taken. Class names come from the schema's Hugging Face metadata,
    otherwise they are the labels' numbers. A whole row group is decoded to read one image, so that
    reading in order is fast and random access is not: `write_array_record` converts.

    **Raises** `DataError` without pyarrow, the columns, or labels of two classes, or if a file is
    damaged.

    >>> import io, tempfile
    >>> import pyarrow as pa, pyarrow.parquet
    >>> images = [{"bytes": b"...", "path": None}] * 2
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = pa.table({"image": images, "label": [0, 1]})
    ...     pa.parquet.write_table(table, f"{folder}/train-00000-of-00001.parquet")
    ...     ImageParquet(folder)[1]
    ImageRecord(image=b'...', label=1, id='train-00000-of-00001.parquet:1')
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files = _shards(self.path)
        groups: list[tuple[int, int, int]] = []  # file, row group, its first row in the file
        rows: list[int] = []
        labels: list[np.ndarray] = []
        names: list[str] | None = None
        for k, file in enumerate(self._files):
            opened = _open(file)
            schema = opened.schema_arrow
            missing = {"image", "label"} - set(schema.names)
            if missing:
                raise DataError(
                    f"{file}: expected the columns image and label, got {', '.join(schema.names)}."
                )
            names = names or _class_names(schema)
            labels.append(_labels(file, opened))
            first = 0
            for g in range(opened.num_row_groups):
                groups.append((k, g, first))
                rows.append(opened.metadata.row_group(g).num_rows)
                first += rows[-1]
        self._labels = np.concatenate(labels)
        self._groups = groups
        self._starts = np.cumsum([0, *rows])
        found = int(self._labels.max(initial=-1)) + 1
        self._class_names = tuple(names or map(str, range(found)))
        if found > len(self._class_names):
            raise DataError(
                f"{self.path}: label {found - 1} has no name: there are {len(self._class_names)}."
            )
        counts = np.bincount(self._labels, minlength=len(self._class_names)).tolist()
        check_classes(str(self.path), self._class_names, counts)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._class_names

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: SupportsIndex) -> ImageRecord:
        i = checked_index(index, len(self))
        at = int(np.searchsorted(self._starts, i, side="right")) - 1
        k, group, first = self._groups[at]
        file, row = self._files[k], i - int(self._starts[at])
        id = f"{file.name}:{first + row}"
        image = _row_group(file, group)[row].as_py()
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes):
            raise DataError(
                f"{id}: expected the bytes of an image, got "
                + ("only a path. Save the dataset with its images embedded." if image else "null.")
            )
        return ImageRecord(content, int(self._labels[i]), id)

    def digest(self) -> str:
        """Over the shards' names and sizes and all labels: image sizes would need all images."""
        shards = [(file.name, file.stat().st_size) for file in self._files]
        sha = hashlib.sha256(repr((self._class_names, shards)).encode())
        sha.update(self._labels.tobytes())
        return sha.hexdigest()


def _shards(path: Path) -> list[Path]:
    if path.is_file():
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
    try:
        return pq.ParquetFile(file, memory_map=True)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"{file}: cannot be read as parquet: {error}.") from error


def _labels(file: Path, opened: Any) -> np.ndarray:
    column = opened.read(columns=["label"])["label"]
    try:
        labels = column.to_numpy()
        if column.null_count or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
            raise ValueError
    except ValueError:
        raise DataError(
            f"{file}: expected an integer of at least 0 as every label, got {column.type}"
            f"{' with nulls' if column.null_count else ''} or -1, as unlabelled test splits have."
        ) from None
    return labels.astype(np.int32)


@functools.lru_cache(maxsize=_GROUPS)
def _row_group(file: Path, group: int) -> Any:
    try:
        return _open(file).read_row_group(group, columns=["image"])["image"]
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: row group {group} cannot be read: {error}.") from error


def _class_names(schema: Any) -> list[str] | None:
    """The names of a `ClassLabel`, from what the datasets library writes into the schema."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return list(map(str, features["label"]["names"]))
    except (TypeError, KeyError, ValueError):
        return None
