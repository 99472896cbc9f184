"""Arrays as zarr 3 by tensorstore: out to the host, into files, and back onto any mesh."""

import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jaxtyping import PyTree

from .errors import CheckpointError, reason

_CHUNK = 2**26  # bytes: chunks are compressed, checked and read side by side
_CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 1}},
    {"name": "crc32c"},  # of the compressed bytes: last, so that it is the end of the file
]


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The arrays of a tree by their paths, random keys as the integers they are made of.

    **Raises** `ValueError` for a leaf that is not an array.
    """
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path) or "state"
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
            raise ValueError(f"Checkpoints: {name} is a {type(leaf).__name__}, not an array.")
        named[name] = _key_data(leaf) if is_key(leaf) else leaf
    return named


def _key_data(key: Any) -> Any:
    if isinstance(key, jax.Array):
        return jax.random.key_data(key)
    data = jax.eval_shape(jax.random.key_data, key)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


def is_key(array: Any) -> bool:
    """Whether it is a random key, or an array of them."""
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def key_like(data: jax.Array | np.ndarray, like: Any) -> jax.Array:
    """A random key of the integers it is made of, of the same kind as another one."""
    kinds = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(jnp.asarray(data), impl=kinds[0])


def on_host(arrays: dict[str, Any]) -> list[tuple[dict[str, Any], list[Any]]]:
    """For each array what describes it, and copies of what this process writes: `(index, values)`.

    Of all processes one writes a shard, however often it lies on devices.
    """
    for array in arrays.values():
        if isinstance(array, jax.Array):
            array.copy_to_host_async()
    copies = []
    for k, array in enumerate(arrays.values()):
        if isinstance(array, jax.Array):
            chunk = array.sharding.shard_shape(array.shape)
            shards = [s for s in array.addressable_shards if s.replica_id == 0]
            shards = [(shard.index, np.array(shard.data)) for shard in shards]
        else:
            chunk = array.shape
            shards = [((), np.array(array))] if jax.process_index() == 0 else []
        entry = {
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "chunk": _divided(chunk, array.dtype.itemsize),
            "folder": str(k),
        }
        copies.append((entry, shards))
    return copies


def _divided(chunk: tuple[int, ...], itemsize: int) -> list[int]:
    """A chunk of at most `_CHUNK` bytes, if halving goes that far, that divides the given one."""
    divided = [max(1, size) for size in chunk]
    for axis in range(len(divided)):
        while math.prod(divided) * itemsize > _CHUNK and divided[axis] % 2 == 0:
            divided[axis] //= 2
    return divided


def write_arrays(folder: Path, arrays: list[tuple[dict[str, Any], list[Any]]]) -> None:
    """This process's shards; process 0 also writes the description of each array."""
    first = jax.process_index() == 0
    opening = [_open(folder, entry, create=first) for entry, _ in arrays]
    _wait(opening)
    writing = [
        opened.result()[index].write(values, can_reference_source_data_indefinitely=True)
        for opened, (_, shards) in zip(opening, arrays, strict=True)
        for index, values in shards
    ]
    _wait(writing)


def _wait(futures: list[Any]) -> None:
    """Until all have ended, also after an error: the folder may be deleted next."""
    errors = [future.exception() for future in futures]
    for error in filter(None, errors):
        raise error


def read_arrays(
    folder: Path, entries: dict[str, dict[str, Any]], wanted: dict[str, Any]
) -> dict[str, Any]:
    """The arrays of a checkpoint, placed as those wanted; of each only this process's part."""
    opening = {name: _open(folder, entries[name], create=False) for name in wanted}
    parts: dict[str, dict[str, Any]] = {}
    try:
        for name, like in wanted.items():
            sharding, stored = getattr(like, "sharding", None), opening[name].result()
            indices = sharding.addressable_devices_indices_map(like.shape) if sharding else {0: ()}
            distinct = {str(index): index for index in indices.values()}
            parts[name] = {text: stored[index].read() for text, index in distinct.items()}
        for read in parts.values():
            read |= {text: future.result() for text, future in read.items()}
    except ValueError as error:  # tensorstore's, whatever is wrong
        raise CheckpointError(f"{folder}: {reason(error)}.") from error
    return {name: _placed(like, parts[name]) for name, like in wanted.items()}


def _placed(like: Any, parts: dict[str, np.ndarray]) -> Any:
    if getattr(like, "sharding", None) is None:
        return parts["()"]
    callback = lambda index: parts[str(index)]
    return jax.make_array_from_callback(like.shape, like.sharding, callback, dtype=like.dtype)


def check_folder(folder: Path) -> None:
    """Refuses a folder in which tensorstore cannot keep a checkpoint.

    It takes a backslash for a slash, and so writes elsewhere, and paths are UTF-8.

    **Raises** `CheckpointError`.

    >>> check_folder(Path("runs/mnist"))
    """
    path = os.path.realpath(folder)
    try:
        path.encode()
    except UnicodeEncodeError:
        problem = "is no UTF-8"
    else:
        if "\\" not in path:
            return
        problem = "has a backslash"
    raise CheckpointError(
        f"{folder}: no checkpoint can be kept there: the name {problem}. Use another folder."
    )


def _open(folder: Path, entry: dict[str, Any], *, create: bool) -> Any:
    """An array in its folder; without `create`, what describes it there is not looked at."""
    chunks = {"name": "regular", "configuration": {"chunk_shape": entry["chunk"]}}
    metadata = {"shape": entry["shape"], "data_type": entry["dtype"], "chunk_grid": chunks}
    check_folder(folder)
    spec = {
        "driver": "zarr3",
        # tensorstore refuses ".." in a path.
        "kvstore": {"driver": "file", "path": f"{os.path.realpath(folder / entry['folder'])}/"},
        "metadata": metadata | {"codecs": _CODECS},
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,  # a chunk that is not there is an error, not zeros
    }
    return ts.open(spec, create=True) if create else ts.open(spec, open=True, assume_metadata=True)
