"""What identifies the arrays of a tree: of the same bits, and of no others, on every mesh."""

import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .devices import one_program_at_a_time

_SEEDS = (0x9E3779B9, 0x7F4A7C15)


def digest(tree: PyTree) -> str:
    """SHA-256 over the paths, shapes, dtypes and bytes of a tree's arrays, fetched to the host.

    Two training states have the same digest exactly if they are equal bit for bit.

    >>> digest({"a": np.zeros(2)}) == digest({"a": np.zeros(2)})
    True
    >>> digest({"a": np.zeros(2)}) == digest({"a": -np.zeros(2)})
    False
    """
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


def fingerprint(tree: PyTree) -> dict[str, str]:
    """Two 32-bit sums over the bits of every array, by its path, computed where the arrays are.

    With `w_i` the i-th 32-bit word (smaller elements one word each, larger ones two), `mix` the
    finaliser of MurmurHash3, which is a bijection of 32-bit words, and `c` one of two constants:

        sum_i mix(w_i ^ mix(i + c))   mod 2^32

    A changed word changes its term and so the sum; terms depend on the position; and as integer
    addition is associative, the sums are the same on every mesh and number of processes.

    **Raises** `ValueError` if a leaf is not an array, or an array on a device has complex elements
    or some of other than 1, 2, 4 or 8 bytes.

    *Source*: A. Appleby, MurmurHash3 (public domain), `fmix32`.

    >>> a, b = np.arange(4), jnp.zeros(3)
    >>> fingerprint([a, b]) == fingerprint([a.copy(), -b]), fingerprint(a) == fingerprint(a[::-1])
    (False, False)
    """
    return start_fingerprints(named_leaves(tree))()


def start_fingerprints(arrays: dict[str, Any]) -> Callable[[], dict[str, str]]:
    """Starts the fingerprints of arrays by name; calling the result waits for them."""
    started = {}
    for name, array in arrays.items():
        array = plain(array)
        if isinstance(array, jax.Array):
            sharding = array.sharding
            named = isinstance(sharding, NamedSharding)
            everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if named else None
            try:
                started[name] = _device_sums(everywhere)(array)
                if one_program_at_a_time():
                    started[name].block_until_ready()
            except TypeError:
                raise ValueError(
                    f"fingerprint: {name} is {array.dtype}, needed are real elements of 1, 2, 4 or "
                    "8 bytes: split or convert it."
                ) from None
        else:
            started[name] = _sums(np, *_host_words(array))

    def finish() -> dict[str, str]:
        found = jax.device_get(started)
        return {name: f"{a:08x}{b:08x}" for name, (a, b) in found.items()}

    return finish


@functools.cache
def _device_sums(out: NamedSharding | None) -> Callable[[jax.Array], jax.Array]:
    # One array a call: compiling takes as long as there are different shapes, not arrays.
    return jax.jit(lambda array: _sums(jnp, *_device_words(array)), out_shardings=out)


def _sums(xp: Any, words: Any, position: Any) -> Any:
    terms = [_mix(words ^ _mix(position + np.uint32(seed))) for seed in _SEEDS]
    return xp.stack([xp.sum(term, dtype=np.uint32) for term in terms])


def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _device_words(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bits as 32-bit words and their numbers, in the array's own shape and sharding."""
    if array.dtype == bool:
        words = array.astype(jnp.uint8)
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(array, unsigned)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    return words.astype(jnp.uint32), position


def _host_words(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flat = np.ascontiguousarray(array).reshape(-1)
    unsigned = {1: np.uint8, 2: np.uint16}.get(array.dtype.itemsize, np.uint32)
    words = flat.view(unsigned).astype(np.uint32)
    return words, np.arange(words.size, dtype=np.uint32)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The arrays of a tree by their paths; `ValueError` for a leaf that is none."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path) or "state"
        leaf = np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
        if not isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
            raise ValueError(f"Checkpoints: {name} is a {type(leaf).__name__}, not an array.")
        if name in named:
            raise ValueError(f"Checkpoints: two leaves have the path {name}.")
        named[name] = leaf
    return named


def is_key(array: Any) -> bool:
    """Whether it is a random key, or an array of them."""
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def plain(array: Any) -> Any:
    """A random key as the integers it is made of, which are what is written."""
    return jax.random.key_data(array) if is_key(array) else array
