"""One process or many: which one writes, waiting for each other, and whole copies of arrays."""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree, Shaped

from eqxldm.checkpoints import CheckpointError
from eqxldm.data import DataError
from eqxldm.sharding import make_mesh

from .terminal import UserError, console

GRACE = 10.0  # seconds that a process which fails waits for the others to leave with it


@dataclass(frozen=True)
class Processes:
    """The same command on many hosts, started once a host."""

    distributed: bool = False
    """Join the others through jax.distributed, which finds them on SLURM, TPU pods and GKE."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where they are not found."""
    processes: int | None = None
    """How many there are."""
    process_id: int | None = None
    """Which one this is, from 0."""


def join(options: Processes) -> None:
    """Before anything else of jax. Only process 0 prints from here on."""
    given = (options.coordinator, options.processes, options.process_id)
    if not options.distributed:
        if any(value is not None for value in given):
            raise UserError("--coordinator, --processes and --process-id need --distributed.")
        return
    if None in given and any(value is not None for value in given):
        raise UserError("give --coordinator, --processes and --process-id together, or none.")
    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--distributed: jax.distributed.initialize() failed: {reason} Where processes are not "
            "found, give --coordinator HOST:PORT --processes N --process-id I."
        ) from error
    console.quiet = not is_primary()


def leave(main: Callable[[], int]) -> NoReturn:
    """Ends this process with the exit code that `main` returns.

    At a normal end jax lets processes wait for each other, five minutes at most. One that fails
    waits ten seconds: the others may be waiting for it in a step, and learn that it is gone when it
    is.
    """
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        if jax.distributed.is_initialized():
            print(
                "If another process stopped first, what it printed says why. The same command, on "
                "all hosts, goes on from the last checkpoint.",
                file=sys.stderr,
            )
        code = 1
    if code and jax.distributed.is_initialized():
        for signum in (signal.SIGINT, signal.SIGTERM):  # it is stopping
            signal.signal(signum, signal.SIG_IGN)
        leaving = threading.Thread(target=_shutdown, daemon=True)
        leaving.start()
        leaving.join(GRACE)
        if leaving.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def _shutdown() -> None:
    with contextlib.suppress(RuntimeError):  # others have gone already
        jax.distributed.shutdown()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Checks of all processes, or of one for all: where one raises, every other one does too."""
    error = None
    try:
        yield
    except (UserError, DataError, CheckpointError, OSError) as raised:
        error = raised
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = np.ravel(multihost_utils.process_allgather(np.int32(error is not None)))
        if error is None and failed.any():
            raise UserError(f"process {int(failed.argmax())} stopped; what it printed says why.")
    if error is not None:
        raise error


def is_primary() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def agreed(answer: bool) -> bool:
    """What process 0 says, in every process."""
    if jax.process_count() == 1:
        return answer
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(answer)))


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def local_mesh() -> Mesh:
    """This process's devices, for what each process does on its own."""
    return make_mesh(devices=jax.local_devices())


def copied(tree: PyTree, mesh: Mesh) -> PyTree:
    """The tree with a copy of every array on each device of a mesh of this process."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda a: jax.device_put(a, whole) if eqx.is_array(a) else a, tree)


def gathered(tree: PyTree, mesh: Mesh) -> PyTree:
    """The arrays of a tree that is divided over `mesh`, whole on each device of this process.

    All processes call it.
    """
    arrays, rest = eqx.partition(tree, eqx.is_array)
    whole = jax.jit(lambda t: t, out_shardings=NamedSharding(mesh, PartitionSpec()))(arrays)
    here = NamedSharding(local_mesh(), PartitionSpec())

    def local(array: jax.Array) -> jax.Array:
        parts = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, here, parts)

    return eqx.combine(jax.tree.map(local, whole), rest)


def own_share(n: int) -> range:
    """This process's part of `n` items; `concatenated` puts the parts together again."""
    each = -(-n // jax.process_count())
    first = min(jax.process_index() * each, n)
    return range(first, min(first + each, n))


def concatenated(part: Shaped[np.ndarray, "m ..."], n: int) -> Shaped[np.ndarray, "n ..."]:
    """The parts of all processes, each with its `own_share(n)`."""
    count = jax.process_count()
    if count == 1:
        return part
    from jax.experimental import multihost_utils

    each = -(-n // count)
    padded = np.pad(part, [(0, each - len(part))] + [(0, 0)] * (part.ndim - 1))
    parts = np.asarray(multihost_utils.process_allgather(padded))
    sizes = [max(0, min(each, n - k * each)) for k in range(count)]
    return np.concatenate([p[:size] for p, size in zip(parts, sizes, strict=True)])
