"""What identifies the arrays of a tree."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


def digest(tree: PyTree) -> str:
    """SHA-256 over the paths, shapes, dtypes and bytes of a tree's arrays, fetched to the host.

    Two trees have the same digest exactly if they are equal bit for bit, on whatever devices they
    are. Arrays that are divided over several processes are gathered: then all of them call this.

    >>> digest({"a": np.zeros(2)}) == digest({"a": -np.zeros(2)})
    False
    """
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = _on_host(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _on_host(leaf: object) -> np.ndarray:
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if not leaf.is_fully_addressable:
            from jax.experimental import multihost_utils

            leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
