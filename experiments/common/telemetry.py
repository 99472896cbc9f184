"""What a training loop reports: JSON lines always, TensorBoard and Weights & Biases if asked.

All take the same scalars and pictures, as numbers that have been fetched: nothing here waits for a
device. Off process 0 nothing is written.
"""

import contextlib
import importlib
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import UInt8

from eqxldm.devices import GIB, device_memory, peak_flops
from eqxldm.durable import replacing

from .processes import is_primary
from .run import RunFolder
from .terminal import UserError, console

Number = int | float | np.number
Scalars = dict[str, int | float]
Grid = UInt8[np.ndarray, "h w c"]


@dataclass(frozen=True)
class LogOptions:
    """Where the log goes besides log.jsonl."""

    tensorboard: bool = False
    """Also write TensorBoard files, to RUN_DIR/tensorboard."""
    wandb: str | None = None
    """Also log to this project of Weights & Biases; WANDB_MODE=offline needs no account."""
    peak_tflops: float | None = None
    """A device's dense peak in TFLOP/s, for the MFU; by default what its maker says."""


def rates(
    steps: int,
    seconds: float,
    wait_seconds: float,
    *,
    batch_size: int,
    flops_per_step: float | None = None,
    peak: float | None = None,
) -> Scalars:
    """The speed of some steps, with the model's FLOPs of one and all devices' peak a second.

    `{"images_per_second", "step_seconds", "data_wait"}`, the last as a share of the time; with
    `flops_per_step` also `tflops` a second, and with `peak` their share of it, `mfu`.

    >>> rates(10, 5.0, 1.0, batch_size=4, flops_per_step=1e12, peak=8e12)
    {'images_per_second': 8.0, 'step_seconds': 0.5, 'data_wait': 0.2, 'tflops': 2.0, 'mfu': 0.25}
    """
    if steps < 1 or seconds <= 0:
        return {}
    found: Scalars = {
        "images_per_second": steps * batch_size / seconds,
        "step_seconds": seconds / steps,
        "data_wait": min(wait_seconds / seconds, 1.0),
    }
    if flops_per_step is not None:
        found["tflops"] = steps * flops_per_step / seconds / 1e12
        if peak is not None:
            found["mfu"] = steps * flops_per_step / seconds / peak
    return found


class StepClock:
    """Counts steps, the time they take and the part of it that was spent waiting for data.

    `start` once the first step is compiled, `waiting` around each fetch of a batch, `step` after
    each step; `read` gives the three since it was last called.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self.start()

    def start(self) -> None:
        self._restart(self._now())

    def _restart(self, now: float) -> None:
        self._begin, self._steps, self._waited = now, 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begin = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - begin

    def step(self) -> None:
        self._steps += 1

    def read(self) -> tuple[int, float, float]:
        """`(steps, seconds, wait_seconds)`, the first arguments of `rates`."""
        now = self._now()
        found = self._steps, now - self._begin, self._waited
        self._restart(now)
        return found


def total_peak(devices: Sequence[Any], peak_tflops: float | None = None) -> float | None:
    """The devices' dense bfloat16 FLOP/s together; None if one of them is not known."""
    if peak_tflops is not None:
        return len(devices) * peak_tflops * 1e12
    peaks = [peak_flops(device.device_kind) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if known and len(known) == len(peaks) else None


class Telemetry:
    """A run's log: scalars and pictures by stage and step.

    `flops_per_step`: the model FLOPs of one step over the global batch, by stage; a stage without
    reports none. `devices`: those that the steps run on, by default all.
    """

    def __init__(
        self,
        run: RunFolder,
        options: LogOptions = LogOptions(),
        *,
        flops_per_step: Mapping[str, float] | None = None,
        devices: Sequence[Any] | None = None,
    ):
        if options.peak_tflops is not None and not 0 < options.peak_tflops < math.inf:
            raise UserError(f"--log.peak-tflops must be above 0, got {options.peak_tflops}.")
        self._run, self._flops = run, dict(flops_per_step or {})
        self._peak = total_peak(jax.devices() if devices is None else devices, options.peak_tflops)
        self._primary = is_primary()
        self._sinks: list[_Sink] = []
        # All processes look for the packages, so that they stop together.
        if options.tensorboard:
            module = _optional("tensorboardX", "--log.tensorboard")
            if self._primary:
                self._sinks.append(_TensorBoard(module, run))
        if options.wandb is not None:
            module = _optional("wandb", "--log.wandb")
            if self._primary:
                self._sinks.append(_WeightsAndBiases(module, run, options.wandb))

    def speed(
        self, stage: str, steps: int, seconds: float, wait_seconds: float, *, batch_size: int
    ) -> Scalars:
        """`rates`, with this stage's FLOPs and the devices' peak, and the memory that is in use."""
        flops = self._flops.get(stage)
        found = rates(
            steps, seconds, wait_seconds, batch_size=batch_size, flops_per_step=flops,
            peak=self._peak,
        )  # fmt: skip
        memory = device_memory() or {}
        return found | {
            f"memory_{name}_gib": memory[name] / GIB
            for name in ("in_use", "peak")
            if name in memory
        }

    def scalars(self, stage: str, step: int, values: Mapping[str, Number]) -> None:
        """Logs numbers under their names. In log.jsonl one that is not finite is null."""
        numbers = {name: _number(name, value) for name, value in values.items()}
        if not self._primary:
            return
        finite = {n: v if math.isfinite(v) else None for n, v in numbers.items()}
        self._run.log(stage=stage, step=step, **finite)
        for sink in self._sinks:
            sink.scalars(stage, step, numbers)

    def images(self, stage: str, step: int, name: str, grid: Grid) -> None:
        """Logs one picture, such as a grid of samples. The run folder's own are saved elsewhere."""
        if grid.dtype != np.uint8 or grid.ndim != 3 or grid.shape[-1] not in (1, 3):
            raise ValueError(
                f"images: {name} must be uint8 of shape (h, w, 1 or 3), got {grid.dtype} of "
                f"{grid.shape}."
            )
        if not self._primary:
            return
        colour = np.broadcast_to(grid, (*grid.shape[:2], 3))
        for sink in self._sinks:
            sink.images(stage, step, name, colour)

    def close(self, *, failed: bool = False) -> None:
        """Writes what is left. Nothing can be logged afterwards."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close(failed)

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(failed=kind is not None)


class _Sink(Protocol):
    def scalars(self, stage: str, step: int, values: Scalars) -> None: ...
    def images(self, stage: str, step: int, name: str, grid: Grid) -> None: ...
    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    """One folder a stage: each counts its steps from 1, and what it logged before it was resumed
    is hidden from the first step on that it logs again (`purge_step`)."""

    def __init__(self, module: Any, run: RunFolder):
        self._module, self._folder = module, run.path / "tensorboard"
        self._writers: dict[str, Any] = {}

    def _writer(self, stage: str, step: int) -> Any:
        if stage not in self._writers:
            self._writers[stage] = self._module.SummaryWriter(
                str(self._folder / stage),
                purge_step=step,
                max_queue=1000,
                flush_secs=20,
                filename_suffix=f".{time.time_ns()}",  # its own name has whole seconds
            )
        return self._writers[stage]

    def scalars(self, stage: str, step: int, values: Scalars) -> None:
        writer = self._writer(stage, step)
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def images(self, stage: str, step: int, name: str, grid: Grid) -> None:
        self._writer(stage, step).add_image(name, grid, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        for writer in self._writers.values():
            writer.close()


class _WeightsAndBiases:
    """One W&B run for the run folder, whose id is kept there; each stage has its own step axis."""

    def __init__(self, module: Any, run: RunFolder, project: str):
        self._module, self._stages = module, set()
        path = run.path / "wandb" / "id"
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_text(secrets.token_hex(4))
        try:
            self._log = module.init(
                project=project,
                name=run.path.name,
                id=path.read_text().strip(),
                resume="allow",
                dir=str(run.path),
                config=run.config(),
                settings=module.Settings(console="off", silent=True),
            )
        except module.Error as error:
            raise UserError(
                f"--log.wandb {project}: {error} Or set WANDB_MODE=offline, and send the run later "
                f"with `wandb sync {run.path / 'wandb'}/offline-run-*`."
            ) from None
        where = f"offline, in {run.path / 'wandb'}" if self._log.offline else self._log.url
        console.print(f"Weights & Biases: {where}")

    def _send(self, stage: str, step: int, values: dict[str, Any]) -> None:
        if stage not in self._stages:
            self._stages.add(stage)
            self._log.define_metric(f"{stage}/step")
            self._log.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._log.log({f"{stage}/step": step} | {f"{stage}/{n}": v for n, v in values.items()})

    def scalars(self, stage: str, step: int, values: Scalars) -> None:
        self._send(stage, step, dict(values))

    def images(self, stage: str, step: int, name: str, grid: Grid) -> None:
        self._send(stage, step, {name: self._module.Image(grid)})

    def close(self, failed: bool) -> None:
        self._log.finish(exit_code=int(failed))


def _optional(package: str, option: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"{option} needs the package {package}:\n  {sys.executable} -m pip install {package}"
        ) from None


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (np.number, np.ndarray)) and np.ndim(value) == 0:
        return value.item()
    raise TypeError(
        f"scalars: {name} must be a number that was fetched, got {type(value).__name__} of shape "
        f"{np.shape(value)}; use jax.device_get on steps that have finished."
    )
