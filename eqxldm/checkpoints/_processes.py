"""How several processes come to one result, also in a background thread."""

import json
from collections.abc import Callable
from typing import Any

import jax

# jax has no public name for its coordinator's key-value store. Its public collectives are programs
# on the devices, and must not run beside those of a training step.
from jax._src import distributed

from .errors import CheckpointError, CheckpointMismatch

_TIMEOUT = 600_000  # milliseconds that a process waits for the others' part of a checkpoint


def together(
    key: str, error: CheckpointError | None, primary: Callable[[], Any] = lambda: None
) -> Any:
    """What `primary` returns in process 0, in every process; or an error of any, in every one.

    Process 0 calls `primary` when all are here and none has an error. A mismatch goes before other
    errors. All processes give the same `key`, each time another one.
    """
    client: Any = distributed.global_state.client
    own, count = jax.process_index(), jax.process_count()
    if count == 1:
        if error is not None:
            raise error
        return primary()
    # As JSON: [is it a mismatch, message], or null.
    report = error and [isinstance(error, CheckpointMismatch), f"{error} (process {own})"]
    try:
        if own != 0:
            client.key_value_set(f"{key}/{own}", json.dumps(report))
            failed, value = json.loads(client.blocking_key_value_get(f"{key}/0", _TIMEOUT))
        else:
            others = [
                client.blocking_key_value_get(f"{key}/{k}", _TIMEOUT) for k in range(1, count)
            ]
            reports = filter(None, [report, *map(json.loads, others)])
            failed, value = max(reports, key=lambda report: report[0], default=None), None
            if failed is None:
                try:
                    value = primary()
                except CheckpointError as raised:
                    failed = [False, f"{raised} (process 0)"]
            client.key_value_set(f"{key}/0", json.dumps([failed, value]))
    except jax.errors.JaxRuntimeError as lost:
        raise error or CheckpointError(f"{key}: another process did not answer.") from lost
    if failed is not None:
        raise (CheckpointMismatch if failed[0] else CheckpointError)(failed[1]) from error
    return value
