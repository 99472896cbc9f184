"""`python -m eqxldm.serving --bundle model.bundle`: serves a bundle that `make export` wrote.

It needs this library and the extra "serve", but no code of the model. Runs and folders of published
weights are served by `make serve`.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .bundled import from_bundle
from .engine import Engine
from .export import BundleError
from .server import access_for, bind, serve

TOKEN = "EQXLDM_TOKEN"  # the environment's: a command line can be seen by others


@dataclass(frozen=True)
class Options:
    """Serve a bundle over HTTP, without the code of its model."""

    bundle: Path  # The file that make export wrote.
    host: str = "127.0.0.1"  # The address; 0.0.0.0 is every one of this machine's.
    port: int = 8000  # 0 takes a free one, which is printed.
    slots: int = 16  # Images that are on their way at once.
    queue: int = 64  # Images that may wait; others are refused.


def main(args: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM; 2 with one message for what cannot be served."""
    import tyro

    options = tyro.cli(Options, args=args, prog="python -m eqxldm.serving", description=__doc__)
    for name, least, most in (("port", 0, 65535), ("slots", 1, 256), ("queue", 1, 100_000)):
        if not least <= (given := getattr(options, name)) <= most:
            return _failed(f"--{name} must lie in {least} .. {most}, got {given}.")
    try:
        from .metrics import Metrics

        metrics = Metrics()
        generator = from_bundle(options.bundle)
        listener = bind(options.host, options.port)
    except ImportError as error:
        return _failed(f'serving needs the extra "serve" ({error.name} is missing).')
    except (BundleError, OSError) as error:
        return _failed(getattr(error, "strerror", None) or str(error))
    with listener:
        access = access_for(options.host, os.environ.get(TOKEN) or None)
        print(f"{generator.name}: {', '.join(generator.solver_names)}; compiling ...", flush=True)
        engine = Engine(
            generator, slots=options.slots, queue=options.queue, observe=metrics.observe
        )
        say = lambda text: print(text, flush=True)
        return serve(engine, listener, metrics=metrics, access=access, say=say)


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
