"""What every stage of the job needs, and what the run folder says that it is about."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from eqxldm.data import Batches, ImageSource, image_batches
from eqxldm.sharding import own_rows

from ..common.loop import Keep, train_stage
from ..common.run import RunFolder, write_json
from ..common.stages import read_about
from ..common.streams import data_seed, stage_key
from ..common.telemetry import LogOptions, Telemetry
from ..common.terminal import Signals, UserError, console
from .config import AttentionName, Config, RematName

DATA, LATENTS = "data.json", "latents"
MEND = "--overwrite starts anew."


@dataclass(frozen=True)
class Compute:
    """What it runs on: an interrupted run may go on with other values."""

    mesh: str = ""
    """How devices share the work: data=2,fsdp=4,tensor=1. By default all are on data."""
    grad_accum_steps: int = 1
    """Parts of a batch of the diffusion that are computed one after the other."""
    remat: RematName = "narrow"
    """What the backward pass computes again: everything, all but what is as narrow as a token, all
    but the matmuls, or nothing."""
    attention: AttentionName = "xla"
    """cudnn is for bfloat16 on a GPU."""
    workers: int = 0
    """Processes that read and decode images; 0 uses threads."""
    threads: int = 2
    keep_every: int | None = None
    """Checkpoints whose step is a multiple of this stay; the newest two do anyway."""
    strict: bool = False
    """Stop at an unreadable image. By default it is left out and listed."""


@dataclass
class Job:
    """What every stage needs, and the seconds that each took."""

    config: Config
    compute: Compute
    source: ImageSource
    num_classes: int
    run: RunFolder
    latents: Path
    mesh: Mesh
    signals: Signals
    log: LogOptions = field(default_factory=LogOptions)
    timings: dict[str, dict[str, float]] = field(default_factory=dict)

    def train(
        self,
        stage: str,
        phases: Any,
        state: Any,
        batches: Batches,
        options: Any,
        *constants: Any,
        flops: float | None = None,
        snapshots: Callable[[Any], tuple[Any, dict[str, Any]]] | None = None,
    ) -> Any:
        """`train_stage` with the job's seed, mesh and run folder; `flops` are those of a step."""
        flops_per_step = {} if flops is None else {stage: flops}
        with Telemetry(self.run, self.log, flops_per_step=flops_per_step) as telemetry:
            state, self.timings[stage] = train_stage(
                stage,
                phases,
                state,
                batches,
                batch_size=options.batch_size,
                key=stage_key(self.config, stage, "step"),
                mesh=self.mesh,
                run=self.run,
                signals=self.signals,
                keep=Keep(
                    self.config.checkpoint_every,
                    every=self.compute.keep_every,
                    snapshots=snapshots,
                    snapshot_every=self.config.diffusion.snapshot_every,
                ),
                constants=constants,
                telemetry=telemetry,
            )
        if batches.skipped:
            console.print(
                f"{stage}: {len(batches.skipped)} unreadable images were replaced by others, "
                f"the first: {next(iter(batches.skipped.values()))}"
            )
        return state

    def images(self, stage: str, size: int, batch_size: int) -> Batches:
        return image_batches(
            self.source,
            batch_size,
            size=size,
            seed=data_seed(self.config, stage),
            skip_unreadable=not self.compute.strict,
            workers=self.compute.workers,
            threads=self.compute.threads,
            rows=own_rows(batch_size, self.mesh),
        )


def describe_data(job: Job) -> None:
    """`data.json`: the images that the run is about; refuses others."""
    about = {
        "source": job.source.digest(),
        "images": len(job.source),
        "num_classes": job.num_classes,
        "class_names": list(job.source.class_names),
    }
    if job.run.primary:
        if (job.run.path / DATA).exists():
            found = read_about(job.run, DATA, *about, mend=MEND)
            if found != about:
                raise UserError(
                    f"the run in {job.run.path} is about other images:\n"
                    + _differences(found, about)
                    + "Give the same images, use another --run-dir, or --overwrite to start anew."
                )
        else:
            write_json(job.run.path / DATA, about)


def _differences(found: dict[str, Any], about: dict[str, Any]) -> str:
    names = {"source": "listing", "images": "images", "num_classes": "labels of the network"}
    lines = [
        f"  {shown}: it has {str(found[name])[:16]}, now {str(about[name])[:16]}\n"
        for name, shown in names.items()
        if found[name] != about[name]
    ]
    old, new = found["class_names"], about["class_names"]
    if old != new:
        changed = next((pair for pair in zip(old, new, strict=False) if pair[0] != pair[1]), None)
        first = f", the first that differs is {changed[0]}, now {changed[1]}" if changed else ""
        lines.append(f"  classes: it has {len(old)}, now {len(new)}{first}\n")
    return "".join(lines)
