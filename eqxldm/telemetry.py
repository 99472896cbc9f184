"""What a training loop reports: its speed, and sinks for scalars and pictures.

A sink has `scalars(stage, step, values)`, `images(stage, step, name, grid)` and `close(failed)`.
All take numbers that have been fetched: nothing here waits for a device.
"""

import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from .devices import peak_flops
from .durable import replacing

Scalars = Mapping[str, int | float]
Grid = UInt8[np.ndarray, "h w 3"]


def rates(
    steps: int,
    seconds: float,
    wait_seconds: float,
    *,
    batch_size: int,
    flops_per_step: float | None = None,
    peak: float | None = None,
) -> dict[str, float]:
    """The speed of some steps, with the model's FLOPs of one and all devices' peak a second.

    `{"images_per_second", "step_seconds", "data_wait"}`, the last as a share of the time; with
    `flops_per_step` also `tflops` a second, and with `peak` their share of it, `mfu`.

    >>> rates(10, 5.0, 1.0, batch_size=4, flops_per_step=1e12, peak=8e12)
    {'images_per_second': 8.0, 'step_seconds': 0.5, 'data_wait': 0.2, 'tflops': 2.0, 'mfu': 0.25}
    """
    if steps < 1 or seconds <= 0:
        return {}
    found = {
        "images_per_second": steps * batch_size / seconds,
        "step_seconds": seconds / steps,
        "data_wait": min(wait_seconds / seconds, 1.0),
    }
    if flops_per_step is not None:
        found["tflops"] = steps * flops_per_step / seconds / 1e12
        if peak is not None:
            found["mfu"] = steps * flops_per_step / seconds / peak
    return found


def total_peak(devices: Sequence[Any], peak_tflops: float | None = None) -> float | None:
    """The devices' dense bfloat16 FLOP/s together; None if one of them is not known.

    `peak_tflops` is that of one of them, where the maker's figure is not the one to compare with.

    >>> import jax
    >>> total_peak(jax.devices()[:1], peak_tflops=0.25)
    250000000000.0
    """
    if peak_tflops is not None:
        return len(devices) * peak_tflops * 1e12
    peaks = [peak_flops(device.device_kind) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if known and len(known) == len(peaks) else None


class Sink(Protocol):
    """Where scalars and pictures go."""

    def scalars(self, stage: str, step: int, values: Scalars) -> None: ...
    def images(self, stage: str, step: int, name: str, grid: Grid) -> None: ...
    def close(self, failed: bool) -> None: ...


class MissingPackage(Exception):
    """An optional package that is not installed; the message has the command that installs it."""


def require(package: str) -> ModuleType:
    """The package, which must be installed.

    **Raises** `MissingPackage`.

    >>> require("math").sqrt(4.0)
    2.0
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingPackage(
            f"the package {package} is needed:\n  {sys.executable} -m pip install {package}"
        ) from None


class TensorBoard:
    """TensorBoard files, one folder for each stage: each counts its steps from 1.

    What a stage logged before it was resumed is hidden from the first step on that it logs again
    (`purge_step`). Needs `tensorboardX`.
    """

    def __init__(self, folder: Path):
        self._module, self._folder = require("tensorboardX"), folder
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


class WeightsAndBiases:
    """One run of Weights & Biases, whose id stays in `folder`; each stage has its own step axis.

    **Arguments**: `folder` is one of its own in the run's folder, `wandb` say; `config` is shown
    beside the run. Needs `wandb`, whose `Error` it raises if it does not begin.
    """

    def __init__(self, project: str, folder: Path, name: str, config: Mapping[str, Any]):
        self._module, self._stages = require("wandb"), set()
        path = folder / "id"
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_text(np.random.default_rng().bytes(4).hex())
        self._log = self._module.init(
            project=project,
            name=name,
            id=path.read_text().strip(),
            resume="allow",
            dir=str(folder.parent),
            config=dict(config),
            settings=self._module.Settings(console="off", silent=True),
        )

    @property
    def where(self) -> str | None:
        """The run's address; None if it is offline."""
        return None if self._log.offline else self._log.url

    def _send(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        if stage not in self._stages:
            self._stages.add(stage)
            self._log.define_metric(f"{stage}/step")
            self._log.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._log.log({f"{stage}/step": step} | {f"{stage}/{n}": v for n, v in values.items()})

    def scalars(self, stage: str, step: int, values: Scalars) -> None:
        self._send(stage, step, values)

    def images(self, stage: str, step: int, name: str, grid: Grid) -> None:
        self._send(stage, step, {name: self._module.Image(grid)})

    def close(self, failed: bool) -> None:
        self._log.finish(exit_code=int(failed))
