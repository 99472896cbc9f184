"""What several processes agree on, so that all go the same way."""

from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from .errors import CheckpointError, CheckpointMismatch


def agreed(ok: bool) -> bool:
    """What process 0 says."""
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.broadcast_one_to_all(np.int32(ok)))


def shared(steps: list[int]) -> list[int]:
    """The steps that process 0 sees."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    ours = np.resize(np.array([*steps, 0], np.int32), count)
    return multihost_utils.broadcast_one_to_all(ours).tolist() if count else []


def raise_together(folder: Path, error: CheckpointError | None) -> None:
    """Raises in every process if any has an error, a mismatch before damage."""
    if jax.process_count() > 1:
        own = 0 if error is None else 2 if isinstance(error, CheckpointMismatch) else 1
        codes = np.ravel(multihost_utils.process_allgather(np.int32(own)))
        if codes.max() > own:
            kind = CheckpointMismatch if codes.max() == 2 else CheckpointError
            raise kind(f"{folder}: process {int(codes.argmax())} cannot use it.") from error
    if error is not None:
        raise error
