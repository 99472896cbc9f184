"""What is done along a stage of training: logging, saving, snapshots, measuring, stopping."""

import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from eqxldm.checkpoints import CheckpointError, Checkpoints
from eqxldm.data.prefetch import DevicePrefetch
from eqxldm.devices import one_program_at_a_time
from eqxldm.distributed import from_primary

from .run import RunFolder, versions
from .telemetry import Telemetry
from .terminal import Interrupted, Signals, StageBar, UserError, say

LATE = 2  # steps after which a step's metrics are fetched: they have been computed by then
HIDDEN = ("norms", "skipped", "skipped_in_row")  # metrics that are no line's numbers


class Moment(NamedTuple):
    """What a hook sees after a step: its number, whether it was the last, and what it left.

    The state's arrays are donated to the next step: use or copy them before returning. The metrics
    may not have been computed yet.
    """

    step: int
    last: bool
    state: Any
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """A stage's batch, how often it is logged and saved, and what of it stays."""

    batch_size: int
    save_every: int = 250  # steps between checkpoints
    keep: int = 2  # of the newest checkpoints
    keep_every: int | None = None  # every checkpoint whose step is a multiple of this stays
    log_every: int = 20  # steps between lines of the log
    unit: str = "images"  # what a batch is made of
    patience: int = 10  # so many steps in a row without a finite loss and gradient stop the run


class LossNotFinite(UserError):
    """NaN or infinity, time and again."""


class Log:
    """Collects every step's metrics and reports their means, some steps late.

    Counts the stage's seconds over all sessions, too; `info` has what the last one had counted.
    """

    every = 1

    def __init__(
        self,
        stage: str,
        telemetry: Telemetry,
        bar: StageBar,
        batches: DevicePrefetch,
        settings: Settings,
        *,
        start: int,
        info: dict[str, Any],
        last_good: Callable[[], str],
    ):
        self.stage, self._telemetry, self._bar, self._batches = stage, telemetry, bar, batches
        self._settings, self._last_good = settings, last_good
        self._pending: deque[tuple[int, dict[str, Any]]] = deque()
        self._due: int | None = None  # the step to report, once it has finished
        self._before = {"seconds": 0.0, "stepping": 0.0, "stepped": 0} | info
        self._begin, self._start, self._step = time.monotonic(), start, start
        self._first: float | None = None  # when the first step had been dispatched, so compiled
        self._mark = (self._begin, start, 0.0)  # of the last report: time, step, seconds of waiting

    def __call__(self, now: Moment) -> None:
        self._pending.append((now.step, now.metrics))
        self._step = now.step
        if self._first is None:
            self._first = time.monotonic()
            self._mark = (self._first, now.step, self._batches.wait_seconds)
        if self._due is not None and now.step - self._due >= LATE:
            self._report()
        if now.step % self._settings.log_every == 0 or now.last:
            self._due = now.step

    def flush(self, step: int) -> None:
        """Reports what is due, and checks the metrics up to a step, which it waits for."""
        if self._due is not None:
            self._report()
        self._collect(step)

    def seconds(self) -> dict[str, Any]:
        """What a checkpoint has of the time: all, and that without each session's first step."""
        now, before = time.monotonic(), self._before
        return {
            "seconds": before["seconds"] + now - self._begin,
            "stepping": before["stepping"] + now - (self._first or now),
            "stepped": before["stepped"] + max(self._step - self._start - 1, 0),
        }

    def timings(self) -> dict[str, float]:
        """`{"seconds", "images_per_second"}` over all sessions."""
        spent = self.seconds() if self._first else self._before
        rate = spent["stepped"] * self._settings.batch_size / max(spent["stepping"], 1e-9)
        return {"seconds": spent["seconds"], "images_per_second": rate}

    def _report(self) -> None:
        step, self._due = self._due or 0, None
        begin, first, waited = self._mark
        self._mark = now, _, waiting = time.monotonic(), self._step, self._batches.wait_seconds
        spent = self._step - first, now - begin, waiting - waited
        size = self._settings.batch_size
        values = self._telemetry.speed(self.stage, *spent, batch_size=size)
        loss, rate = self._collect(step, values), values.get("images_per_second", 0.0)
        self._bar.update(step, f"loss {loss:.4f}  {rate:.0f} {self._settings.unit}/s")

    def _collect(self, until: int, speed: dict[str, Any] | None = None) -> float:
        """Fetches and logs the means of the metrics up to a step, without those of skipped ones."""
        taken = []
        while self._pending and self._pending[0][0] <= until:
            taken.append(self._pending.popleft())
        if not taken:
            return float("nan")
        steps = [step for step, _ in taken]
        rows = jax.device_get([metrics for _, metrics in taken])
        for step, row in zip(steps, rows, strict=True):
            if row.get("skipped_in_row", 0) >= self._settings.patience:
                raise LossNotFinite(self._too_many(step, row))
        skipped = sum(int(row.get("skipped", 0)) for row in rows)
        good = [row for row in rows if not row.get("skipped", 0)]
        names = [name for name in rows[0] if name not in HIDDEN]
        means = {n: float(np.mean([row[n] for row in good])) for n in names} if good else {}
        if skipped:
            where = f"in {skipped} of the steps {steps[0]} to {steps[-1]}; they were skipped."
            say(f"{self.stage}: loss or gradient not finite {where}")
            means["skipped"] = skipped
        self._telemetry.scalars(self.stage, steps[-1], {**means, **(speed or {})})
        return means.get("loss", float("nan"))

    def not_finite(self, what: str, step: int) -> str:
        return (
            f"{self.stage}: {what} is not finite at step {step}. Last good checkpoint: "
            f"{self._last_good()}. Try a lower learning rate."
        )

    def _too_many(self, step: int, row: dict[str, Any]) -> str:
        shown = lambda norm: np.array2string(np.asarray(norm), precision=3, threshold=12)
        norms = [f"\n  {name}: {shown(norm)}" for name, norm in row.get("norms", {}).items()]
        what = f"the loss or its gradient ({int(row['skipped_in_row'])} steps in a row)"
        return (
            f"{self.not_finite(what, step)}\nThe loss was {float(row['loss']):.4g}, the norms of "
            f"the gradient by block:{''.join(norms)}"
        )


class Checkpoint:
    """Saves the state and the data position, in the background but for the last step.

    One that cannot be written is reported, and the run goes on; the last one is an error.
    """

    def __init__(
        self, checkpoints: Checkpoints, run: RunFolder, batches: Any, log: Log, *, every: int
    ):
        self.every, self._checkpoints, self._batches, self._log = every, checkpoints, batches, log
        self._about: dict[str, Any] = {"versions": versions()}
        self._begun = 0  # the newest step whose save was begun
        with contextlib.suppress(UserError):  # a loop on its own has no configuration
            self._about["config"] = run.config()

    def __call__(self, now: Moment) -> None:
        self.save(now.step, now.state, wait=now.last)

    def save(self, step: int, state: PyTree, *, wait: bool = True) -> None:
        """Saves the state of a step unless it has been; `wait` until it is on the disk."""
        failed = None
        if step not in (0, self._begun):
            self._log.flush(step)
            # What is not finite must never become the state that a run goes on from.
            if not bool(_all_finite(state)):
                raise LossNotFinite(self._log.not_finite("the state", step))
            self._begun, info = step, {**self._log.seconds(), **self._about}
            try:
                self._checkpoints.save(step, state, self._batches, info)
            except CheckpointError as error:  # of this save, or of the one before
                failed = error
                if not wait:
                    stage = self._log.stage
                    say(f"{stage}: {error}\n{stage}: going on without this checkpoint.")
        if wait:
            self._checkpoints.wait()
            if failed is not None and step not in self._checkpoints.steps():
                raise failed


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    arrays = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.inexact)]
    return jnp.array([jnp.isfinite(a).all() for a in arrays]).all()


class Snapshot:
    """Saves a part of the state that stays. A resumed run comes by the same step with the same.

    `select(state)` gives a tree and a dict to save beside it.
    """

    def __init__(
        self,
        run: RunFolder,
        stage: str,
        select: Callable[[Any], tuple[PyTree, dict[str, Any]]],
        *,
        every: int,
    ):
        self._run, self._stage, self._select, self.every = run, stage, select, every
        run.file(f"snapshots/{stage}")

    def __call__(self, now: Moment) -> None:
        try:
            with open_snapshots(self._run, self._stage) as snapshots:
                if not from_primary(now.step in snapshots.steps()):
                    tree, info = self._select(now.state)
                    snapshots.save(now.step, tree, info=info)
        except CheckpointError as error:
            say(f"{self._stage}: {error}\n{self._stage}: going on without this snapshot.")


def open_snapshots(run: RunFolder, stage: str) -> Checkpoints:
    """The snapshots of a stage, of which all stay."""
    return Checkpoints(run.path / "snapshots" / stage, keep=10**9)


class Evaluate:
    """Measures the model along the way: `measure(state, step)` gives scalars and a picture.

    They are logged as the stage "evaluation". What is measured changes nothing in the training.
    """

    def __init__(
        self,
        measure: Callable[[Any, int], tuple[dict[str, float], Any]],
        run: RunFolder,
        telemetry: Telemetry,
        *,
        every: int,
    ):
        self.every, self._measure, self._telemetry, self._run = every, measure, telemetry, run
        self._rewound = False

    def __call__(self, now: Moment) -> None:
        if not self._rewound:  # a run that was stopped measures these steps again
            self._run.rewind_log("evaluation", now.step - 1)
            self._rewound = True
        scores, grid = self._measure(now.state, now.step)
        if scores:  # on process 0
            self._telemetry.scalars("evaluation", now.step, scores)
            self._telemetry.images("evaluation", now.step, "samples", grid)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
            say(f"step {now.step}: {shown}")


class Stop:
    """Saves and raises `Interrupted` if a signal has come, in all processes at the same step.

    With several processes each step carries the signals of all, whose largest is read some steps
    later: nobody waits, and all come to the same answer.
    """

    every = 1

    def __init__(self, signals: Signals, mesh: Mesh, checkpoint: Checkpoint):
        self._signals, self._mesh, self._checkpoint = signals, mesh, checkpoint
        self._on_their_way: deque[jax.Array] = deque()

    def __call__(self, now: Moment) -> None:
        signum = self._pending()
        if signum is not None:
            self._checkpoint.save(now.step, now.state)
            raise Interrupted(signum)

    def at_the_end(self) -> None:
        """For a signal that came in the last steps or while the last checkpoint was written."""
        signum = max(signum or 0 for signum in [self._pending(), *map(int, self._on_their_way)])
        if signum:
            raise Interrupted(signum)

    def _pending(self) -> int | None:
        if jax.process_count() == 1:
            return self._signals.pending
        own = np.full(len(self._mesh.local_devices), self._signals.pending or 0, np.int32)
        everywhere = jax.sharding.NamedSharding(self._mesh, jax.P(self._mesh.axis_names))
        self._on_their_way.append(_largest(jax.make_array_from_process_local_data(everywhere, own)))
        if one_program_at_a_time():
            self._on_their_way[-1].block_until_ready()
        return int(self._on_their_way.popleft()) or None if len(self._on_their_way) > LATE else None


_largest = jax.jit(jnp.max)
