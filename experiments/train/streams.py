"""The random streams of a run by their names, all from its one seed."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STREAMS = frozenset(
    """classifier/model classifier/step classifier/data
    autoencoder/model autoencoder/step autoencoder/data autoencoder/statistics discriminator/model
    diffusion/model diffusion/step diffusion/data images/step images/data
    sound/model sound/step sound/data sound/drawn
    digits/model digits/step digits/data clips/model clips/step clips/data prediction longer
    masked/model masked/step masked/data twin/model twin/step twin/data
    samples samples/known evaluation reference pictures/forward pictures/reverse""".split()
)
LARGEST_SEED = 2**64 - 1


def stream_key(seed: int, name: str) -> Any:
    """The key of a stream: `fold_in(key(seed), hash(name))`.

    The seed is the 64 bits of the key, so that each from 0 to 2^64 - 1 is one of its own. For one
    key `fold_in` is a bijection, so the streams of a seed differ because the hashes of the names
    do.

    >>> bool(stream_key(0, "samples") == stream_key(2**32, "samples"))
    False
    """
    number = stream_number(name)
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"stream_key: a seed must lie in [0, 2^64 - 1], got {seed}.")
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    key = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    return jax.random.fold_in(key, number)


def stream_number(name: str) -> int:
    """The number of a stream, a hash of its name."""
    if name not in STREAMS:
        raise ValueError(f"stream_key: {name!r} is not one of {', '.join(sorted(STREAMS))}.")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


def stream_seed(seed: int, name: str) -> int:
    """The same as an integer below 2^31, for the shuffling of data."""
    return int(jax.random.key_data(stream_key(seed, name))[-1]) >> 1


def stream_order(seed: int, name: str, n: int) -> np.ndarray:
    """The numbers below `n` in a random order."""
    return np.random.default_rng(stream_seed(seed, name)).permutation(n)
