"""The training loop, and a stage of training around it: resume, step, hooks, stop."""

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from eqxldm.checkpoints import CheckpointError, CheckpointMismatch, Checkpoints
from eqxldm.data import DataError
from eqxldm.data.prefetch import DevicePrefetch, prefetch_to_device
from eqxldm.devices import one_program_at_a_time
from eqxldm.distributed import from_primary
from eqxldm.sharding import batch_sharding, check_batch, place, shardings

from .hooks import Checkpoint, Log, Moment, Settings, Stop
from .run import RunFolder
from .telemetry import Telemetry
from .terminal import Interrupted, Signals, StageBar, UserError, say, user_errors

Step = Callable[..., tuple[Any, dict[str, Any]]]
IN_FLIGHT = 2  # steps dispatched ahead of the one that has finished


class Hook(Protocol):
    """Something to do after every `every`-th step, and after the last."""

    @property
    def every(self) -> int: ...
    def __call__(self, now: Moment) -> None: ...


class ReadingFailed(Exception):
    """The next batch could not be read; the state is that of `step`."""

    def __init__(self, step: int, state: Any):
        self.step, self.state = step, state


def train(
    state: PyTree,
    step: Step,
    batches: DevicePrefetch,
    hooks: Sequence[Hook],
    *,
    steps: range,
    last: int,
) -> PyTree:
    """The state after the steps of these numbers: `state, metrics = step(state, batch)`.

    Hooks run in their order. Nothing waits for the newest step: the loop is never more than
    `IN_FLIGHT` ahead of the devices, and hooks get what may still be on its way.
    """
    running: deque[dict[str, Any]] = deque()
    in_flight = 0 if one_program_at_a_time() else IN_FLIGHT
    for number in steps:
        try:
            batch = next(batches)
        except Exception as error:
            raise ReadingFailed(number - 1, state) from error
        state, metrics = step(state, batch)
        # Without a bound the host would run ahead until the queue of the devices holds it up, with
        # a batch in memory for each step that waits there.
        running.append(metrics)
        if len(running) > in_flight:
            jax.block_until_ready(running.popleft())
        now = Moment(number, number == last, state, metrics)
        for hook in hooks:
            if number % hook.every == 0 or now.last:
                hook(now)
    return state


def run_stage(
    stage: str,
    phases: Sequence[tuple[int, Step]],
    state: PyTree,
    batches: grain.DatasetIterator,
    settings: Settings,
    *,
    key: Any,
    mesh: Mesh,
    run: RunFolder,
    signals: Signals,
    telemetry: Telemetry,
    hooks: Sequence[Hook] = (),
    constants: tuple[Any, ...] = (),
) -> tuple[PyTree, dict[str, float]]:
    """Trains through all phases, from the newest checkpoint if there is one.

    A phase is `(until, step)`: its function makes the steps up to number `until`, and is compiled
    once. `step(state, batch, key, *constants)` is pure and derives its randomness from `key` and
    the step that the state counts, so that a resumed run repeats an uninterrupted one bit for bit.
    State and batches are divided over the mesh; the constants are as they come.

    `hooks` run between the log and the checkpoint, after which a stopped run goes on without them.
    With several processes all of them call this, each with its part of the batches. Returns the
    final state and `{"seconds", "images_per_second"}` over all sessions.
    """
    with user_errors(ValueError, what=stage):
        check_batch(settings.batch_size, mesh)
    total = phases[-1][0]
    state = place(state, mesh)
    out = shardings(state, mesh), None
    folder = run.file(f"checkpoints/{stage}")
    with (
        Checkpoints(folder, keep=settings.keep, every=settings.keep_every) as checkpoints,
        contextlib.closing(prefetch_to_device(batches, batch_sharding(mesh))) as ahead,
        StageBar(stage, total) as bar,
    ):
        start, info = 0, {}
        if from_primary(bool(checkpoints.steps())):
            start, state, info = _restore(checkpoints, state, ahead)
        run.rewind_log(stage, start)
        good = lambda: _last_good(checkpoints)
        log = Log(stage, telemetry, bar, ahead, settings, start=start, info=info, last_good=good)
        checkpoint = Checkpoint(checkpoints, run, ahead, log, every=settings.save_every)
        stop = Stop(signals, mesh, checkpoint)
        if start >= total:
            return state, log.timings()
        if start:
            say(f"{stage}: resuming at step {start} of {total}")
        bar.update(start)
        every_hook = [log, *hooks, checkpoint, stop]
        with jax.set_mesh(mesh), signals.deferred():
            try:
                for until, function in phases:
                    compiled = jax.jit(function, donate_argnums=0, out_shardings=out)
                    step = lambda state, batch, f=compiled: f(state, batch, key, *constants)
                    steps, start = range(start + 1, until + 1), max(start, until)
                    state = train(state, step, ahead, every_hook, steps=steps, last=total)
            except ReadingFailed as failed:
                checkpoint.save(failed.step, failed.state)
                if signals.pending is not None:  # which may have ended the readers, too
                    raise Interrupted(signals.pending) from None
                reason = failed.__cause__
                if isinstance(reason, DataError | OSError):
                    raise reason from None
                raise UserError(
                    f"{stage}: reading stopped: {type(reason).__name__}: {reason}. The same "
                    f"command goes on from step {failed.step}."
                ) from failed
            stop.at_the_end()
        return state, log.timings()


def _last_good(checkpoints: Checkpoints) -> str:
    with contextlib.suppress(CheckpointError):  # one that fails does not count
        checkpoints.wait()
    steps = checkpoints.steps()
    return str(checkpoints.folder / str(steps[-1])) if steps else "none yet"


def _restore(
    checkpoints: Checkpoints, like: PyTree, batches: Any
) -> tuple[int, PyTree, dict[str, Any]]:
    """The newest checkpoint that is not damaged; those that are, are named and renamed."""
    try:
        return checkpoints.restore_newest(like, batches, report=say)
    except CheckpointMismatch as error:
        raise UserError(f"{error}\nUse another --run-dir, or --overwrite to start anew.") from None
    except CheckpointError as error:
        raise UserError(f"{error}\nStart anew with --overwrite.") from None
