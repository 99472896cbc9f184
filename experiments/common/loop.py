"""The training loop: resume, step, log, checkpoint, stop. It never waits for the newest step."""

import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from eqxldm.checkpoints import CheckpointError, CheckpointMismatch, Checkpoints
from eqxldm.data import prefetch_to_device
from eqxldm.devices import one_program_at_a_time
from eqxldm.sharding import batch_sharding, check_batch, place, shardings

from .processes import agreed
from .run import RunFolder, read_json, versions
from .telemetry import StepClock, Telemetry
from .terminal import Interrupted, Signals, StageBar, UserError, console

StepFn = Callable[..., tuple[Any, dict[str, Any]]]
IN_FLIGHT = 2  # steps dispatched ahead of the one that has finished


class LossNotFinite(UserError):
    """NaN or infinity, time and again."""


@dataclass(frozen=True)
class Keep:
    """What is kept of a stage while it runs."""

    save_every: int = 250
    """Steps between checkpoints."""
    newest: int = 2
    """How many of the newest checkpoints stay."""
    every: int | None = None
    """Every checkpoint whose step is a multiple of this stays."""
    snapshots: Callable[[Any], tuple[PyTree, dict[str, Any]]] | None = None
    """`state -> tree, info`: what is also kept, for good, every `snapshot_every` steps and last."""
    snapshot_every: int = 0


@dataclass
class Stage:
    """A stage's parts that do not change while it runs."""

    name: str
    batch_size: int
    run: RunFolder
    telemetry: Telemetry
    patience: int
    checkpoints: Checkpoints


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
    keep: Keep = Keep(),
    constants: tuple[Any, ...] = (),
    telemetry: Telemetry | None = None,
    patience: int = 10,
    log_every: int = 20,
) -> tuple[PyTree, dict[str, float]]:
    """Trains through all phases, from the newest checkpoint if there is one.

    A phase is `(until, step_fn)`: its function makes the steps up to number `until`, and is
    compiled once. `step_fn(state, batch, key, *constants)` is pure and derives its randomness from
    `key` and the step that the state counts, so that a resumed run repeats an unbroken one bit for
    bit. State and batches are divided over the mesh; the constants are as they come.

    After `patience` steps in a row whose loss or gradient was not finite the run stops; those
    steps changed nothing. With several processes all of them call this, each with its part of the
    batches. Returns the final state and `{"seconds", "images_per_second"}` over all sessions.
    """
    try:
        check_batch(batch_size, mesh)
    except ValueError as error:
        raise UserError(f"{stage}: {error}") from None
    steps = phases[-1][0]
    state = place(state, mesh)
    placed = shardings(state, mesh)
    jit = lambda function: jax.jit(function, donate_argnums=0, out_shardings=(placed, None))
    compiled = [(until, jit(step_fn)) for until, step_fn in phases]
    with (
        Checkpoints(run.checkpoints / stage, keep=keep.newest, every=keep.every) as checkpoints,
        contextlib.closing(prefetch_to_device(batches, batch_sharding(mesh))) as ahead,
        contextlib.ExitStack() as stack,
    ):
        if telemetry is None:
            telemetry = stack.enter_context(Telemetry(run))
        this = Stage(stage, batch_size, run, telemetry, patience, checkpoints)
        start, info = 0, {"seconds": 0.0, "stepping": 0.0, "stepped": 0}
        if agreed(bool(checkpoints.steps())):
            start, state, info = restore_newest(checkpoints, state, ahead)
        run.rewind_log(stage, start)
        if start >= steps:
            return state, _timings(info, batch_size)
        if start:
            console.print(f"{stage}: resuming at step {start} of {steps}")
        clock, speed = _Clock(info), StepClock()
        in_flight = 0 if one_program_at_a_time() else IN_FLIGHT
        pending: deque[tuple[int, dict[str, Any]]] = deque()
        due: int | None = None  # the step to report, once it has finished
        stops: deque[jax.Array] = deque()
        about = {"config": read_json(run.path / "config.json"), "versions": versions()}

        def report(step: int) -> None:
            values = telemetry.speed(stage, *speed.read(), batch_size=batch_size)
            loss = _collect(this, pending, step, values)
            bar.update(
                step, f"loss {loss:.4f}  {clock.rate(step - start) * batch_size:.0f} images/s"
            )

        def save(step: int, wait: bool = False) -> None:
            nonlocal due
            if due is not None:
                due = report(due)
            _collect(this, pending, step)
            if not _all_finite(state):
                raise LossNotFinite(_not_finite(this, "the state", step))
            info, failed = {**clock.read(step - start), **about}, None
            try:
                checkpoints.save(step, state, ahead, info)
            except CheckpointError as error:  # of this save, or of the one before
                failed = error
                if not wait:
                    console.print(f"{stage}: {error}\n{stage}: going on without this checkpoint.")
            if wait:
                checkpoints.wait()
                if failed is not None and step not in checkpoints.steps():
                    raise failed

        with jax.set_mesh(mesh), signals.deferred(), StageBar(stage, steps) as bar:
            bar.update(start)
            for step in range(start + 1, steps + 1):
                with speed.waiting():
                    batch = next(ahead)
                step_fn = next(fn for until, fn in compiled if step <= until)
                state, metrics = step_fn(state, batch, key, *constants)
                pending.append((step, metrics))
                speed.step()
                if clock.compiled():
                    speed.start()
                if len(pending) > in_flight:
                    jax.block_until_ready(pending[-1 - in_flight][1])
                last = step == steps
                if due is not None and step - due >= IN_FLIGHT:
                    due = report(due)
                if step % log_every == 0 or last:
                    due = step
                # Before the checkpoint, from which a stopped run would go on without it.
                if keep.snapshots is not None and (last or step % keep.snapshot_every == 0):
                    save_snapshot(run, stage, step, *keep.snapshots(state))
                stopped = _stopped(signals, mesh, stops)
                if stopped is not None:
                    save(step, wait=True)
                    raise Interrupted(stopped)
                if last or step % keep.save_every == 0:
                    save(step, wait=last)
            stopped = _stopped_at_the_end(signals, mesh, stops)
            if stopped is not None:
                raise Interrupted(stopped)
        return state, _timings(clock.read(steps - start), batch_size)


def open_snapshots(run: RunFolder, stage: str) -> Checkpoints:
    """The snapshots of a stage, of which all stay."""
    return Checkpoints(run.path / "snapshots" / stage, keep=10**9)


def save_snapshot(
    run: RunFolder, stage: str, step: int, tree: PyTree, info: dict[str, Any]
) -> None:
    """Keeps a tree for good. A resumed run comes by the same step with the same tree.

    One that cannot be written is reported, as a checkpoint that is not the last one is.
    """
    try:
        with open_snapshots(run, stage) as snapshots:
            if not agreed(step in snapshots.steps()):
                snapshots.save(step, tree, info=info)
    except CheckpointError as error:
        console.print(f"{stage}: {error}\n{stage}: going on without this snapshot.")


def _stopped(signals: Signals, mesh: Mesh, stops: deque[jax.Array]) -> int | None:
    """The signal to stop for, at the same step in every process.

    With several of them each step carries the signals of all, whose largest is read some steps
    later: nobody waits, and all come to the same answer.
    """
    if jax.process_count() == 1:
        return signals.pending
    own = np.full(len(mesh.local_devices), signals.pending or 0, np.int32)
    everywhere = jax.sharding.NamedSharding(mesh, jax.P(mesh.axis_names))
    stops.append(_largest(jax.make_array_from_process_local_data(everywhere, own)))
    if one_program_at_a_time():
        stops[-1].block_until_ready()
    if len(stops) <= IN_FLIGHT:
        return None
    return int(stops.popleft()) or None


def _stopped_at_the_end(signals: Signals, mesh: Mesh, stops: deque[jax.Array]) -> int | None:
    """The signal that came in the last steps or while the last checkpoint was written."""
    found = [_stopped(signals, mesh, stops), *map(int, stops)]
    return max(signum or 0 for signum in found) or None


_largest = jax.jit(jnp.max)


@jax.jit
def _finite_everywhere(tree: PyTree) -> jax.Array:
    arrays = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.inexact)]
    return jnp.array([jnp.isfinite(a).all() for a in arrays]).all()


def _all_finite(state: PyTree) -> bool:
    return bool(_finite_everywhere(state))


class _Clock:
    """Seconds of a stage over all sessions, and those after each session's first step."""

    def __init__(self, info: dict[str, Any]):
        self._before = info
        self._begin = time.monotonic()
        self._first: float | None = None

    def compiled(self) -> bool:
        """The first step has been dispatched, so its compilation is over: true at that step."""
        if self._first is not None:
            return False
        self._first = time.monotonic()
        return True

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


def _collect(this: Stage, pending: deque, until: int, speed: dict[str, Any] | None = None) -> float:
    """Fetches and logs the means of the metrics up to a step, those of skipped steps left out."""
    taken = [pending.popleft() for _ in range(sum(step <= until for step, _ in pending))]
    if not taken:
        return float("nan")
    steps = [step for step, _ in taken]
    rows = jax.device_get([metrics for _, metrics in taken])
    for step, row in zip(steps, rows, strict=True):
        if row.get("skipped_in_row", 0) >= this.patience:
            raise LossNotFinite(_too_many(this, step, row))
    skipped = sum(int(row.get("skipped", 0)) for row in rows)
    good = [row for row in rows if not row.get("skipped", 0)]
    names = [name for name in rows[0] if name not in ("norms", "skipped", "skipped_in_row")]
    means = {name: float(np.mean([row[name] for row in good])) for name in names} if good else {}
    if skipped:
        console.print(
            f"{this.name}: loss or gradient not finite in {skipped} of the steps {steps[0]} to "
            f"{steps[-1]}; they were skipped."
        )
        means["skipped"] = skipped
    this.telemetry.scalars(this.name, steps[-1], {**means, **(speed or {})})
    return means.get("loss", float("nan"))


def _not_finite(this: Stage, what: str, step: int) -> str:
    with contextlib.suppress(CheckpointError):  # one that fails does not count
        this.checkpoints.wait()
    steps = this.checkpoints.steps()
    last = this.checkpoints.folder / str(steps[-1]) if steps else "none yet"
    return (
        f"{this.name}: {what} is not finite at step {step}. Last good checkpoint: {last}. "
        "Try a lower learning rate."
    )


def _too_many(this: Stage, step: int, row: dict[str, Any]) -> str:
    norms = [
        f"  {name}: {np.array2string(np.asarray(norm), precision=3, threshold=12)}"
        for name, norm in row.get("norms", {}).items()
    ]
    count = int(row["skipped_in_row"])
    return (
        _not_finite(this, f"the loss or its gradient ({count} steps in a row)", step)
        + f"\nThe loss was {float(row['loss']):.4g}, the norms of the gradient by block:\n"
        + "\n".join(norms)
    )


def restore_newest(
    checkpoints: Checkpoints, like: PyTree, batches: Any = None
) -> tuple[int, PyTree, dict[str, Any]]:
    """The newest checkpoint that is not damaged; those that are, are named and set aside."""
    try:
        return checkpoints.restore_newest(like, batches, report=console.print)
    except CheckpointMismatch as error:
        raise UserError(f"{error}\nUse another --run-dir, or --overwrite to start anew.") from None
    except CheckpointError as error:
        raise UserError(f"{error}\nStart anew with --overwrite.") from None


def _timings(info: dict[str, Any], batch_size: int) -> dict[str, float]:
    rate = info["stepped"] * batch_size / max(info["stepping"], 1e-9)
    return {"seconds": info["seconds"], "images_per_second": rate}
