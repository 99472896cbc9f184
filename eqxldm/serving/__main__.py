"""`python -m eqxldm.serving --bundle model.bundle`: the module `command`."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
