"""The stages of training that a run is made of: what they share, and one that leaves an average."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from eqxldm.checkpoints import Checkpoints
from eqxldm.distributed import all_gather
from eqxldm.sharding import build_placed, own_rows
from eqxldm.training import exponential, init_state, make_train_step

from .hooks import Settings
from .loop import Hook, run_stage
from .run import RunFolder
from .streams import stream_key, stream_seed
from .telemetry import LogOptions, Telemetry
from .terminal import Signals, say


class Length(Protocol):
    """How long a stage is."""

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...


@dataclass
class Stages:
    """What the stages of a run share, and the seconds that each took."""

    seed: int
    run: RunFolder
    mesh: Mesh
    signals: Signals
    log: LogOptions
    checkpoint_every: int
    keep_every: int | None = None
    unit: str = "images"  # what a batch is made of
    timings: dict[str, dict[str, float]] = field(default_factory=dict)

    def key(self, name: str) -> Any:
        return stream_key(self.seed, name)

    def train(
        self,
        stage: str,
        phases: Any,
        state: Any,
        batches: Any,
        batch_size: int,
        *constants: Any,
        flops: float | None = None,
        hooks: Callable[[Telemetry], Sequence[Hook]] = lambda telemetry: (),
    ) -> Any:
        """`run_stage` with the run's seed, mesh and folder; `flops` are those of a step."""
        flops_per_step = {} if flops is None else {stage: flops}
        settings = Settings(
            batch_size, self.checkpoint_every, keep_every=self.keep_every, unit=self.unit
        )
        with Telemetry(self.run, self.log, flops_per_step=flops_per_step) as telemetry:
            state, self.timings[stage] = run_stage(
                stage,
                phases,
                state,
                batches,
                settings,
                key=self.key(f"{stage}/step"),
                mesh=self.mesh,
                run=self.run,
                signals=self.signals,
                telemetry=telemetry,
                hooks=hooks(telemetry),
                constants=constants,
            )
        skipped = getattr(batches, "skipped", None)
        if skipped:
            say(
                f"{stage}: {len(skipped)} unreadable images were replaced by others, the first: "
                f"{next(iter(skipped.values()))}"
            )
        return state

    def average(
        self,
        stage: str,
        build: Callable[[], Any],
        optimizer: Any,
        loss: Any,
        batches: Any,
        length: Length,
        *,
        ema_decay: float = 0.99,
    ) -> Any:
        """The averaged model of a stage, off the mesh; `build()` makes the one to begin with."""
        made = lambda: init_state(build(), optimizer, num_emas=1)
        _, static = eqx.filter_eval_shape(made)
        state = build_placed(lambda: made()[0], self.mesh)
        step = make_train_step(loss, static, optimizer, ema_decays=(exponential(ema_decay),))
        state = self.train(stage, [(length.steps, step)], state, batches, length.batch_size)
        average = jax.device_get(all_gather(state.ema[0], self.mesh))
        return eqx.combine(jax.tree.map(jnp.asarray, average), static)

    def order(self, stage: str, batch_size: int) -> dict[str, Any]:
        """The seed of a stage's batches, and the rows of each that this process reads."""
        return {
            "seed": stream_seed(self.seed, f"{stage}/data"),
            "rows": own_rows(batch_size, self.mesh),
        }


def restore_average(checkpoints: Checkpoints, step: int, like: Any) -> Any:
    """The first average of a state like this; nothing else of its checkpoint is read."""
    average = lambda state: state.ema[0]
    nothing = jax.tree.map(lambda _: None, like)
    only = eqx.tree_at(average, nothing, average(like), is_leaf=lambda leaf: leaf is None)
    return average(checkpoints.restore(step, only, part=True)[0])
