"""The latent cache: posteriors of all images and of their mirror images, written once.

A folder with `header.json`, which says what the latents were made from, with what and how;
`latents-00000-of-00256.arrayrecord` and so on, each complete or not there; and, when all are,
`skipped.json`. A shard has two records an image, so that one orientation is read and not both, and
a footer with the names of its images and of those skipped.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from ..durable import replacing
from .decoding import CROP, decode_and_crop
from .idx import DataError
from .record_files import RecordFiles, writing_records
from .records import ImageSource

FORMAT = 1
_DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(jnp.bfloat16)}
_SHARDS = 256  # at most, by default

Header = dict[str, Any]
Encode = Callable[[Any], tuple[Any, Any]]


def latent_header(
    source: ImageSource,
    *,
    size: int,
    shape: tuple[int, int, int],
    autoencoder: str,
    shift: Sequence[float],
    scale: Sequence[float],
    dtype: str = "float16",
    images_per_shard: int | None = None,
) -> Header:
    """What a latent cache is made from: its `header.json`, and what `open_latents` compares.

    **Arguments**:

    - `size`: of the crop; `shape`: of a latent, `(zc, zh, zw)`.
    - `autoencoder`: a hash of it, as `checkpoints.digest(eqx.filter(autoencoder, eqx.is_array))`.
    - `shift`, `scale`: a number a latent channel, `z = (z_raw - shift) * scale`. The cache holds
      `z_raw`; they are here so that a reader with others is refused.
    - `dtype`: `"float16"` or `"bfloat16"`.
    - `images_per_shard`: what is encoded again after an interruption, at most; `None` divides the
      images into at most 256 shards of at least 1024.

    >>> class Two:
    ...     class_names = ("cat", "dog")
    ...     __len__ = lambda self: 2
    ...     __getitem__ = lambda self, i: None
    ...     digest = lambda self: "3a7b"
    >>> header = latent_header(
    ...     Two(), size=256, shape=(4, 32, 32), autoencoder="e5f6", shift=[0.0] * 4, scale=[0.2] * 4
    ... )
    >>> header["source"], header["images"], header["images_per_shard"]
    ('3a7b', 2, 1024)
    """
    if dtype not in _DTYPES:
        raise ValueError(f"latent_header: dtype must be one of {', '.join(_DTYPES)}, got {dtype}.")
    if len(shift) != shape[0] or len(scale) != shape[0]:
        raise ValueError(
            f"latent_header: need a shift and a scale for each of {shape[0]} channels, got "
            f"{len(shift)} and {len(scale)}."
        )
    if images_per_shard is None:
        images_per_shard = max(1024, -(-len(source) // _SHARDS))
    if images_per_shard < 1:
        raise ValueError(f"latent_header: images_per_shard must be positive: {images_per_shard}.")
    return {
        "format": FORMAT,
        "autoencoder": autoencoder,
        "shift": list(map(float, shift)),
        "scale": list(map(float, scale)),
        "crop": CROP,
        "size": size,
        "shape": list(shape),
        "dtype": dtype,
        "source": source.digest(),
        "class_names": list(source.class_names),
        "images": len(source),
        "images_per_shard": images_per_shard,
    }


def write_latents(
    source: ImageSource,
    encode: Encode,
    folder: str | Path,
    header: Header,
    *,
    batch_size: int,
    strict: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Encodes all images and their mirror images into a cache, from where an earlier call stopped.

    A finished shard is never written again and a half one never has its name, so that a killed
    call is repeated; what it ends with is the same to the byte, if `encode` is deterministic.
    With several processes each writes every `process_count`-th shard into the same folder.

    **Arguments**:

    - `encode(images)`: uint8 `(batch_size, size, size, 3)` to `(mean, logvar)`, raw posteriors
      `(batch_size, zc, zh, zw)`. Always that one shape: the last batch of a shard is padded. It
      may divide a batch over this process's devices, but not over processes.
    - `header`: what `latent_header` gives.
    - `strict`: an unreadable image raises `DataError`. Otherwise it is left out, and `skipped.json`
      lists it with the reason.
    - `threads`: that read and decode; by default as many as there are cores.
    - `progress(done, total)`: called with the number of this process's images.

    **Raises** `DataError` if the folder holds the cache of another header, if a latent is not
    finite or if `strict` and an image is unreadable.
    """
    folder = Path(folder)
    if len(source) != header["images"]:
        raise ValueError(
            f"write_latents: the header is for {header['images']} images, got {len(source)}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    _begin(folder, header)
    paths = _shard_paths(folder, header)
    mine = range(process_index, len(paths), process_count)
    per_shard = header["images_per_shard"]
    indices = lambda s: range(s * per_shard, min((s + 1) * per_shard, len(source)))
    total, done = sum(len(indices(s)) for s in mine), 0
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for s in mine:
            if not paths[s].exists():
                decoded = _decoded(source, header["size"], indices(s), pool, ahead=4 * batch_size)
                try:
                    with writing_records(paths[s]) as write:
                        batches = _batched(decoded, batch_size, strict)
                        for seen in _write_shard(batches, encode, header, write, batch_size):
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


def open_latents(folder: str | Path, expect: Mapping[str, Any] | None = None) -> "Latents":
    """The cache in a folder, complete and made as expected.

    `expect` is a header or a part of one: what a reader without the images knows.

    **Raises** `DataError` if there is no cache, if shards are missing, or if it differs from what
    is expected, with every difference.
    """
    folder = Path(folder)
    header = _read_header(folder)
    if header is None:
        raise DataError(f"{folder}: expected a latent cache, but there is no header.json in it.")
    _compare(folder, header, {"format": FORMAT, **(expect or {})})
    missing = [path for path in _shard_paths(folder, header) if not path.exists()]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(_shard_paths(folder, header))} shards are missing, "
            f"the first {missing[0].name}. Run the caching again: it writes those."
        )
    return Latents(folder, header)


class Latents:
    """A complete latent cache, at random: picklable, for any number of threads.

    `len()` counts the images that were readable; `header` says what the latents are.
    """

    def __init__(self, folder: Path, header: Header):
        self.folder, self.header = folder, header
        self._files = RecordFiles(_shard_paths(folder, header))
        self._record = _record_dtype(header)

    def __len__(self) -> int:
        return len(self._files) // 2

    def read(
        self, indices: Int[np.ndarray, " n"], flipped: Bool[np.ndarray, " n"]
    ) -> dict[str, np.ndarray]:
        """`mean` and `logvar`, `(n, zc, zh, zw)`, `label` and `index`, int32 `(n,)`.

        `index` is the image's position in the source, which counts the skipped images too.
        """
        content = b"".join(self._files.read(2 * indices + flipped))
        if len(content) != len(indices) * self._record.itemsize:
            raise DataError(f"{self.folder}: its records are not those of its header; delete it.")
        records = np.frombuffer(content, self._record)
        dtype = _DTYPES[self.header["dtype"]]
        batch = {name: np.ascontiguousarray(records[name]) for name in self._record.names or ()}
        return {k: v.view(dtype) if v.dtype == np.uint16 else v for k, v in batch.items()}

    def ids(self) -> list[str]:
        """The image ids, in the order of the cache; it reads the footer of every shard."""
        return [id for footer in self._footers() for id in footer["ids"]]

    def skipped(self) -> dict[str, str]:
        """The reasons for the images left out, by id."""
        return {id: why for footer in self._footers() for id, why in footer["skipped"].items()}

    def _footers(self) -> Iterator[dict[str, Any]]:
        for k in range(len(self._files.paths)):
            yield json.loads(self._files.footer(k))


def latent_sampler(
    shift: Sequence[float], scale: Sequence[float]
) -> Callable[[Any, Key[Array, ""]], dict[str, Any]]:
    """`prepare(batch, key) -> {"x0", "cond"}` for `make_loss`: a fresh draw, inside jit.

    `z = (mean + exp(logvar / 2) n - shift) * scale` in float32, `n ~ N(0, I)`.

    >>> zeros = jnp.zeros((2, 1, 4, 4), jnp.float16)
    >>> batch = {"mean": zeros + 3, "logvar": zeros - 30, "label": jnp.arange(2)}
    >>> z = latent_sampler([1.0], [0.5])(batch, jax.random.key(0))["x0"]
    >>> z.dtype, round(float(z.mean()), 3)
    (dtype('float32'), 1.0)
    """
    shift_, scale_ = (np.asarray(v, np.float32)[:, None, None] for v in (shift, scale))

    def prepare(batch: Any, key: Key[Array, ""]):
        mean, logvar = (batch[name].astype(jnp.float32) for name in ("mean", "logvar"))
        noise = jax.random.normal(key, mean.shape)
        x0 = (mean + jnp.exp(0.5 * logvar) * noise - shift_) * scale_
        return {"x0": x0, "cond": batch["label"]}

    return prepare


def _record_dtype(header: Header) -> np.dtype:
    """One orientation of one image. The floats as uint16, since NumPy has no bfloat16 field."""
    moments = (np.uint16, tuple(header["shape"]))
    return np.dtype([("mean", *moments), ("logvar", *moments), ("label", "<i4"), ("index", "<i4")])


def _shard_paths(folder: Path, header: Header) -> list[Path]:
    count = -(-header["images"] // header["images_per_shard"])
    return [folder / f"latents-{s:05d}-of-{count:05d}.arrayrecord" for s in range(count)]


Decoded = tuple[int, int, str, np.ndarray | str]  # index, label, id, pixels or why there are none


def _decoded(
    source: ImageSource, size: int, indices: range, pool: ThreadPoolExecutor, ahead: int
) -> Generator[Decoded, None, None]:
    """The images in order, decoded by the pool, at most `ahead` of them before they are needed."""

    def decode(index: int) -> Decoded:
        record = source[index]
        try:
            return index, record.label, record.id, decode_and_crop(record.image, size, record.id)
        except DataError as error:
            return index, record.label, record.id, str(error)

    waiting: deque = deque()
    try:
        for index in indices:
            waiting.append(pool.submit(decode, index))
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
        if isinstance(item[3], str):
            if strict:
                raise DataError(item[3])
            skipped[item[2]] = item[3]
        else:
            images.append(item)
        if len(images) == batch_size:
            yield images, skipped
            images, skipped = [], {}
    if images or skipped:
        yield images, skipped


def _write_shard(batches, encode, header, write, batch_size: int) -> Iterator[int]:
    """Writes the records of one shard; yields the number of images seen so far."""
    ids: list[str] = []
    skipped: dict[str, str] = {}

    def begin(batch):
        images, left_out = batch
        if not images:
            return images, left_out, []
        pixels = np.stack([image[3] for image in images])
        padding = [(0, batch_size - len(images)), (0, 0), (0, 0), (0, 0)]
        pixels = np.pad(pixels, padding, mode="edge")
        mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
        return images, left_out, [encode(pixels), encode(mirrored)]

    for images, left_out, encoded in _one_ahead(map(begin, batches)):
        records = np.zeros((len(images), 2), _record_dtype(header))
        records["index"] = np.array([index for index, *_ in images]).reshape(-1, 1)
        records["label"] = np.array([label for _, label, *_ in images]).reshape(-1, 1)
        for side, moments in enumerate(encoded):
            for name, values in zip(("mean", "logvar"), moments, strict=True):
                records[name][:, side] = _stored(name, values, images, header, batch_size)
        for record in records.reshape(-1):
            write(record.tobytes())
        ids += [image[2] for image in images]
        skipped |= left_out
        yield len(ids) + len(skipped)
    write(json.dumps({"ids": ids, "skipped": skipped}).encode())


def _one_ahead(items: Iterator) -> Iterator:
    """Each item when the next one has begun: devices work while results are written."""
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
        stored = np.asarray(values)[: len(images)].astype(_DTYPES[header["dtype"]])
    finite = np.isfinite(stored.astype(np.float32)).all(axis=(1, 2, 3))
    if not finite.all():
        raise DataError(
            f"{images[int(finite.argmin())][2]}: its {name} is not finite in {header['dtype']}. "
            "Check the autoencoder, or cache in bfloat16, which has float32's range."
        )
    return stored.view(np.uint16)


def _begin(folder: Path, header: Header) -> None:
    """Writes the header into a new folder; refuses that of another cache."""
    found = _read_header(folder)
    if found is None:
        _write_json(folder / "header.json", header)
    else:
        _compare(folder, found, header)


def _read_header(folder: Path) -> Header | None:
    path = folder / "header.json"
    try:
        header = json.loads(path.read_text())
        if not isinstance(header, dict):
            raise ValueError("no JSON object")
        return header
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}. Delete the cache.") from error


def _compare(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    expected = json.loads(json.dumps(dict(expected)))
    differing = [name for name, value in expected.items() if found.get(name) != value]
    if differing:
        lines = (
            f"  {name}: it has {_short(found.get(name))}, expected {_short(expected[name])}\n"
            for name in differing
        )
        raise DataError(
            f"{folder}: this latent cache was made otherwise:\n{''.join(lines)}"
            "Use another folder, or delete this one to make it anew."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text)} characters)"


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
