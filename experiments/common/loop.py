"""The training loop: resume, step, log, checkpoint, stop. It never waits for the newest step."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from eqxldm.checkpoints import CheckpointError, Checkpoints
from eqxldm.sharding import replicate, shard_batch

from .run import RunFolder
from .terminal import Interrupted, Signals, StageBar, UserError, console

StepFn = Callable[[Any, Any, Any], tuple[Any, dict[str, Any]]]
IN_FLIGHT = 2  # steps dispatched ahead of the one that has finished


class LossNotFinite(UserError):
    """NaN or infinity in a loss or in the state."""


def train_stage(
    stage: str,
    phases: list[tuple[int, StepFn]],
    state: PyTree,
    batches: grain.DatasetIterator,
    *,
    batch_size: int,
    key: Any,
    mesh: Mesh,
    run: RunFolder,
    signals: Signals,
    save_every: int,
    log_every: int = 20,
) -> tuple[PyTree, dict[str, float]]:
    """Trains through all phases, from the newest checkpoint if there is one.

    A phase is `(until, step_fn)`: its function makes the steps up to number `until`, and is
    compiled once. `step_fn(state, batch, key)` is pure and derives its randomness from `key` and
    the step that the state counts, so that a resumed run repeats an unbroken one bit for bit.
    Returns the final state and `{"seconds", "images_per_second"}` over all sessions of the run.
    """
    steps = phases[-1][0]
    compiled = [(until, jax.jit(step_fn, donate_argnums=0)) for until, step_fn in phases]
    state = replicate(state, mesh)
    with Checkpoints(run.checkpoints / stage) as checkpoints:
        start, info = 0, {"seconds": 0.0, "stepping": 0.0, "stepped": 0}
        found = checkpoints.steps()
        if found:
            start = found[-1]
            state, info = restore_newest(checkpoints, state, batches)
        run.rewind_log(stage, start)
        if start >= steps:
            return state, _timings(info, batch_size)
        if start:
            console.print(f"{stage}: resuming at step {start} of {steps}")

        clock = _Clock(info)
        pending: deque[tuple[int, dict[str, Any]]] = deque()
        saved = start

        def save(step: int, wait: bool = False) -> None:
            nonlocal saved
            _collect(stage, pending, run, saved)
            if not all(np.isfinite(a).all() for a in jax.tree.leaves(jax.device_get(state))):
                raise _not_finite(stage, "state", step, run, saved)
            checkpoints.save(step, state, batches, clock.read(step - start))
            saved = step
            if wait:
                checkpoints.wait()

        with signals.deferred(), StageBar(stage, steps) as bar:
            bar.update(start)
            for step in range(start + 1, steps + 1):
                batch = shard_batch(next(batches), mesh)
                step_fn = next(fn for until, fn in compiled if step <= until)
                state, metrics = step_fn(state, batch, key)
                pending.append((step, metrics))
                clock.compiled()
                if len(pending) > IN_FLIGHT:
                    jax.block_until_ready(pending[-1 - IN_FLIGHT][1])
                if step % log_every == 0 or step == steps:
                    loss = _collect(stage, pending, run, saved)
                    rate = clock.rate(step - start) * batch_size
                    bar.update(step, f"loss {loss:.4f}  {rate:.0f} images/s")
                if signals.pending is not None:
                    save(step, wait=True)
                    raise Interrupted(signals.pending)
                if step == steps or step % save_every == 0:
                    save(step, wait=step == steps)
        return state, _timings(clock.read(steps - start), batch_size)


class _Clock:
    """Seconds of a stage over all sessions, and those after each session's first step."""

    def __init__(self, info: dict[str, Any]):
        self._before = info
        self._begin = time.monotonic()
        self._first: float | None = None

    def compiled(self) -> None:
        """The first step has been dispatched: its compilation is over."""
        if self._first is None:
            self._first = time.monotonic()

    def rate(self, done: int) -> float:
        """Steps a second in this session, the first not counted."""
        return (done - 1) / max(time.monotonic() - (self._first or self._begin), 1e-9)

    def read(self, done: int) -> dict[str, Any]:
        now = time.monotonic()
        return {
            "seconds": self._before["seconds"] + now - self._begin,
            "stepping": self._before["stepping"] + now - (self._first or now),
            "stepped": self._before["stepped"] + done - 1,
        }


def _collect(stage: str, pending: deque, run: RunFolder, saved: int) -> float:
    """Fetches and logs the means of the pending metrics; stops the run if one is not finite."""
    if not pending:
        return float("nan")
    steps = [step for step, _ in pending]
    rows = jax.device_get([metrics for _, metrics in pending])
    pending.clear()
    for step, row in zip(steps, rows, strict=True):
        for name, value in row.items():
            if not np.isfinite(value):
                raise _not_finite(stage, name, step, run, saved)
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    run.log(stage=stage, step=steps[-1], **means)
    return means["loss"]


def _not_finite(stage: str, name: str, step: int, run: RunFolder, saved: int) -> LossNotFinite:
    last = run.checkpoints / stage / str(saved) if saved else "none yet"
    return LossNotFinite(
        f"{stage}: {name} is not finite at step {step}. Last good checkpoint: {last}. "
        "Try a lower learning rate."
    )


def restore_newest(
    checkpoints: Checkpoints, like: PyTree, batches: grain.DatasetIterator | None = None
) -> tuple[PyTree, dict[str, Any]]:
    """The newest checkpoint; if it is damaged, an error that names the newest usable one."""
    *older, newest = checkpoints.steps()
    try:
        return checkpoints.restore(newest, like, batches)
    except CheckpointError as error:
        usable = next((step for step in reversed(older) if _usable(checkpoints, step, like)), None)
        bad = checkpoints.folder / str(newest)
        if usable is None:
            advice = "There is no older one: start anew with --overwrite."
        else:
            good = checkpoints.folder / str(usable)
            advice = f"Newest usable: {good}. Delete {bad} to go on from there."
        raise UserError(f"damaged checkpoint {error}\n{advice}") from None


def _usable(checkpoints: Checkpoints, step: int, state: PyTree) -> bool:
    try:
        checkpoints.restore(step, state)
    except CheckpointError:
        return False
    return True


def _timings(info: dict[str, Any], batch_size: int) -> dict[str, float]:
    rate = info["stepped"] * batch_size / max(info["stepping"], 1e-9)
    return {"seconds": info["seconds"], "images_per_second": rate}
