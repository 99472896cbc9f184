"""What is raised for data that cannot be used."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class DataError(ValueError):
    """Data that cannot be used or found; the message says what, why and what to do."""


@contextlib.contextmanager
def reading(path: str | Path, failing: str = "cannot be read") -> Iterator[None]:
    """What the system refuses in the block becomes a `DataError` with the path.

    >>> with reading("a.png"):
    ...     raise OSError(5, "Input/output error")
    Traceback (most recent call last):
    ...
    eqxldm.data.errors.DataError: a.png: cannot be read: Input/output error.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {failing}: {error.strerror or error}.") from error
