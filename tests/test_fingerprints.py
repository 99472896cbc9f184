"""Fingerprints: as defined, of every bit, the same wherever the array lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from eqxldm import fingerprints
from eqxldm.fingerprints import fingerprint

from checkpointing import DTYPES, mesh, place, random_array


def by_definition(words):
    def mix(x):
        x = ((x ^ x >> 16) * 0x85EBCA6B) % 2**32
        x = ((x ^ x >> 13) * 0xC2B2AE35) % 2**32
        return x ^ x >> 16

    sums = [
        sum(mix(int(word) ^ mix((i + seed) % 2**32)) for i, word in enumerate(words)) % 2**32
        for seed in (0x9E3779B9, 0x7F4A7C15)
    ]
    return f"{sums[0]:08x}{sums[1]:08x}"


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_fingerprints_are_as_defined_on_the_host_and_on_devices(dtype):
    array = random_array(dtype)
    unsigned = {1: np.uint8, 2: np.uint16}.get(array.dtype.itemsize, np.uint32)
    expected = by_definition(array.reshape(-1).view(unsigned))
    assert fingerprint({"a": array}) == {"['a']": expected}
    with jax.enable_x64(dtype == "float64"):
        assert fingerprint({"a": jnp.asarray(array)}) == {"['a']": expected}


def test_a_fingerprint_is_the_same_on_every_mesh():
    arrays = {dtype: random_array(dtype, (4, 6)) for dtype in DTYPES}
    arrays["scalar"] = np.array(3, np.float32)
    keys = jax.random.split(jax.random.key(3), 4)
    host = fingerprint(arrays | {"keys": np.asarray(jax.random.key_data(keys))})
    for devices, spec in [(1, P()), (2, P()), (2, P("data")), (2, P(None, "data"))]:
        placed = {name: place(array, devices, spec) for name, array in arrays.items()}
        placed["keys"] = place(keys, devices, P(*spec[:1]))
        assert fingerprint(placed) == host
    mixed = {"here": jnp.ones(3), "there": jax.device_put(np.ones(3), jax.devices()[1])}
    mixed["both"] = jax.device_put(np.ones(4), NamedSharding(mesh(2), P("data")))
    assert len(fingerprint(mixed)) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fingerprint_changes_with_every_bit(dtype):
    array = random_array(dtype, (5,))
    found = {tuple(fingerprint(jnp.asarray(array)).values())}
    flips = 0
    for byte in range(array.nbytes):
        for bit in range(1 if dtype == "bool" else 8):
            other = array.copy()
            other.view(np.uint8)[byte] ^= 1 << bit
            found.add(tuple(fingerprint(jnp.asarray(other)).values()))
            flips += 1
    assert len(found) == flips + 1
    halves = [{value[:8] for (value,) in found}, {value[8:] for (value,) in found}]
    assert [len(half) for half in halves] == [flips + 1] * 2  # each sum alone sees it


def test_a_fingerprint_changes_with_the_order_of_elements_and_leaves():
    array = random_array("float32", (12,))
    before = fingerprint(jnp.asarray(array))
    for i in range(12):
        for j in range(i):
            other = array.copy()
            other[[i, j]] = other[[j, i]]
            assert fingerprint(jnp.asarray(other)) != before
    a, b = jnp.arange(3.0), jnp.arange(1.0, 4.0)
    assert fingerprint({"a": a, "b": b}) != fingerprint({"a": b, "b": a})
    # Flips that cancel in a plain sum: the highest bits of two elements.
    other = array.copy()
    other.view(np.uint32)[:2] ^= 1 << 31
    assert fingerprint(jnp.asarray(other)) != before


def test_a_fingerprint_is_compiled_once():
    traced = []
    original = fingerprints._device_words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprints, "_device_words", lambda a: traced.append(a) or original(a))
        for k in range(3):
            fingerprint(jax.device_put(np.ones(7) * k, NamedSharding(mesh(2), P())))
    assert len(traced) == 1
