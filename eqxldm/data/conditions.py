"""Conditions: what a network is told of an image, as arrays of fixed shapes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32, PyTree

from .errors import DataError
from .image_source import ImageRecord, ImageSource

Condition = Callable[[ImageRecord], Any]
"""`condition(record)`: a PyTree of numbers and arrays, of the same shapes for every record, or
`None`. Worker processes get it pickled: a function of a module, or an object with `__call__`."""

START, PADDING = 256, 0


def label_condition(record: ImageRecord) -> Int32[np.ndarray, ""]:
    """The label, an int32.

    >>> label_condition(ImageRecord(b"...", "dog/1.png", label=1))
    array(1, dtype=int32)
    """
    if record.label is None:
        raise DataError(
            f"{record.id}: has no label, which label_condition needs. Put the images into one "
            "folder for each class, or ask for condition=no_condition (unconditional) or "
            "condition=caption_bytes(...)."
        )
    return np.array(record.label, np.int32)


def no_condition(record: ImageRecord) -> None:
    """None: for unconditional models.

    >>> no_condition(ImageRecord(b"...", "1.png"))
    """
    return None


@dataclass(frozen=True)
class CaptionBytes:
    """A caption as ids of bytes; `caption_bytes` makes it. `tokens` does the same with any text."""

    max_length: int

    def __call__(self, record: ImageRecord) -> Int32[np.ndarray, " n"]:
        if record.caption is None:
            raise DataError(
                f"{record.id}: has no caption, which caption_bytes needs. Put captions.json "
                "({file: caption}) or metadata.jsonl (file_name, text) beside the images, or ask "
                "for another condition."
            )
        return self.tokens(record.caption)

    def tokens(self, text: str) -> Int32[np.ndarray, " n"]:
        """The ids of a text; those of `""` are a start token alone, a caption that says nothing."""
        content = self._read(text)
        ids = np.full(self.max_length, PADDING, np.int32)
        ids[0] = START
        ids[1 : 1 + len(content)] = np.frombuffer(content, np.uint8)
        return ids

    def cut(self, text: str) -> str:
        """The end of a text that finds no room.

        >>> CaptionBytes(6).cut("a catfish")
        'fish'
        """
        return text.encode("utf-8", "replace")[len(self._read(text)) :].decode("utf-8", "ignore")

    def _read(self, text: str) -> bytes:
        content = text.replace("\0", " ").encode("utf-8", "replace")[: self.max_length - 1]
        # What is cut off in the middle of a character goes as a whole.
        return content.decode("utf-8", "ignore").encode()


def caption_bytes(max_length: int) -> CaptionBytes:
    """The caption's UTF-8 bytes: int32 ids `(max_length,)`.

    The first id is 256, the start; then come the bytes, 1 to 255; the rest is 0, padding. Longer
    captions are cut between two characters. Needs no tokenizer and knows every script.

    >>> caption_bytes(6)(ImageRecord(b"...", "1.png", caption="a cat"))
    array([256,  97,  32,  99,  97, 116], dtype=int32)
    >>> caption_bytes(4).tokens("")
    array([256,   0,   0,   0], dtype=int32)
    """
    if max_length < 2:
        raise ValueError(f"caption_bytes: max_length must be at least 2, got {max_length}.")
    return CaptionBytes(max_length)


def example_condition(source: ImageSource, condition: Condition) -> PyTree[np.ndarray]:
    """The condition of the first image: what shapes all have.

    **Raises** `DataError` if the images have not got what the condition needs.
    """
    if not len(source):
        raise DataError("expected images, got a source of none.")
    record = source[0]
    return as_arrays(condition(record), record.id)


def as_arrays(condition: Any, id: str) -> PyTree[np.ndarray]:
    """Leaves as NumPy arrays, of 32 bits where Python or NumPy have 64, as in JAX.

    >>> as_arrays({"size": 3, "at": [0.5, 1.0]}, "1.png")
    {'at': [array(0.5, dtype=float32), array(1., dtype=float32)], 'size': array(3, dtype=int32)}
    """
    leaves, structure = jax.tree.flatten(condition)
    return jax.tree.unflatten(structure, [_leaf(leaf, id) for leaf in leaves])


def stack_conditions(conditions: Sequence[Any], ids: Sequence[str]) -> PyTree[np.ndarray]:
    """The conditions of a batch as one PyTree whose leaves begin with the batch's axis.

    **Raises** `DataError`, with the image's id, if one differs from the first in structure, shape
    or dtype.

    >>> stack_conditions([1, 2], ["a.png", "b.png"])
    array([1, 2], dtype=int32)
    """
    flat = [jax.tree.flatten(condition) for condition in conditions]
    first, structure = flat[0]
    columns: list[list[np.ndarray]] = [[] for _ in first]
    for (leaves, found), id in zip(flat, ids, strict=True):
        if found != structure:
            raise DataError(
                f"{id}: its condition is {found}, that of {ids[0]} is {structure}. A condition has "
                "the same structure for every image."
            )
        for column, leaf in zip(columns, leaves, strict=True):
            array = _leaf(leaf, id)
            if column and (array.shape, array.dtype) != (column[0].shape, column[0].dtype):
                raise DataError(
                    f"{id}: its condition has an array {array.dtype}{list(array.shape)}, that of "
                    f"{ids[0]} has {column[0].dtype}{list(column[0].shape)} there. Pad or cut to "
                    "one shape."
                )
            column.append(array)
    return jax.tree.unflatten(structure, [np.stack(column) for column in columns])


_NARROW = {"int64": np.int32, "uint64": np.uint32, "float64": np.float32}


def _leaf(leaf, id):  # no annotations: they would be compared for every image
    array = np.asarray(leaf)
    if array.dtype == np.int32:
        return array
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"{id}: its condition has a leaf of type {type(leaf).__name__} ({array.dtype}); needed "
            "are numbers or arrays of numbers. Turn texts into ids, as caption_bytes does."
        )
    narrow = _NARROW.get(array.dtype.name)
    if narrow is None:
        return array
    if array.dtype.kind != "f":
        limits = np.iinfo(narrow)
        if array.size and not limits.min <= array.min() <= array.max() <= limits.max:
            raise DataError(
                f"{id}: its condition has an integer that {np.dtype(narrow)} cannot hold: "
                f"{array.min()} .. {array.max()}."
            )
    return array.astype(narrow)
