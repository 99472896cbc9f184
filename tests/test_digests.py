"""Digests: of every bit, and the same wherever the array lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eqxldm.digests import digest

from checkpointing import DTYPES, place, random_array


def test_a_digest_is_the_same_on_every_mesh():
    arrays = {dtype: random_array(dtype, (4, 6)) for dtype in DTYPES}
    arrays["scalar"] = np.array(3, np.float32)
    keys = jax.random.split(jax.random.key(3), 4)
    host = digest(arrays | {"keys": np.asarray(jax.random.key_data(keys))})
    for devices, spec in [(1, P()), (2, P()), (2, P("data")), (2, P(None, "data"))]:
        placed = {name: place(array, devices, spec) for name, array in arrays.items()}
        placed["keys"] = place(keys, devices, P(*spec[:1]))
        assert digest(placed) == host


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_digest_changes_with_every_bit(dtype):
    array = random_array(dtype, (5,))
    found, flips = {digest(jnp.asarray(array))}, 0
    for byte in range(array.nbytes):
        for bit in range(1 if dtype == "bool" else 8):
            other = array.copy()
            other.view(np.uint8)[byte] ^= 1 << bit
            found.add(digest(jnp.asarray(other)))
            flips += 1
    assert len(found) == flips + 1


def test_a_digest_changes_with_shapes_names_and_order():
    a, b = jnp.arange(4.0), jnp.arange(1.0, 5.0)
    trees = [
        {"a": a, "b": b}, {"a": b, "b": a}, {"a": a, "c": b}, {"a": a, "b": b[None]}, [a, b],
        {"a": a, "b": b.astype(jnp.bfloat16)}, {"a": a[::-1], "b": b}, {"a": a},
    ]  # fmt: skip
    assert len({digest(tree) for tree in trees}) == len(trees)
