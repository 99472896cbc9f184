"""Arrays out of a checkpoint, by orbax."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ..fingerprints import is_key
from ._about import described
from .errors import CheckpointError, reason


def read_arrays(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a checkpoint, placed and typed as those wanted."""

    def stored(array: Any) -> Any:
        if is_key(array):
            shape = jax.eval_shape(jax.random.key_data, array)
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=array.sharding)
        return ocp.utils.to_shape_dtype_struct(array)

    items = {name: stored(array) for name, array in wanted.items() if array.size}
    arrays = {name: _empty(array) for name, array in wanted.items() if not array.size}
    if items:
        arguments = ocp.args.PyTreeRestore(
            items,
            restore_args=ocp.checkpoint_utils.construct_restore_args(items),
            partial_restore=True,
        )
        try:
            with _abandoned_reads_unreported():
                # The handler itself: a checkpointer would make the processes wait for each other.
                handler = ocp.PyTreeCheckpointHandler()
                arrays |= handler.restore(epath.Path(folder), args=arguments)
        except Exception as error:  # orbax and tensorstore raise a dozen kinds
            raise CheckpointError(f"{folder}: {reason(error)}.") from error
    for name, like in wanted.items():
        if is_key(like) and like.size:
            arrays[name] = jax.random.wrap_key_data(arrays[name], impl=_key_implementation(like))
        if described(arrays[name]) != described(like):
            raise CheckpointError(f"{folder}: {name} was read as {described(arrays[name])}.")
    return arrays


def _empty(like: Any) -> Any:
    """An array without elements; orbax writes none."""
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return np.zeros(like.shape, like.dtype)
    if is_key(like):
        shape = jax.eval_shape(jax.random.key_data, like)
        data = jnp.zeros(shape.shape, shape.dtype, device=sharding)
        return jax.random.wrap_key_data(data, impl=_key_implementation(like))
    return jnp.zeros(like.shape, like.dtype, device=sharding)


def _key_implementation(like: Any) -> Any:
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like)
    return found[0]


@contextlib.contextmanager
def _abandoned_reads_unreported() -> Iterator[None]:
    """Keeps the terminal free of the reads that orbax leaves waiting when one of them fails.

    It closes their event loop, and Python reports each when it answers or is collected, with a
    traceback: pages around the line that says what is wrong. As they may come at any time later,
    after a failure the filter stays.
    """
    hook = sys.unraisablehook

    def report(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        if code is not None and "orbax" in code.co_filename:
            return
        if unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed":
            return
        hook(unraisable)

    def wanted(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "OCDBT" in str(record.exc_info[1]))

    sys.unraisablehook = report
    logging.getLogger("asyncio").addFilter(wanted)
    yield
    sys.unraisablehook = hook
    logging.getLogger("asyncio").removeFilter(wanted)
