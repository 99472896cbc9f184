"""IDX files, the format of MNIST: a big-endian header, then the bytes of one array."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

_UINT8 = 0x08
_DTYPES = {0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}


class DataError(ValueError):
    """Data that cannot be used or found; the message says what, why and what to do."""


def read_idx(path: str | Path) -> UInt8[np.ndarray, "..."]:
    """The array of a uint8 IDX file, gzip'd or not (its first bytes decide, not its name).

    **Raises** `DataError` if the file cannot be read, is corrupt, truncated or too long, or holds
    another format or dtype.

    Source: the section "the IDX file format" of LeCun, Cortes & Burges, "The MNIST database".

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "labels")
    ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    ...     read_idx(path)
    array([7, 9], dtype=uint8)
    """
    return parse_idx(read_content(path), path)


def read_content(path: str | Path) -> bytes:
    """The bytes of a file, decompressed if they start like gzip.

    **Raises** `DataError` if the file cannot be read or its compressed stream is damaged.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except EOFError as error:
        raise DataError(
            f"{path}: expected a complete gzip file, but its {len(content)} bytes end inside the "
            "compressed data: the file is truncated."
        ) from error
    except (OSError, zlib.error) as error:
        raise DataError(
            f"{path}: expected a valid gzip file, but its {len(content)} bytes are corrupt "
            f"({error})."
        ) from error


def parse_idx(content: bytes, path: str | Path = "IDX data") -> UInt8[np.ndarray, "..."]:
    """The array that `content`, the bytes of an uncompressed uint8 IDX file, describes.

    **Arguments**:

    - `content`: `0, 0, dtype code, rank`, then `rank` big-endian uint32 sizes, then the array in
      row-major order. Only the dtype code 8 (uint8) is read.
    - `path`: what error messages call it.

    **Raises** `DataError` if the header or the number of bytes is not that.

    >>> parse_idx(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 3, 4, 5, 6]))
    array([[4, 5, 6]], dtype=uint8)
    """
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DataError(
            f"{path}: expected an IDX file, which starts with the bytes 00 00, a dtype code and a "
            f"rank, got {content[:4].hex(' ') or 'an empty file'}."
        )
    code, rank = content[2], content[3]
    if code != _UINT8:
        came = f"0x{code:02x} ({_DTYPES.get(code, 'unknown')})"
        raise DataError(f"{path}: expected the IDX dtype code 0x08 (uint8), got {came}.")
    start = 4 + 4 * rank
    if rank == 0 or len(content) < start:
        raise DataError(
            f"{path}: expected an IDX header of rank 1 or more, got rank {rank} in "
            f"{len(content)} bytes."
        )
    shape = struct.unpack(f">{rank}I", content[4:start])
    expected = start + math.prod(shape)
    if len(content) != expected:
        problem = "is truncated" if len(content) < expected else "has bytes left over"
        raise DataError(
            f"{path}: {problem}: expected {expected} bytes for the shape {shape} in its header, "
            f"got {len(content)}."
        )
    try:
        # A copy, because an array over `bytes` cannot be written.
        return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
    except ValueError as error:
        raise DataError(f"{path}: expected a shape that NumPy can hold, got {shape}.") from error
