"""The programs: `python -m experiments.train`, and those beside it."""

import contextlib
import os
import signal
import sys


def _stop(signum, frame):
    """As `train.terminal` ends a program, while its imports, which take seconds, are under way."""
    line = f"stopped by {signal.Signals(signum).name}; the same command goes on from here.\n"
    with contextlib.suppress(OSError):
        os.write(2, line.encode())
    os._exit(128 + signum)


if sys.argv[:1] == ["-m"]:  # Python has been told to run one of them, and has still to find it
    for _signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(_signum) != signal.SIG_IGN:  # as below `nohup`
            signal.signal(_signum, _stop)
