"""Writing a latent cache: all images encoded once, shard by shard, from where it stopped."""

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..durable import replacing
from .conditions import Condition, example_condition, label_condition, stack_conditions
from .decode import decode_and_crop
from .errors import DataError
from .image_source import ImageSource
from .latent_cache import (
    DTYPES,
    Header,
    Latents,
    cache_id,
    compare_headers,
    condition_schema,
    read_footer,
    read_header,
    record_dtype,
    shard_paths,
    sides,
)
from .sources.arrayrecord import RecordFiles, writing_records

Encode = Callable[[Any], tuple[Any, Any]]


def write_latents(
    source: ImageSource,
    encode: Encode,
    folder: str | Path,
    header: Header,
    *,
    batch_size: int,
    condition: Condition = label_condition,
    strict: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Encodes all images into a cache, from where an earlier call stopped.

    Their mirror images too, unless the header says otherwise.

    A finished shard is never written again and a half one never has its name, so that a killed
    call is repeated; what it ends with is the same to the byte, if `encode` is deterministic.
    With several processes each writes every `process_count`-th shard into the same folder.

    **Arguments**:

    - `encode(images)`: uint8 `(batch_size, height, width, channels)` to `(mean, logvar)`, raw
      posteriors `(batch_size, *latent)`. Always that one shape: the last batch of a shard is
      padded. It may divide a batch over this process's devices, but not over processes.
    - `header`: what `latent_header` gives.
    - `condition(record)`: the one that `latent_header` had.
    - `strict`: an unreadable image raises `DataError`. Otherwise it is left out, and `skipped.json`
      lists it with the reason.
    - `threads`: that read and decode; by default as many as there are cores.
    - `progress(done, total)`: called with the number of this process's images.

    **Raises** `DataError` if the folder holds the cache of another header or shards of another
    cache, if a latent is not finite, if a condition has another shape than the first one, or if
    `strict` and an image is unreadable.
    """
    folder = Path(folder)
    if len(source) != header["images"]:
        raise ValueError(
            f"write_latents: the header is for {header['images']} images, got {len(source)}."
        )
    if condition_schema(example_condition(source, condition)) != header["condition"]:
        raise ValueError("write_latents: the header is for another condition; give both the same.")
    folder.mkdir(parents=True, exist_ok=True)
    header = _begin(folder, header)
    paths = shard_paths(folder, header)
    mine = range(process_index, len(paths), process_count)
    per_shard = header["images_per_shard"]
    indices = lambda s: range(s * per_shard, min((s + 1) * per_shard, len(source)))
    total, done = sum(len(indices(s)) for s in mine), 0
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for s in mine:
            if not paths[s].exists():
                # Images are decoded some batches ahead of the encoder.
                read = _reader(source, header, condition)
                decoded = _in_order(read, indices(s), pool, ahead=4 * batch_size)
                try:
                    with writing_records(paths[s]) as write:
                        batches = _batched(decoded, batch_size, strict)
                        for seen in _write_shard(batches, encode, header, s, write, batch_size):
                            if progress is not None:
                                progress(done + seen, total)
                finally:
                    decoded.close()
            done += len(indices(s))
            if progress is not None:
                progress(done, total)
    if all(path.exists() for path in paths):
        skipped = Latents(folder, header).skipped()
        _write_json(folder / "skipped.json", skipped)


class Decoded(NamedTuple):
    """An image of the source; instead of its pixels, the reason why there are none."""

    position: int
    id: str
    condition: Any
    pixels: np.ndarray | str


def _reader(source: ImageSource, header: Header, condition: Condition) -> Callable[[int], Decoded]:
    options = {"channels": header["channels"], "max_pixels": header["max_pixels"]}
    size = tuple(header["size"])

    def read(index: int) -> Decoded:
        # An error in here stops the writer: only a file whose bytes are there and are no image is
        # left out for good.
        record = source[index]
        try:
            pixels = decode_and_crop(record.image, size, name=record.id, **options)
        except DataError as error:
            return Decoded(index, record.id, None, str(error))
        return Decoded(index, record.id, condition(record), pixels)

    return read


def _in_order(
    read: Callable[[int], Decoded], indices: range, pool: ThreadPoolExecutor, ahead: int
) -> Generator[Decoded, None, None]:
    """The images in order, read by the pool, at most `ahead` of them before they are needed."""
    waiting: deque = deque()
    try:
        for index in indices:
            waiting.append(pool.submit(read, index))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _batched(
    decoded: Iterator[Decoded], batch_size: int, strict: bool
) -> Iterator[tuple[list[Decoded], dict[str, str]]]:
    """Up to `batch_size` readable images, and the reasons for those skipped among them."""
    images: list[Decoded] = []
    skipped: dict[str, str] = {}
    for item in decoded:
        if isinstance(item.pixels, str):
            if strict:
                raise DataError(item.pixels)
            skipped[item.id] = item.pixels
        else:
            images.append(item)
        if len(images) == batch_size:
            yield images, skipped
            images, skipped = [], {}
    if images or skipped:
        yield images, skipped


def _write_shard(batches, encode, header, shard: int, write, batch_size: int) -> Iterator[int]:
    """Writes the records of one shard; yields the number of images seen so far."""
    ids: list[str] = []
    skipped: dict[str, str] = {}

    def begin(batch):
        images, left_out = batch
        if not images:
            return images, left_out, []
        pixels = np.stack([image.pixels for image in images])
        padding = [(0, batch_size - len(images)), (0, 0), (0, 0), (0, 0)]
        pixels = np.pad(pixels, padding, mode="edge")
        ways = [pixels, np.ascontiguousarray(pixels[:, :, ::-1])]
        return images, left_out, [encode(way) for way in ways[: sides(header)]]

    for images, left_out, encoded in one_ahead(map(begin, batches)):
        records = np.zeros((len(images), sides(header)), record_dtype(header))
        records["index"] = np.array([image.position for image in images]).reshape(-1, 1)
        for k, leaf in enumerate(_condition_leaves(images, header)):
            records[f"cond{k}"] = leaf[:, None]
        for side, moments in enumerate(encoded):
            for name, values in zip(("mean", "logvar"), moments, strict=True):
                records[name][:, side] = _stored(name, values, images, header, batch_size)
        for record in records.reshape(-1):
            write(record.tobytes())
        ids += [image.id for image in images]
        skipped |= left_out
        yield len(ids) + len(skipped)
    footer = {"cache": cache_id(header), "shard": shard, "ids": ids, "skipped": skipped}
    write(json.dumps(footer).encode())


def _condition_leaves(images: list[Decoded], header: Header) -> list[np.ndarray]:
    """The leaves of the conditions, each with the axis of the images."""
    if not images:
        return []
    stacked = stack_conditions([i.condition for i in images], [i.id for i in images])
    found = condition_schema(jax.tree.map(lambda leaf: leaf[0], stacked))
    if found != header["condition"]:
        raise DataError(
            f"{images[0].id}: its condition is {json.dumps(found)}, that of the first image "
            f"{json.dumps(header['condition'])}. A condition has one shape for all images."
        )
    return jax.tree.leaves(stacked)


def one_ahead(items: Iterator) -> Iterator:
    """Each item when the next one has begun: devices work while results are written.

    >>> list(one_ahead(iter("abc")))
    ['a', 'b', 'c']
    """
    previous = []
    for item in items:
        yield from previous
        previous = [item]
    yield from previous


def _stored(name: str, values: Any, images: list[Decoded], header: Header, batch_size: int):
    """The bits of the encoder's output in the cache's dtype."""
    expected = (batch_size, *header["shape"])
    if values.shape != expected:
        raise ValueError(
            f"write_latents: encode gave a {name} of shape {values.shape}, the header says "
            f"{expected}."
        )
    with np.errstate(over="ignore"):
        stored = np.asarray(values)[: len(images)].astype(DTYPES[header["dtype"]])
    finite = np.isfinite(stored.astype(np.float32)).all(axis=tuple(range(1, stored.ndim)))
    if not finite.all():
        raise DataError(
            f"{images[int(finite.argmin())].id}: its {name} is not finite in {header['dtype']}. "
            "Check the autoencoder, or cache in bfloat16, which has float32's range."
        )
    return stored.view(np.uint16)


def _begin(folder: Path, header: Header) -> Header:
    """The folder's header, written if it is new; refuses another cache's header or shards."""
    found = read_header(folder)
    if found is not None:
        compare_headers(folder, found, header)
        header = found  # the shards know their cache by it
    paths = shard_paths(folder, header)
    strangers = sorted(set(folder.glob("latents-*.arrayrecord")) - set(paths))
    if strangers:
        raise DataError(
            f"{strangers[0]}: is of another cache. Use another folder, or delete what is in it."
        )
    for shard, path in enumerate(paths):
        if path.exists():
            read_footer(RecordFiles([path]), 0, header, shard)
    if found is None:
        _write_json(folder / "header.json", header)
    return header


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
