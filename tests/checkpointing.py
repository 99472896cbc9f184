"""Small states to save, and the files that a checkpoint leaves."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from eqxldm.checkpoints import Checkpoints

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "uint8", "bool"]
LIKE = {"w": np.zeros((4, 6), np.float32)}


def state(k):
    """A state that differs from step to step."""
    return {"w": np.random.default_rng(k).normal(size=(4, 6)).astype(np.float32)}


def mesh(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def place(array, devices, spec):
    return jax.device_put(array, NamedSharding(mesh(devices), spec if array.ndim else P()))


def saved(folder, *steps, **options):
    with Checkpoints(folder, keep=100, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step))
    return folder


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def random_array(dtype, shape=(3, 4), seed=0):
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, jnp.dtype(dtype).itemsize))
    if dtype == "bool":
        return (bits[..., 0] % 2).astype(bool)
    return bits.astype(np.uint8).view(jnp.dtype(dtype))[..., 0]
