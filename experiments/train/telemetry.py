"""A run's log: JSON lines always, TensorBoard and Weights & Biases if asked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import numpy as np

from eqxldm.devices import GIB, device_memory
from eqxldm.distributed import is_primary
from eqxldm.telemetry import (
    MissingPackage,
    Sink,
    TensorBoard,
    WeightsAndBiases,
    rates,
    require,
    total_peak,
)

from .options import Range
from .run import RunFolder
from .terminal import UserError, say, user_errors


@dataclass(frozen=True)
class LogOptions:
    """Where the log goes besides log.jsonl."""

    tensorboard: bool = False  # Also write TensorBoard files, to RUN_DIR/tensorboard.
    # Also log to this project of Weights & Biases; WANDB_MODE=offline needs no account.
    wandb: str | None = None
    # A device's dense peak in TFLOP/s, for the MFU; by default what its maker says.
    peak_tflops: Annotated[float, Range(0, 1e6, "(]")] | None = None


def check_packages(options: LogOptions) -> None:
    """Refuses a log for which a package is missing."""
    with user_errors(MissingPackage, what="--log"):
        for asked, package in ((options.tensorboard, "tensorboardX"), (options.wandb, "wandb")):
            if asked:
                require(package)


class Telemetry:
    """Scalars and pictures by stage and step; off process 0 nothing is written.

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
        self._run, self._flops = run, dict(flops_per_step or {})
        self._peak = total_peak(jax.devices() if devices is None else devices, options.peak_tflops)
        self._primary = is_primary()
        self._sinks: list[Sink] = []
        check_packages(options)  # on all processes, so that they stop together
        if self._primary and options.tensorboard:
            self._sinks.append(TensorBoard(run.file("tensorboard")))
        if self._primary and options.wandb is not None:
            self._sinks.append(self._wandb(options.wandb))

    def _wandb(self, project: str) -> Sink:
        folder = self._run.file("wandb")
        try:
            sink = WeightsAndBiases(project, folder, self._run.path.name, self._run.config())
        except require("wandb").Error as error:
            raise UserError(
                f"--log.wandb {project}: {error} Or set WANDB_MODE=offline, and send the run later "
                f"with `wandb sync {folder}/offline-run-*`."
            ) from None
        say(f"Weights & Biases: {sink.where or f'offline, in {folder}'}")
        return sink

    def speed(
        self, stage: str, steps: int, seconds: float, wait_seconds: float, *, batch_size: int
    ) -> dict[str, float]:
        """`rates`, with this stage's FLOPs and the devices' peak, and the memory that is in use."""
        flops, memory = self._flops.get(stage), device_memory() or {}
        cost: dict[str, Any] = dict(batch_size=batch_size, flops_per_step=flops, peak=self._peak)
        used = {f"memory_{n}_gib": memory[n] / GIB for n in ("in_use", "peak") if n in memory}
        return rates(steps, seconds, wait_seconds, **cost) | used

    def scalars(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Logs numbers under their names. In log.jsonl one that is not finite is null."""
        numbers = {name: _number(name, value) for name, value in values.items()}
        if self._primary:
            finite = {n: v if math.isfinite(v) else None for n, v in numbers.items()}
            self._run.log(stage=stage, step=step, **finite)
            for sink in self._sinks:
                sink.scalars(stage, step, numbers)

    def images(self, stage: str, step: int, name: str, grid: np.ndarray) -> None:
        """Logs one picture, such as a grid of samples. The run folder's own are saved elsewhere."""
        if grid.dtype != np.uint8 or grid.ndim != 3 or grid.shape[-1] > 4:
            raise ValueError(
                f"images: {name} must be uint8 of shape (h, w, 1 to 4), got {grid.dtype} of "
                f"{grid.shape}."
            )
        colours = grid[..., :3] if grid.shape[-1] > 2 else grid[..., :1].repeat(3, -1)
        for sink in self._sinks:
            sink.images(stage, step, name, colours)

    def close(self, *, failed: bool = False) -> None:
        """Writes what is left. Nothing can be logged afterwards."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close(failed)

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(failed=kind is not None)


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (np.number, np.ndarray)) and np.ndim(value) == 0:
        return value.item()
    raise TypeError(
        f"scalars: {name} must be a number that was fetched, got {type(value).__name__} of shape "
        f"{np.shape(value)}; use jax.device_get on steps that have finished."
    )
