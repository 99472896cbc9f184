"""What goes wrong, in one line with the path and the system's reason."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path


class CheckpointError(Exception):
    """A checkpoint that could not be written, cannot be read or is not what was written."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint of another configuration: undamaged, but not what was asked for."""


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Whatever is raised inside becomes a `CheckpointError` that names the checkpoint."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{folder} was not saved: {reason(error)}.") from error


def reason(error: BaseException) -> str:
    """The system's reason if there is one, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    code = re.search(r"os_error_code='(\d+)'", text)  # as tensorstore writes it
    return os.strerror(int(code[1])) if code else text[:300].removesuffix(".")
