"""The latent cache: posteriors of all images and, if wanted, of their mirror images, written once.

A folder with `header.json`, which says what the latents were made from, with what and how;
`latents-00000-of-00256.arrayrecord` and so on, each complete or not there; and, when all are,
`skipped.json`. A shard has a record for each image and another for each mirror image, so that one
orientation is read and not both, and a footer that says of which cache it is which shard, with the
names of its images and of those skipped. `latent_writer` writes it.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, PyTree

from ..durable import read_file
from .conditions import Condition, example_condition, label_condition
from .decode import CROP, MAX_PIXELS, Size, as_size
from .errors import DataError
from .image_source import ImageSource, sample_digest
from .sources.arrayrecord import RecordFiles

FORMAT = 2
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(jnp.bfloat16)}
_SHARDS = 256  # at most, by default

Header = dict[str, Any]


def latent_header(
    source: ImageSource,
    *,
    size: Size,
    channels: int = 3,
    shape: tuple[int, ...],
    autoencoder: str,
    shift: Sequence[float],
    scale: Sequence[float],
    condition: Condition = label_condition,
    dtype: str = "float16",
    images_per_shard: int | None = None,
    max_pixels: int = MAX_PIXELS,
    mirrored: bool = True,
) -> Header:
    """What a latent cache is made from: its `header.json`, and what `open_latents` compares.

    **Arguments**:

    - `size`: the side, or `(height, width)`, of the crop; `channels`: of the images.
    - `shape`: of a latent, channels first, `(zc, zh, zw)` or of any other rank.
    - `autoencoder`: a hash of it, as `digests.digest(eqx.filter(autoencoder, eqx.is_array))`.
    - `shift`, `scale`: a number for each latent channel, `z = (z_raw - shift) * scale`. The cache
      holds `z_raw`; they are here so that a reader with others is refused.
    - `condition(record)`: what is kept beside the latents, of dicts, lists, tuples and arrays. The
      header has its shapes and dtypes, and a hash of that of the first image.
    - `source`: the images. The header has the digest of their names and sizes, and one of their
      content (`sample_digest`), which is read for it.
    - `dtype`: of the posteriors, `"float16"` or `"bfloat16"`.
    - `images_per_shard`: what is encoded again after an interruption, at most; `None` divides the
      images into at most 256 shards of at least 1024.
    - `max_pixels`: a file with more is unreadable (`decode_image`).
    - `mirrored`: whether the mirror images are there too; digits, say, have no use for them.

    **Raises** `ValueError` for sizes that don't belong together, `DataError` if the images have not
    got what the condition needs.

    >>> from .sources.arrays import ImageArrays
    >>> two = ImageArrays(np.zeros((2, 256, 256, 3), np.uint8), np.arange(2))
    >>> header = latent_header(
    ...     two, size=256, shape=(4, 32, 32), autoencoder="e5f6", shift=[0.0] * 4, scale=[0.2] * 4
    ... )
    >>> header["size"], header["condition"], header["images_per_shard"]
    ([256, 256], {'shape': [], 'dtype': 'int32'}, 1024)
    """
    if dtype not in DTYPES:
        raise ValueError(f"latent_header: dtype must be one of {', '.join(DTYPES)}, got {dtype}.")
    if len(shift) != shape[0] or len(scale) != shape[0]:
        raise ValueError(
            f"latent_header: need a shift and a scale for each of {shape[0]} channels, got "
            f"{len(shift)} and {len(scale)}."
        )
    if images_per_shard is None:
        images_per_shard = max(1024, -(-len(source) // _SHARDS))
    if images_per_shard < 1:
        raise ValueError(f"latent_header: images_per_shard must be positive: {images_per_shard}.")
    first = example_condition(source, condition)
    return {
        "format": FORMAT,
        "autoencoder": autoencoder,
        "shift": list(map(float, shift)),
        "scale": list(map(float, scale)),
        "crop": CROP,
        "size": list(as_size(size)),
        "channels": channels,
        "max_pixels": max_pixels,
        "mirrored": mirrored,
        "shape": list(shape),
        "dtype": dtype,
        "condition": condition_schema(first),
        "first_condition": _hash_of_leaves(first),
        "source": source.digest(),
        "content": sample_digest(source),
        "class_names": list(source.class_names),
        "images": len(source),
        "images_per_shard": images_per_shard,
    }


def open_latents(folder: str | Path, expect: Mapping[str, Any] | None = None) -> "Latents":
    """The cache in a folder, complete and made as expected.

    `expect` is a header or a part of one: what a reader without the images knows.

    **Raises** `DataError` if there is no cache, if shards are missing or of another cache, or if it
    differs from what is expected, with every difference.
    """
    folder = Path(folder)
    header = read_header(folder)
    if header is None:
        raise DataError(f"{folder}: expected a latent cache, but there is no header.json in it.")
    compare_headers(folder, header, {"format": FORMAT, **(expect or {})})
    _check_header(folder, header)
    missing = [path for path in shard_paths(folder, header) if not path.exists()]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(shard_paths(folder, header))} shards are missing, "
            f"the first {missing[0].name}. Run the caching again: it writes those."
        )
    return Latents(folder, header)


class Latents:
    """A complete latent cache, at random: picklable, for any number of threads.

    `len()` counts the images that were readable; `header` says what the latents are.
    """

    def __init__(self, folder: Path, header: Header):
        self.folder, self.header = folder, header
        self._files = RecordFiles(shard_paths(folder, header))
        self._record, self._sides = record_dtype(header), sides(header)
        self._structure = jax.tree.structure(condition_template(header["condition"]))
        for k in range(len(self._files.paths)):
            read_footer(self._files, k, header, k)

    def __len__(self) -> int:
        return len(self._files) // self._sides

    def read(
        self, indices: Int[np.ndarray, " n"], flipped: Bool[np.ndarray, " n"]
    ) -> dict[str, Any]:
        """`mean` and `logvar`, `(n, *latent)`; `cond`, a PyTree of `(n, ...)`; and `index`.

        `index`, int32 `(n,)`, is the image's position in the source; it counts skipped images.

        **Raises** `ValueError` if one is to be flipped and the cache has no mirror images.
        """
        if self._sides == 1 and np.any(flipped):
            raise ValueError(f"{self.folder}: this cache has no mirror images; read without flips.")
        content = b"".join(self._files.read(self._sides * indices + flipped))
        if len(content) != len(indices) * self._record.itemsize:
            raise DataError(f"{self.folder}: its records are not those of its header; delete it.")
        records = np.frombuffer(content, self._record)
        dtype = DTYPES[self.header["dtype"]]
        column = lambda name: np.ascontiguousarray(records[name])
        leaves = [column(f"cond{k}") for k in range(self._structure.num_leaves)]
        return {
            "mean": column("mean").view(dtype),
            "logvar": column("logvar").view(dtype),
            "cond": jax.tree.unflatten(self._structure, leaves),
            "index": column("index"),
        }

    def ids(self) -> list[str]:
        """The image ids, in the order of the cache; it reads the footer of every shard."""
        return [id for footer in self._footers() for id in footer["ids"]]

    def skipped(self) -> dict[str, str]:
        """The reasons for the images left out, by id."""
        return {id: why for footer in self._footers() for id, why in footer["skipped"].items()}

    def _footers(self) -> list[dict[str, Any]]:
        count = len(self._files.paths)
        return [read_footer(self._files, k, self.header, k) for k in range(count)]


# What the writer and the reader agree on.


def sides(header: Header) -> int:
    """Records for each image: itself, and its mirror image if the cache has them."""
    return 2 if header.get("mirrored", True) else 1


def record_dtype(header: Header) -> np.dtype:
    """One orientation of one image. The floats as uint16, since NumPy has no bfloat16 field."""
    moments = (np.uint16, tuple(header["shape"]))
    leaves = jax.tree.leaves(condition_template(header["condition"]))
    conditions = [(f"cond{k}", leaf) for k, leaf in enumerate(leaves)]
    return np.dtype([("mean", *moments), ("logvar", *moments), *conditions, ("index", "<i4")])


def condition_schema(condition: Any) -> Any:
    """A condition's structure, shapes and dtypes as JSON.

    >>> condition_schema({"ids": np.zeros(77, np.int32), "size": (None,)})
    {'dict': {'ids': {'shape': [77], 'dtype': 'int32'}, 'size': {'tuple': [None]}}}
    """
    if condition is None:
        return None
    if type(condition) is dict and all(isinstance(name, str) for name in condition):
        return {"dict": {name: condition_schema(condition[name]) for name in sorted(condition)}}
    if type(condition) in (list, tuple):
        return {type(condition).__name__: [condition_schema(part) for part in condition]}
    if isinstance(condition, np.ndarray | np.generic):
        return {"shape": list(condition.shape), "dtype": condition.dtype.name}
    raise DataError(
        f"a latent cache keeps conditions of dicts with texts as names, lists, tuples and arrays, "
        f"got {type(condition).__name__}."
    )


def condition_template(schema: Any) -> Any:
    """The PyTree of a schema, its leaves NumPy dtypes that have the shapes.

    >>> condition_template({"list": [{"shape": [2], "dtype": "int32"}]})
    [dtype(('<i4', (2,)))]
    """
    if schema is None:
        return None
    if "dict" in schema:
        return {name: condition_template(part) for name, part in schema["dict"].items()}
    if "list" in schema or "tuple" in schema:
        parts = [condition_template(part) for part in schema.get("list", schema.get("tuple"))]
        return parts if "list" in schema else tuple(parts)
    return np.dtype((np.dtype(schema["dtype"]).newbyteorder("<"), tuple(schema["shape"])))


def _hash_of_leaves(condition: PyTree[np.ndarray]) -> str:
    """Tells two conditions of the same shapes apart: two tokenizers, say."""
    content = b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(condition))
    return hashlib.sha256(content).hexdigest()[:16]


def cache_id(header: Header) -> str:
    """What a shard knows its cache by: a hash of the header."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:32]


def shard_paths(folder: Path, header: Header) -> list[Path]:
    count = -(-header["images"] // header["images_per_shard"])
    return [folder / f"latents-{s:05d}-of-{count:05d}.arrayrecord" for s in range(count)]


def read_footer(files: RecordFiles, k: int, header: Header, shard: int) -> dict[str, Any]:
    """The footer of file `k`; refuses one that is not this shard of the header's cache."""
    footer: dict[str, Any] = {}
    try:
        footer = json.loads(files.footer(k))
        cache, number = footer["cache"], footer["shard"]
        ids, skipped = footer["ids"], footer["skipped"]
        texts = [*ids, *skipped, *skipped.values()]
        if not isinstance(ids, list) or not all(isinstance(text, str) for text in texts):
            cache = None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        cache, number = None, None
    if cache != cache_id(header):
        what = "is no shard of the cache of header.json, but of another one"
    elif number != shard:
        what = f"is shard {number}, and named as shard {shard}"
    else:
        return footer
    raise DataError(
        f"{files.paths[k]}: {what}. Use another folder, or delete this file and run the caching "
        "again: it writes those that are missing."
    )


def read_header(folder: Path) -> Header | None:
    path = folder / "header.json"
    try:
        header = json.loads(read_file(path))
        if not isinstance(header, dict):
            raise ValueError("no JSON object")
        return header
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read: {reason}. Delete the cache.") from error


def _check_header(folder: Path, header: Header) -> None:
    """Refuses a header whose fields make no sense, before shards are looked for by it."""
    whole = lambda n: isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**31
    shape, images, per_shard = (header.get(n) for n in ("shape", "images", "images_per_shard"))
    try:
        right = isinstance(shape, list) and all(map(whole, shape)) and math.prod(shape) < 2**31
        right = right and whole(images) and whole(per_shard) and header["dtype"] in DTYPES
        right = right and isinstance(header.get("mirrored", True), bool)
        right = right and -(-header["images"] // header["images_per_shard"]) < 10**6
        # Of numbers: anything else could not be read from bytes.
        types = jax.tree.leaves(condition_template(header["condition"]))
        right = right and all(t.base.kind in "biufV" and not t.base.hasobject for t in types)
        right = right and 0 < record_dtype(header).itemsize < 2**31
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError):
        right = False
    if not right:
        raise DataError(f"{folder / 'header.json'}: is damaged. Delete the cache, or restore it.")


def compare_headers(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    expected = json.loads(json.dumps(dict(expected)))
    differing = [name for name, value in expected.items() if found.get(name) != value]
    if "content" in differing and "content" not in found:  # a cache of an earlier version
        differing.remove("content")
    if differing:
        lines = (
            f"  {name}: it has {_short(found.get(name))}, expected {_short(expected[name])}\n"
            for name in differing
        )
        raise DataError(
            f"{folder}: this latent cache was made otherwise:\n{''.join(lines)}"
            "Use another folder, or delete this one to make it anew."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text)} characters)"
