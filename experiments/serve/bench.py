"""`make bench-serve`: latencies and images a second over loopback, beside the bare jitted call."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from eqxldm.serving import MAP, Generator

from ..train.options import Range, check
from ..train.terminal import UserError, say
from .clients import Load, load, started
from .folders import write_dit
from .generators import from_folder, from_run
from .naive import sampler
from .options import WHICH
from .texts import refuse_text

CLIENTS = (1, 4, 16)
BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Bench:
    """Measure the server, a naive one and the bare jitted call, in one run."""

    run: Path | None = None  # The folder of a finished run.
    model: Path | None = None  # Or a diffusers folder.
    # A Python with torch, diffusers and FastAPI: diffusers' pipeline behind FastAPI is measured,
    # too, on the folder --model, or without one on a small DiT with random weights.
    diffusers: Path | None = None
    solver: str | None = None  # By default the run's.
    steps: Annotated[int, Range(1, 250)] | None = None  # By default the run's.
    guidance: Annotated[float, Range(0, 50)] | None = None  # By default the run's.
    seconds: Annotated[float, Range(0, 600, "(]")] = 5.0  # Of each measurement.
    rounds: Annotated[int, Range(1, 100)] = 1  # Of all measurements; the median one is shown.
    slots: Annotated[int, Range(1, 256)] | None = None  # As in serving.


@dataclass(frozen=True)
class Asked:
    """What is measured: a model, and what every request says of it."""

    generator: Generator
    place: tuple[str, str]  # --run or --model, and where
    solver: str
    steps: int
    guidance: float

    def body(self, i: int) -> dict[str, Any]:
        """Request `i`."""
        generator = self.generator
        said: dict[str, Any] = dict(solver=self.solver, steps=self.steps, seed=i)
        if generator.guided and self.solver != MAP:
            said["guidance"] = self.guidance
        if generator.labels:
            said["label"] = i % len(generator.labels)
        if generator.takes_text:
            said["prompt"] = "a picture"
        return said


def bench(options: Bench) -> None:
    check(options)
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(_place(options))
        if options.diffusers is not None and not options.diffusers.is_file():
            raise UserError(f"--diffusers {options.diffusers}: there is no such program.")
        asked = _asked(options, place)
        busy = " ".join(f"{x:.1f}" for x in os.getloadavg())
        say(
            f"{asked.generator.name}: {asked.solver}, {asked.steps} steps, guidance "
            f"{asked.guidance:g}; {os.cpu_count()} cores, load before it began {busy}"
        )
        draw = sampler(asked.generator, asked.solver, asked.steps, asked.guidance)
        rounds = [_round(options, asked, draw) for _ in range(options.rounds)]
    _tell(rounds)


@contextlib.contextmanager
def _place(options: Bench) -> Iterator[tuple[str, str]]:
    """`--run` or `--model`, and the folder."""
    if options.run is not None and options.model is not None:
        raise UserError(WHICH)
    if (folder := options.run or options.model) is not None:
        refuse_text(folder)
    if options.run is not None:
        if options.diffusers is not None:
            raise UserError("--diffusers reads no run: give --model a folder, or neither.")
        yield "--run", str(options.run)
    elif options.model is not None:
        yield "--model", str(options.model)
    elif options.diffusers is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "dit")
            write_dit(path)
            yield "--model", str(path)
    else:
        raise UserError(WHICH)


def _asked(options: Bench, place: tuple[str, str]) -> Asked:
    path = Path(place[1])
    generator = from_run(path) if place[0] == "--run" else from_folder(path, None, "float32")
    usual = generator.defaults
    solver = usual.solver if options.solver is None else options.solver
    if solver not in generator.solver_names:
        raise UserError(f"--solver {solver}: it has {', '.join(generator.solver_names)}.")
    steps = usual.steps if options.steps is None else options.steps
    guidance = usual.guidance if options.guidance is None else options.guidance
    guidance = 1.0 if solver == MAP or not generator.guided else guidance
    return Asked(generator, place, solver, steps, guidance)


@dataclass(frozen=True)
class Seen:
    """One measurement: what the clients saw, and the seconds of a core that the server used."""

    load: Load
    rate: float  # images a second
    cpu_seconds: float = 0.0


Round = dict[tuple[str, str], Seen]  # by what was measured, and the number of clients
BARE, OURS = "bare jitted call, batch {}", "this server"


def _round(options: Bench, asked: Asked, draw: Any) -> Round:
    found: Round = {}
    for batch in BATCHES:
        times = _bare(draw, asked.generator, batch, options.seconds)
        calls = Load(times, {}, sum(times))
        found[BARE.format(batch), ""] = Seen(calls, batch * calls.rate)
    said = str(asked.steps), str(asked.guidance)
    ours = ["serve", *asked.place, "--port", "0"]
    ours += [] if options.slots is None else ["--slots", str(options.slots)]
    servers: list[tuple[str, str, list[str], Path | None]] = [
        ("one at a time", "experiments.serve.naive", [*asked.place, asked.solver, *said], None),
        (OURS, "experiments.serve", ours, None),
    ]
    if options.diffusers is not None:
        arguments = [asked.place[1], *said]
        servers.insert(
            1, ("diffusers", "experiments.serve.of_diffusers", arguments, options.diffusers)
        )
    for name, module, arguments, python in servers:
        with started(module, arguments, str(python or sys.executable)) as server:
            load(server.address, 2, asked.body, seconds=1.0)
            for clients in CLIENTS:
                before = server.cpu_seconds()
                seen = load(server.address, clients, asked.body, seconds=options.seconds)
                used = server.cpu_seconds() - before
                if seen.statuses.keys() - {200}:
                    raise UserError(f"the server answered {seen.statuses}.")
                found[name, str(clients)] = Seen(seen, seen.rate, used)
    return found


def _bare(draw: Any, generator: Generator, batch: int, seconds: float) -> list[float]:
    """The seconds of each call."""
    label, prompt = 0 if generator.labels else None, "" if generator.takes_text else None
    one = generator.condition(prompt, label)
    cond = jax.tree.map(lambda a: np.stack([np.asarray(a)] * batch), one)
    seeds, times = np.arange(batch, dtype=np.int32), []
    np.asarray(draw(seeds, cond))
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        start = time.monotonic()
        np.asarray(draw(seeds, cond))
        times.append(time.monotonic() - start)
    return times


def _tell(rounds: list[Round]) -> None:
    """The medians over the rounds, and what they say."""
    median = lambda value: float(np.median([value(found) for found in rounds]))
    say("\n| what | clients | p50 ms | p90 ms | p99 ms | images/s |\n|---|---|---|---|---|---|")
    for key in rounds[0]:
        times = (
            median(lambda found, p=p, key=key: found[key].load.percentile(p)) for p in (50, 90, 99)
        )
        rate = median(lambda found, key=key: found[key].rate)
        say(f"| {' | '.join(key)} | {' | '.join(f'{t:.1f}' for t in times)} | {rate:.1f} |")
    most, one, bare = (OURS, str(CLIENTS[-1])), (OURS, "1"), (BARE.format(1), "")
    best = lambda found: max(found[BARE.format(batch), ""].rate for batch in BATCHES)
    share = median(lambda found: found[most].rate / best(found))
    over = median(lambda found: found[one].load.percentile(50) - found[bare].load.percentile(50))
    count = lambda found: len(found[most].load.seconds)
    clients = median(lambda found: 1000 * found[most].load.cpu_seconds / count(found))
    server = median(lambda found: 1000 * found[most].cpu_seconds / count(found))
    cores = os.cpu_count() or 1
    ideal = 1000 * cores / median(best)
    left = median(lambda found: 1 - found[most].load.cpu_seconds / found[most].load.wall / cores)
    say(
        f"\nOverhead at one client: {over:.1f} ms p50. At {CLIENTS[-1]} clients {share:.2f} of the "
        f"images a second of the best bare batch, or {share / left:.2f} of what it would make on "
        f"the {cores} cores less the clients' share. Milliseconds of a core for an image: "
        f"{server:.2f} of the server, {clients:.2f} of the clients; the best bare batch has "
        f"{ideal:.2f} for one."
    )
