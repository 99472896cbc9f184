"""Images enlarged and reduced as other libraries do it, by one small matrix an axis.

Networks that judge images were trained and are quoted behind particular ones; another moves a FID
by more than most methods do (Parmar et al. 2022, table 1).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Matrix = Float[np.ndarray, "out in"]


def tf1_matrix(size: int, out: int) -> Matrix:
    """TensorFlow 1's `ResizeBilinear` without aligned corners or half pixels.

    Sample `i` is at `i size / out`, between that pixel and the next, the last one repeated: it
    leans to the upper left. Computed in float32, as there.

    >>> tf1_matrix(2, 4).tolist()
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.0, 1.0]]
    """
    at = np.arange(out, dtype=np.float32) * (np.float32(size) / np.float32(out))
    low = np.minimum(np.floor(at).astype(int), size - 1)
    return _between(low, np.minimum(low + 1, size - 1), at - low, size)


def bilinear_matrix(size: int, out: int) -> Matrix:
    """Bilinear with half pixels and without antialiasing: torch's `interpolate`, of pytorch-fid.

    Positions are rounded to float32 as there.

    >>> bilinear_matrix(2, 4).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    # A float32 scale, multiplied and added in one.
    scale = np.float64(np.float32(size / out))
    at = np.maximum((scale * (np.arange(out) + 0.5) - 0.5).astype(np.float32), 0)
    low = np.minimum(np.floor(at).astype(int), size - 1)
    return _between(low, np.minimum(low + 1, size - 1), at - low, size)


def bicubic_matrix(size: int, out: int) -> Matrix:
    """Pillow's bicubic, antialiased where it reduces: Keys's kernel with -1/2, scaled.

    >>> bicubic_matrix(4, 4).tolist() == np.eye(4).tolist()
    True
    """
    scale = size / out
    width = max(scale, 1.0)
    matrix = np.zeros((out, size))
    for i in range(out):
        centre = (i + 0.5) * scale
        first = max(int(centre - 2 * width + 0.5), 0)
        last = min(int(centre + 2 * width + 0.5), size)
        weights = _keys((np.arange(first, last) + 0.5 - centre) / width)
        matrix[i, first:last] = weights / weights.sum()
    return matrix.astype(np.float32)


def sparse_bicubic_matrix(size: int, out: int) -> Matrix:
    """torch's bicubic `interpolate`: Keys's kernel with -3/4, borders repeated, no antialiasing.

    How vision transformers bring their positions to another grid.

    >>> sparse_bicubic_matrix(3, 3).tolist() == np.eye(3).tolist()
    True
    """
    scale = np.float64(np.float32(size / out))
    at = (scale * (np.arange(out) + 0.5) - 0.5).astype(np.float32)
    low = np.floor(at).astype(int)
    matrix = np.zeros((out, size))
    for tap in range(-1, 3):
        weights = _keys(at.astype(np.float64) - (low + tap), -0.75)
        np.add.at(matrix, (np.arange(out), np.clip(low + tap, 0, size - 1)), weights)
    return matrix.astype(np.float32)


def resize(
    x: Float[Array, "c h w"],
    size: tuple[int, int],
    matrix: Callable[[int, int], Matrix] = bicubic_matrix,
) -> Float[Array, "c H W"]:
    """An image at another size, rows and columns by `matrix(size, out)`, in float32.

    Nothing is rounded or clipped: a bicubic one can leave the range of its pixels.

    >>> resize(jnp.ones((3, 2, 4)), (5, 6)).shape
    (3, 5, 6)
    """
    if x.shape[1:] == size:
        return x
    rows, columns = (
        jnp.asarray(matrix(a, b), jnp.float32) for a, b in zip(x.shape[1:], size, strict=True)
    )
    precise = jax.lax.Precision.HIGHEST
    along = jnp.einsum("chw,Ww->chW", x.astype(jnp.float32), columns, precision=precise)
    return jnp.einsum("chW,Hh->cHW", along, rows, precision=precise)


def resize_and_crop(x: Float[Array, "c h w"], side: int) -> Float[Array, "c s s"]:
    """The middle square of an image, at `side` pixels: what square-minded encoders look at.

    >>> resize_and_crop(jnp.ones((3, 8, 12)), 4).shape
    (3, 4, 4)
    """
    _, h, w = x.shape
    short = min(h, w)
    height, width = (max(side, math.floor(a * side / short + 0.5)) for a in (h, w))
    x = resize(x, (height, width))
    top, left = (height - side) // 2, (width - side) // 2
    return x[:, top : top + side, left : left + side]


def _between(low: np.ndarray, high: np.ndarray, share: np.ndarray, size: int) -> Matrix:
    matrix = np.zeros((len(low), size), np.float32)
    rows = np.arange(len(low))
    matrix[rows, low] += (1 - share).astype(np.float32)
    matrix[rows, high] += share.astype(np.float32)
    return matrix


def _keys(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys's cubic convolution (1981, eq. 15 for -1/2), 0 beyond 2."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
