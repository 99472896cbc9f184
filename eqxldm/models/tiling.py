"""Large batches in slices and large images in tiles, when the whole does not fit the memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from .autoencoder import AutoencoderKL
from .latents import Posterior


def encode_sliced(
    autoencoder: AutoencoderKL,
    x: Float[Array, "b c h w"],
    size: int,
    *,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "b zc zh zw"]:
    """`vmap(encode)`, `size` images at a time: the memory of one slice instead of the batch.

    With a `key` every latent is a sample of its posterior, else the mode. Where `size` does not
    divide the batch, the rest is a second, smaller program.

    >>> ae = AutoencoderKL(1, 4, channels=(8, 8), blocks=1, groups=4, key=jax.random.key(0))
    >>> encode_sliced(ae, jnp.zeros((6, 1, 8, 8)), 2).shape
    (6, 4, 4, 4)
    """
    _check_slice(size)
    if key is None:
        return jax.lax.map(autoencoder.encode, x, batch_size=size)
    draw = lambda pair: autoencoder.encode(pair[0], key=pair[1])
    return jax.lax.map(draw, (x, jax.random.split(key, x.shape[0])), batch_size=size)


def decode_sliced(
    autoencoder: AutoencoderKL, z: Float[Array, "b zc zh zw"], size: int
) -> Float[Array, "b c h w"]:
    """`vmap(decode)`, `size` latents at a time: the memory of one slice instead of the batch.

    >>> ae = AutoencoderKL(1, 4, channels=(8, 8), blocks=1, groups=4, key=jax.random.key(0))
    >>> decode_sliced(ae, jnp.zeros((6, 4, 4, 4)), 2).shape
    (6, 1, 8, 8)
    """
    _check_slice(size)
    return jax.lax.map(autoencoder.decode, z, batch_size=size)


def encode_tiled(
    autoencoder: AutoencoderKL,
    x: Float[Array, "c h w"],
    *,
    tile: int = 512,
    overlap: int = 128,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "zc zh zw"]:
    """`encode` of a large image, tile by tile: the memory of one tile.

    Mean and log-variance are blended as `decode_tiled` blends pixels; with a `key` the sample is
    drawn from the blended posterior, so that no noise is averaged away. Arguments and limits are
    those of `decode_tiled`.

    >>> ae = AutoencoderKL(1, 4, channels=(8, 8), blocks=1, groups=4, key=jax.random.key(0))
    >>> encode_tiled(ae, jnp.zeros((1, 20, 36)), tile=16, overlap=4).shape
    (4, 10, 18)
    """
    _, h, w = autoencoder.latent_shape(*x.shape[1:])
    rows, columns = _axes(autoencoder, (h, w), tile, overlap)

    def moments(tile):
        posterior = autoencoder.posterior(tile)
        return jnp.concatenate([posterior.mean, posterior.logvar])

    mean, logvar = jnp.split(_blend(moments, x, rows, columns, autoencoder.factor, 1), 2)
    posterior = autoencoder.normalise(Posterior(mean, logvar))
    return posterior.mean if key is None else posterior.sample(key)


def decode_tiled(
    autoencoder: AutoencoderKL,
    z: Float[Array, "zc zh zw"],
    *,
    tile: int = 512,
    overlap: int = 128,
) -> Float[Array, "c h w"]:
    """`decode` of a large latent, tile by tile: the memory of one tile.

    `y(p) = sum_i w_i(p) y_i(p)` over the tiles `i` that hold `p`, with `sum_i w_i(p) = 1` and
    `w_i` rising linearly over the overlap with the next tile. An image that one tile covers is
    decoded whole. The tiles have one size and lie evenly, each a whole number of latent cells,
    so that one compiled program does them all.

    **Arguments**: `tile` and `overlap` are in pixels of the image, here and in `encode_tiled`,
    and multiples of the factor; neighbours overlap by at least `overlap < tile`.

    The result is not that of `decode`: GroupNorm's statistics, and the attention in the middle,
    are those of a tile and not of the image, and a convolution sees zeros beyond a tile's border.
    The first moves a tile's tone, which the blending turns into a slow drift and which shrinks as
    tiles grow; the second stays within the receptive field of the border, where a tile has little
    weight. Overlaps of a quarter of a tile, as here, are usual. For
    1024 x 1024 pixels `kl_f8` needs 0.8 GB of temporaries instead of 3.2 (XLA:CPU, float32).

    >>> ae = AutoencoderKL(1, 4, channels=(8, 8), blocks=1, groups=4, key=jax.random.key(0))
    >>> decode_tiled(ae, jnp.zeros((4, 10, 18)), tile=16, overlap=4).shape
    (1, 20, 36)
    """
    rows, columns = _axes(autoencoder, z.shape[1:], tile, overlap)
    return _blend(autoencoder.decode, z, rows, columns, 1, autoencoder.factor)


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where the fewest tiles begin that cover `size` and overlap by at least `overlap`.

    >>> tile_starts(20, 8, 2), tile_starts(21, 8, 2), tile_starts(5, 8, 2)
    ([0, 6, 12], [0, 4, 9, 13], [0])
    """
    if size <= tile:
        return [0]
    steps = -(-(size - tile) // (tile - overlap))
    return [round(k * (size - tile) / steps) for k in range(steps + 1)]


def tile_weights(starts: list[int], tile: int) -> Float[np.ndarray, "n tile"]:
    """The weight of every position of every tile: linear ramps, summing to 1 where tiles overlap.

    >>> tile_weights([0, 3], 5)
    array([[1.  , 1.  , 1.  , 0.75, 0.25],
           [0.25, 0.75, 1.  , 1.  , 1.  ]])
    """
    at = np.arange(tile) + 0.5
    weights = np.ones((len(starts), tile))
    total = np.zeros(starts[-1] + tile)
    for k, start in enumerate(starts):
        if k > 0:
            shared = max(starts[k - 1] + tile - start, 0.5)
            weights[k] = np.minimum(weights[k], at / shared)
        if k < len(starts) - 1:
            shared = max(start + tile - starts[k + 1], 0.5)
            weights[k] = np.minimum(weights[k], (tile - at) / shared)
        total[start : start + tile] += weights[k]
    # Of three tiles over one place, the ramps sum to more than 1.
    return np.stack([w / total[s : s + tile] for s, w in zip(starts, weights, strict=True)])


def _check_slice(size):
    if size < 1:
        raise ValueError(f"AutoencoderKL: a slice needs at least 1 example, got {size}.")


def _axes(autoencoder, shape, tile, overlap):
    """`(starts, tile)` in latent cells for both axes."""
    f = autoencoder.factor
    if tile < 1 or overlap < 0 or tile % f or overlap % f:
        raise ValueError(
            f"AutoencoderKL: tile {tile} and overlap {overlap} are pixels and must be multiples "
            f"of the downsampling factor {f}."
        )
    if overlap >= tile:
        raise ValueError(f"AutoencoderKL: overlap {overlap} must be smaller than tile {tile}.")
    tile, overlap = tile // f, overlap // f
    return [(tile_starts(size, tile, overlap), min(size, tile)) for size in shape]


def _blend(
    f: Callable[[Float[Array, "c h w"]], Float[Array, "c2 h2 w2"]],
    x: Float[Array, "c H W"],
    rows: tuple[list[int], int],
    columns: tuple[list[int], int],
    scale_in: int,
    scale_out: int,
) -> Float[Array, "c2 H2 W2"]:
    """`f` on each tile of `x`, blended; a cell is `scale_in` wide in `x`, `scale_out` in `f(x)`."""
    if len(rows[0]) == len(columns[0]) == 1:
        return f(x)
    window = (x.shape[0], rows[1] * scale_in, columns[1] * scale_in)
    tile = jax.eval_shape(f, jax.ShapeDtypeStruct(window, x.dtype))
    height, width = (size * scale_out // scale_in for size in x.shape[1:])

    def weights(starts, tile):
        return tile_weights([s * scale_out for s in starts], tile * scale_out).astype(np.float32)

    def add(total, place):
        i, j, row_weights, column_weights = place
        y = f(jax.lax.dynamic_slice(x, (0, i * scale_in, j * scale_in), window))
        y = y.astype(jnp.float32) * row_weights[:, None] * column_weights
        at = (0, i * scale_out, j * scale_out)
        y = y + jax.lax.dynamic_slice(total, at, y.shape)
        return jax.lax.dynamic_update_slice(total, y, at), None

    grid = lambda a, b: (np.repeat(a, len(b), axis=0), np.tile(b, (len(a), *(1,) * (b.ndim - 1))))
    i, j = grid(np.array(rows[0], np.int32), np.array(columns[0], np.int32))
    places = i, j, *grid(weights(*rows), weights(*columns))
    total, _ = jax.lax.scan(add, jnp.zeros((tile.shape[0], height, width)), places)
    return total.astype(tile.dtype)
