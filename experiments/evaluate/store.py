"""Features on disk: computed once, a batch after the other, and gone on with where they ended."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from eqxldm.data.latent_writer import one_ahead
from eqxldm.durable import check_is_file, read_file, replacing

from ..train.terminal import StageBar, UserError, say
from .networks import Extractor
from .pictures import Pictures, as_colour

PROGRESS = "progress.json"
EVERY = 16  # batches between notes of what is done


class Stored:
    """Arrays of features, `(n, d)` float32 each, memory-mapped."""

    def __init__(self, arrays: dict[str, Float[np.ndarray, "n d"]]):
        self.arrays = arrays

    def __getitem__(self, name: str) -> Float[np.ndarray, "n d"]:
        return self.arrays[name]

    def parts(self, name: str, size: int = 1024) -> Iterator[Float[np.ndarray, "m d"]]:
        """Some rows at a time, always the same, so that sums do not depend on batches."""
        array = self.arrays[name]
        return (np.asarray(array[i : i + size]) for i in range(0, len(array), size))


def stored_features(
    name: str, pictures: Pictures, extractor: Extractor, count: int, batch: int, cache: Path
) -> Stored:
    """The features of the first `count` pictures, from the cache as far as they are there."""
    about = dict(images=pictures.digest(), count=count, **extractor.about)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / key
    with _alone(folder):
        return _stored(name, pictures, extractor, count, batch, folder, about)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for another process that computes the same: two would begin each other's files anew."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--cache {folder.parent}: {error.strerror or error}.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process computes these features, in {folder}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield


def _stored(
    name: str, pictures: Pictures, extractor: Extractor, count: int, batch: int, folder: Path,
    about: dict[str, Any],
) -> Stored:  # fmt: skip
    done, widths = _progress(folder, about, count)
    arrays: dict[str, Any] = {k: _opened(folder, k, count, d, done) for k, d in widths.items()}
    if widths and done == count:
        return Stored(arrays)
    with StageBar(name, count, "image") as bar:
        bar.update(done)
        parts = _numbered(pictures.batches(batch, start=done), done, count)
        begun = ((first, len(part), extractor.start(part, batch)) for first, part in parts)
        # A batch is computed while the one after it is read.
        for number, (first, size, outputs) in enumerate(one_ahead(begun)):
            for key, value in extractor.finish(outputs, size).items():
                if not np.isfinite(value).all():
                    raise UserError(f"{name}: features of image {first} and on are not finite.")
                if key not in arrays:
                    widths[key] = value.shape[1]
                    arrays[key] = _opened(folder, key, count, value.shape[1], 0)
                arrays[key][first : first + size] = value
            bar.update(first + size)
            if number % EVERY == 0 or first + size == count:
                _note(folder, about, arrays, widths, first + size)
    return Stored(arrays)


def _numbered(batches: Iterator[Any], first: int, count: int) -> Iterator[tuple[int, Any]]:
    """Each batch with the number of its first image, until there are `count` images."""
    for part in batches:
        if first >= count:
            return
        yield first, as_colour(part)[: count - first]
        first += len(part)


def _opened(folder: Path, name: str, count: int, width: int, done: int) -> np.ndarray:
    path = folder / f"{name}.npy"
    if done:
        try:
            check_is_file(path)
            found = np.load(path, mmap_mode="r+")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}): delete its folder.") from None
        if found.shape == (count, width) and found.dtype == np.float32:
            return found
        raise UserError(f"{path} is damaged: delete its folder.")
    array = np.lib.format.open_memmap(path, "w+", np.float32, (count, width))
    if hasattr(os, "posix_fallocate"):
        # Of a file with holes a full disk would be found by whoever writes to a page: a SIGBUS.
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _progress(folder: Path, about: dict[str, Any], count: int) -> tuple[int, dict[str, int]]:
    """How many images are done, and the arrays with their widths; nothing where that is damaged."""
    try:
        found = json.loads(read_file(folder / PROGRESS))
        done, widths = found["done"], found["widths"]
        if found["about"] != about or not isinstance(done, int) or not 0 < done <= count:
            return 0, {}
        known = widths and all(
            isinstance(width, int) and Path(k).name == k and (folder / f"{k}.npy").exists()
            for k, width in widths.items()
        )
        return (done, widths) if known else (0, {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0, {}


def _note(folder: Path, about: Any, arrays: Any, widths: Any, done: int) -> None:
    for array in arrays.values():
        array.flush()
    with replacing(folder / PROGRESS) as temporary:
        temporary.write_text(json.dumps(dict(about=about, done=done, widths=widths)))
