"""What a server must bear: many requests, too many at once, and being killed."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from eqxldm.devices import GIB

from ..train.options import Range, check
from ..train.terminal import UserError, say
from .clients import Client, load, picture, started
from .texts import refuse_text

CLIENTS = 16
DISTINCT = 200  # seeds, each of which has one picture
QUEUE = 16  # images that may wait, while there are too many


@dataclass(frozen=True)
class Soak:
    """Many requests, each answer compared; three times the capacity; killed and started again."""

    run: Path | None = None  # The folder of a finished run.
    requests: Annotated[int, Range(1, 10**7)] = 10_000  # Answers that are compared.
    steps: Annotated[int, Range(1, 250)] = 2  # Of each request.
    overload: Annotated[float, Range(0, 3600)] = 60.0  # Seconds of too many clients.
    rows: Annotated[int, Range(1, 512)] = 16  # Of the one call: pictures are equal bit for bit.


def soak(options: Soak) -> None:
    check(options)
    if options.run is None:
        raise UserError("which run? RUN=runs/mnist.")
    refuse_text(options.run)
    arguments = [
        "serve", "--run", str(options.run), "--port", "0", "--rows", str(options.rows),
        "--queue", str(QUEUE),
    ]  # fmt: skip
    with started("experiments.serve", arguments) as server:
        body = lambda i: {"label": i % DISTINCT % 10, "seed": i % DISTINCT, "steps": options.steps}
        client = Client(server.address)
        wanted = [picture(client.ask(body(i))[2]) for i in range(DISTINCT)]
        compiled, wrong, memory = server.metric("eqxldm_compilations_total"), [], []

        def seen(i, answer):
            if picture(answer) != wanted[i % DISTINCT]:
                wrong.append(i)
            if i % max(options.requests // 10, 1) == 0:
                memory.append(server.memory())

        done = load(server.address, CLIENTS, body, seconds=86_400, most=options.requests, seen=seen)
        _expect(not wrong, f"{len(wrong)} pictures are others, such as that of request {wrong[:1]}")
        _expect(done.statuses == {200: options.requests}, f"the answers are {done.statuses}")
        shown = ", ".join(f"{m / GIB:.3f}" for m in memory)
        say(f"{options.requests} requests: none lost, none swapped; {done.rate:.0f} a second.")
        say(f"memory in GiB, at every tenth of them: {shown}")
        if options.overload:
            crowd = 3 * (8 + QUEUE)
            found = load(server.address, crowd, body, seconds=options.overload)
            say(f"{crowd} clients for {options.overload:g} s: {found.statuses}")
            _expect(set(found.statuses) <= {200, 429}, "and others than 200 and 429 came")
            _expect(found.statuses.get(429, 0) > 0, "and none was refused")
            # The first client's connection was idle for too long, and is closed.
            again = picture(Client(server.address).ask(body(3))[2])
            _expect(again == wanted[3], "then a picture was another")
        after = server.metric("eqxldm_compilations_total")
        _expect(after == compiled, f"{after - compiled:g} programs were compiled on the way")
        os.kill(server.process.pid, signal.SIGKILL)
    begun = time.monotonic()
    with started("experiments.serve", arguments) as server:
        say(f"killed, started again: ready after {time.monotonic() - begun:.1f} s.")
        again = picture(Client(server.address).ask(body(3))[2])
        _expect(again == wanted[3], "a picture is another after the start")


def _expect(holds, message):
    if not holds:
        raise UserError(f"{message}.")
