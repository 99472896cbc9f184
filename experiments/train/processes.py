"""Joining the other processes, failing with them, and leaving."""

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, NoReturn

import jax

from eqxldm._leaving import leave, leave_at_once
from eqxldm.checkpoints import CheckpointError
from eqxldm.data import DataError
from eqxldm.distributed import first_with, is_primary

from .options import Range
from .terminal import SIGNALS, Interrupted, Signals, UserError, console

GRACE = 10.0  # seconds that a process which fails waits for the others to leave with it


@dataclass(frozen=True)
class Processes:
    """The same command on many hosts, started once a host."""

    # Join the others through jax.distributed, which finds them on SLURM, TPU pods and GKE.
    distributed: bool = False
    coordinator: str | None = None  # HOST:PORT of process 0, where they are not found.
    processes: Annotated[int, Range(1, 10**6)] | None = None  # How many there are.
    process_id: Annotated[int, Range(0, 10**6)] | None = None  # Which one this is, from 0.


def join(options: Processes) -> None:
    """Before anything else of jax. Only process 0 prints from here on."""
    place = (options.coordinator, options.processes, options.process_id)
    if not options.distributed:
        if any(value is not None for value in place):
            raise UserError("--coordinator, --processes and --process-id need --distributed.")
        return
    if None in place and any(value is not None for value in place):
        raise UserError("give --coordinator, --processes and --process-id together, or none.")
    try:
        jax.distributed.initialize(*place)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--distributed: jax.distributed.initialize() failed: {reason} Where processes are not "
            "found, give --coordinator HOST:PORT --processes N --process-id I."
        ) from error
    console.quiet = not is_primary()


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Ends this process with the exit code that `main` returns, whatever signals still come.

    At a normal end jax lets processes wait for each other, five minutes at most. One that fails
    waits ten seconds: the others may be waiting for it in a step, and learn that it is gone when it
    is.
    """
    # What a killed worker leaves in shared memory is removed by Python's tracker of it, which is
    # told this when it starts: it is no news beside the error.
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")
    try:
        Signals()  # a command has its own later
        code = main()
    except Exception:
        traceback.print_exc()
        if jax.distributed.is_initialized():
            print(
                "If another process stopped first, what it printed says why. The same command, on "
                "all hosts, goes on from the last checkpoint.",
                file=sys.stderr,
            )
        code = 1
    except Interrupted as stop:  # a second one, while what is said of the first was printed
        code = 128 + stop.signum
    for signum in SIGNALS:  # it is stopping, and knows its exit code
        signal.signal(signum, signal.SIG_IGN)
    if code and jax.distributed.is_initialized():
        leaving = threading.Thread(target=_shutdown, daemon=True)
        leaving.start()
        leaving.join(GRACE)
        if leaving.is_alive():
            leave_at_once(code)
    leave(code)


def _shutdown() -> None:
    with contextlib.suppress(RuntimeError):  # others have gone already
        jax.distributed.shutdown()


@contextlib.contextmanager
def all_succeed() -> Iterator[None]:
    """Checks of all processes, or of one for all: where one raises, every other one does too."""
    error = None
    try:
        yield
    except (UserError, DataError, CheckpointError, OSError) as raised:
        error = raised
    failed = first_with(error is not None)
    if error is None and failed is not None:
        raise UserError(f"process {failed} stopped; what it printed says why.")
    if error is not None:
        raise error
