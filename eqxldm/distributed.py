"""Several processes: agreeing, waiting, whole copies of divided arrays, and shares of work.

All processes call each of these in the same order; with one process nothing is sent.
"""

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree, Shaped

from .sharding import make_mesh


def is_primary() -> bool:
    """Whether this is process 0, which writes and prints.

    >>> is_primary()
    True
    """
    return jax.process_index() == 0


def from_primary(answer: bool) -> bool:
    """What process 0 says, in every process.

    >>> from_primary(True)
    True
    """
    if jax.process_count() == 1:
        return answer
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(answer)))


def first_with(found: bool) -> int | None:
    """The first process in which `found` is true; None if it is true nowhere.

    >>> first_with(False) is None, first_with(True)
    (True, 0)
    """
    if jax.process_count() == 1:
        return 0 if found else None
    from jax.experimental import multihost_utils

    answers = np.ravel(multihost_utils.process_allgather(np.int32(found)))
    return int(answers.argmax()) if answers.any() else None


def barrier(name: str) -> None:
    """Waits until every process is here.

    >>> barrier("latents")
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def local_mesh() -> Mesh:
    """This process's devices, for what each process does on its own.

    >>> local_mesh().size == jax.local_device_count()
    True
    """
    return make_mesh(devices=jax.local_devices())


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """The tree with a copy of every array on each device of a mesh of this process.

    >>> replicate({"w": jax.numpy.ones(3)}, local_mesh())["w"].sharding.is_fully_replicated
    True
    """
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda a: jax.device_put(a, whole) if eqx.is_array(a) else a, tree)


def all_gather(tree: PyTree, mesh: Mesh) -> PyTree:
    """The arrays of a tree that is divided over `mesh`, whole on each device of this process.

    >>> all_gather({"w": jax.numpy.ones(3)}, make_mesh())["w"].shape
    (3,)
    """
    arrays, rest = eqx.partition(tree, eqx.is_array)
    whole = jax.jit(lambda t: t, out_shardings=NamedSharding(mesh, PartitionSpec()))(arrays)
    here = NamedSharding(local_mesh(), PartitionSpec())

    def local(array: jax.Array) -> jax.Array:
        parts = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, here, parts)

    return eqx.combine(jax.tree.map(local, whole), rest)


def own_part(n: int) -> range:
    """This process's part of `n` items; `gather_parts` puts the parts together again.

    >>> own_part(3)
    range(0, 3)
    """
    each = -(-n // jax.process_count())
    first = min(jax.process_index() * each, n)
    return range(first, min(first + each, n))


def gather_parts(part: Shaped[np.ndarray, "m ..."], n: int) -> Shaped[np.ndarray, "n ..."]:
    """The parts of all processes, each with its `own_part(n)`.

    >>> gather_parts(np.arange(3), 3).tolist()
    [0, 1, 2]
    """
    count = jax.process_count()
    if count == 1:
        return part
    from jax.experimental import multihost_utils

    each = -(-n // count)
    padded = np.pad(part, [(0, each - len(part))] + [(0, 0)] * (part.ndim - 1))
    parts = np.asarray(multihost_utils.process_allgather(padded))
    sizes = [max(0, min(each, n - k * each)) for k in range(count)]
    return np.concatenate([p[:size] for p, size in zip(parts, sizes, strict=True)])
