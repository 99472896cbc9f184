"""Meshes and placement of states and batches on devices."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh with one axis, `data`, over the first `devices` devices (all by default).

    **Raises** `ValueError` if there are not that many.

    >>> data_mesh(1).shape["data"]
    1
    """
    found = jax.devices()
    count = len(found) if devices is None else devices
    if not 1 <= count <= len(found):
        raise ValueError(f"data_mesh: asked for {count} devices, {len(found)} are there.")
    return Mesh(np.array(found[:count]), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Places a copy of every array on every device of the mesh.

    >>> replicate(np.ones(3), data_mesh(1)).shape
    (3,)
    """
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Places every array divided over the mesh along its first axis.

    **Raises** `ValueError` if an array's first axis does not divide by the number of devices.

    >>> shard_batch(np.ones((4, 3)), data_mesh(1)).shape
    (4, 3)
    """
    count = mesh.shape["data"]
    for leaf in jax.tree.leaves(tree):
        if leaf.shape[0] % count:
            raise ValueError(
                f"shard_batch: a batch of {leaf.shape[0]} does not divide over {count} devices."
            )
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))
