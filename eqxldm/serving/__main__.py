"""`python -m eqxldm.serving --bundle model.bundle`: the module `command`."""

from .._leaving import leave
from .command import main

if __name__ == "__main__":
    leave(main())
