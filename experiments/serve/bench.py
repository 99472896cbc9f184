"""`make bench-serve`: latencies and images a second over loopback, beside the bare jitted call."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import numpy as np

from eqxldm.serving import MAP

from ..train.options import Range, check
from ..train.terminal import UserError, say
from .clients import Load, load, started
from .generators import from_run
from .naive import sampler
from .texts import refuse_text

CLIENTS = (1, 4, 16)
BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Bench:
    """Measure the server, a naive one and the bare jitted call, in one run."""

    run: Path | None = None  # The folder of a finished run.
    solver: str | None = None  # By default the run's.
    steps: Annotated[int, Range(1, 250)] | None = None  # By default the run's.
    guidance: Annotated[float, Range(0, 50)] | None = None  # By default the run's.
    seconds: Annotated[float, Range(0, 600, "(]")] = 5.0  # Of each measurement.
    slots: Annotated[int, Range(1, 256)] = 8  # As in serving.


def bench(options: Bench) -> None:
    check(options)
    if options.run is None:
        raise UserError("which run? RUN=runs/mnist.")
    refuse_text(options.run)
    generator = from_run(options.run)
    usual = generator.defaults
    solver = usual.solver if options.solver is None else options.solver
    if solver not in generator.solver_names:
        raise UserError(f"--solver {solver}: it has {', '.join(generator.solver_names)}.")
    steps = usual.steps if options.steps is None else options.steps
    guidance = usual.guidance if options.guidance is None else options.guidance
    guidance = 1.0 if solver == MAP or not generator.guided else guidance
    busy = " ".join(f"{x:.1f}" for x in os.getloadavg())
    say(
        f"{generator.name}: {solver}, {steps} steps, guidance {guidance:g}; "
        f"{os.cpu_count()} cores, load before it began {busy}"
    )
    draw = sampler(generator, solver, steps, guidance)
    alone = _bare(draw, generator, options.seconds)
    say("\n| what | clients | p50 ms | p90 ms | p99 ms | images/s |\n|---|---|---|---|---|---|")
    for batch, times in alone.items():
        name = f"bare jitted call, batch {batch}"
        found = Load(times, {}, sum(times))
        _row(name, "", found, batch * found.rate)
    best = max(batch * len(times) / sum(times) for batch, times in alone.items())
    said = dict(solver=solver, steps=steps)
    said |= dict(guidance=guidance) if generator.guided and solver != MAP else {}

    def body(i):
        classes = len(generator.labels)
        return said | dict(seed=i) | (dict(label=i % classes) if classes else {})

    found = {}
    place = ["--run", str(options.run)]
    naive = str(options.run), solver, str(steps), str(guidance)
    ours = ["serve", *place, "--port", "0", "--slots", str(options.slots)]
    servers = (
        ("one at a time", "experiments.serve.naive", naive),
        ("this server", "experiments.serve", ours),
    )
    for name, module, arguments in servers:
        with started(module, arguments) as server:
            load(server.address, 2, body, seconds=1.0)
            for clients in CLIENTS:
                seen = load(server.address, clients, body, seconds=options.seconds)
                if seen.statuses.keys() - {200}:
                    raise UserError(f"the server answered {seen.statuses}.")
                found[name, clients] = seen
                _row(name, str(clients), seen, seen.rate)
    one, most = found["this server", 1], found["this server", CLIENTS[-1]]
    bare = 1000 * float(np.percentile(alone[1], 50))
    say(
        f"\nOverhead at one client: {one.percentile(50) - bare:.1f} ms p50 (bare {bare:.1f} ms). "
        f"At {CLIENTS[-1]} clients {most.rate:.1f} images/s, {most.rate / best:.2f} of the best "
        f"bare batch ({best:.1f})."
    )


def _bare(draw, generator, seconds):
    """The seconds of each call, by the batch."""
    found, label = {}, 0 if generator.labels else None
    for batch in BATCHES:
        cond = jax.tree.map(
            lambda a, batch=batch: np.stack([a] * batch), generator.condition(None, label)
        )
        seeds, times = np.arange(batch, dtype=np.int32), []
        np.asarray(draw(seeds, cond))
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            start = time.monotonic()
            np.asarray(draw(seeds, cond))
            times.append(time.monotonic() - start)
        found[batch] = times
    return found


def _row(name: str, clients: str, found: Load, rate: float) -> None:
    times = " | ".join(f"{found.percentile(p):.1f}" for p in (50, 90, 99))
    say(f"| {name} | {clients} | {times} | {rate:.1f} |")
