"""`python -m eqxldm.serving --bundle model.bundle`: the module `command`."""

import signal
import sys

from .._leaving import leave
from .command import main

if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:  # before it serves
        print("stopped by SIGINT.", file=sys.stderr)
        code = 128 + signal.SIGINT
    leave(code)
