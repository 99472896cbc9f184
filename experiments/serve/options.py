"""The options of `make serve`, and the server that they ask for."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from eqxldm.serving import Engine, Generator, Limits
from eqxldm.serving.queueing import AbstractEngine
from eqxldm.serving.server import access_for, bind, serve
from eqxldm.serving.text import TextEngine, TextGenerator

from ..generate.options import Edge
from ..train.options import Range, check
from ..train.terminal import UserError, say, user_errors
from .generators import from_folder, from_run
from .texts import from_words, is_text

TOKEN = "EQXLDM_TOKEN"  # the environment's: a command line can be seen by others
WHICH = "what is to be served? RUN=runs/mnist, or MODEL=folder."
LARGE = 256 * 256  # pixels of a picture from which they are decoded one by one


@dataclass(frozen=True)
class Serve:
    """Serve a finished run, or a folder of published weights, over HTTP: images, or text."""

    run: Path | None = None  # The folder of a finished run of experiments.train, or of words.
    model: Path | None = None  # A diffusers folder, with a model_index.json; or one of LLaDA.
    host: str = "127.0.0.1"  # The address; 0.0.0.0 is every one of this machine's.
    port: Annotated[int, Range(0, 65535)] = 8000  # 0 takes a free one, which is printed.
    # Images, or texts, that are on their way at once: 16, or 8. A call has as many rows for images.
    slots: Annotated[int, Range(1, 256)] | None = None
    queue: Annotated[int, Range(1, 100_000)] = 64  # Those that may wait; others are refused.
    # Network rows of the one call that is compiled: each image or text then is the same bit for
    # bit, whoever else is there. By default some sizes are, and a small load costs less.
    rows: Annotated[int, Range(1, 512)] | None = None
    seconds: Annotated[float, Range(0, 86400, "(]")] = 120.0  # A request has, with its waiting.
    images: Annotated[int, Range(1, 1000)] = 16  # Or texts, of one request, at most.
    size: tuple[Edge, Edge] | None = None  # HEIGHT WIDTH of a folder's pictures.
    # Tokens of a text with its prompt; by default the network's context, and 1024 at most.
    length: Annotated[int, Range(1, 10**6)] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # Of a folder's weights.


def load(options: Serve) -> Generator | TextGenerator:
    """The model that the options name."""
    if (options.run is None) == (options.model is None):
        raise UserError(WHICH)
    folder = options.run or options.model
    assert folder is not None
    if is_text(folder):
        return from_words(folder, options.length, options.dtype)
    if options.run is not None:
        return from_run(folder)
    return from_folder(folder, options.size, options.dtype)


def make_engine(
    options: Serve, generator: Generator | TextGenerator, observe: Any = None
) -> AbstractEngine:
    """Its engine, not started."""
    limits = Limits(images=options.images, seconds=options.seconds)
    sizes = None if options.rows is None else (options.rows,)
    given: dict[str, Any] = dict(queue=options.queue, sizes=sizes, limits=limits, observe=observe)
    given |= {} if options.slots is None else dict(slots=options.slots)
    with user_errors(ValueError, what=f"--rows {options.rows}"):
        if isinstance(generator, TextGenerator):
            return TextEngine(generator, **given)
        height, width = generator.size
        return Engine(generator, decodes=(1,) if height * width > LARGE else None, **given)


def start(options: Serve) -> None:
    """Serves until SIGTERM."""
    check(options)
    try:
        from eqxldm.serving.metrics import Metrics

        metrics = Metrics()
    except ImportError as error:
        raise UserError(f'serving needs the extra "serve" ({error.name} is missing).') from error
    try:
        listener = bind(options.host, options.port)  # before the model is loaded
    except OSError as error:
        raise UserError(str(error.strerror)) from error
    with listener:
        generator = load(options)
        token = os.environ.get(TOKEN) or None
        access = access_for(options.host, token)
        if access.hosts is None and token is None:
            say(f"Anyone who reaches {options.host} can ask it; {TOKEN}=... asks for a token.")
        text = isinstance(generator, TextGenerator)
        names = generator.sampler_names if text else generator.solver_names
        say(f"{generator.name}: {', '.join(names)}; compiling ...")
        engine = make_engine(options, generator, metrics.observe)
        code = serve(engine, listener, metrics=metrics, access=access, say=say)
    if code:
        raise UserError(f"the engine ended: {engine.failed}")
    say("stopped.")
    sys.stdout.flush()
