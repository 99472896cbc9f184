"""The end of a process that has used JAX."""

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """Ends the process with this exit code, in place of `sys.exit`.

    Threads that are no daemons end, and what was registered for the end is done, as usual. Then
    Python would take itself apart while threads of XLA may still be at work with what it frees,
    which after a signal has ended in a segmentation fault; the system takes all of it at once.
    """
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    leave_at_once(code)


def leave_at_once(code: int) -> NoReturn:
    """Ends the process with what it has printed, waiting for nothing."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed, as by `>&-`
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(code)
