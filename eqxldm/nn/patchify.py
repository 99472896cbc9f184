"""Latents to sequences of patches and back, of any number of axes."""

import math

from jaxtyping import Array, Float


def patch_sizes(patch_size: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    """A patch's size along each axis; one number means the same along all.

    **Raises** `ValueError` for another number of sizes.

    >>> patch_sizes(2, 3), patch_sizes((1, 2, 2), 3)
    ((2, 2, 2), (1, 2, 2))
    """
    sizes = (patch_size,) * axes if isinstance(patch_size, int) else tuple(patch_size)
    if len(sizes) != axes:
        raise ValueError(f"patch_size: need one number, or {axes} for {axes} axes, got {sizes}.")
    return sizes


def patchify(
    x: Float[Array, "c *spatial"], patch_size: int | tuple[int, ...]
) -> Float[Array, "n d"]:
    """Cuts an image into `patch x patch` tokens, row by row: `c (h p) (w q) -> (h w) (c p q)`.

    With one axis it is a sequence, with three a clip: `c (f o) (h p) (w q) -> (f h w) (c o p q)`.

    **Raises** `ValueError` for sides that do not divide by the patch.

    >>> import jax.numpy as jnp
    >>> patchify(jnp.ones((4, 8, 8)), 2).shape, patchify(jnp.ones((4, 3, 8, 8)), (1, 2, 2)).shape
    ((16, 16), (48, 16))
    """
    channels, *spatial = x.shape
    grid, sizes = patch_grid(tuple(spatial), patch_size, "patchify")
    n = len(grid)
    x = x.reshape(channels, *(k for pair in zip(grid, sizes, strict=True) for k in pair))
    cells, insides = range(1, 2 * n + 1, 2), range(2, 2 * n + 1, 2)
    return x.transpose(*cells, 0, *insides).reshape(math.prod(grid), -1)


def unpatchify(
    tokens: Float[Array, "n d"],
    spatial: tuple[int, ...],
    patch_size: int | tuple[int, ...],
    *,
    channels_first: bool = False,
) -> Float[Array, "c *spatial"]:
    """Tokens to an image: `(h w) (p q c) -> c (h p) (w q)`, channels last in a token as in DiT.

    Not the inverse of `patchify`, whose tokens are channels first: the published weights of DiT
    have this asymmetry. With `channels_first` it is, as FLUX has it. `spatial` is the size of what
    comes out, of any number of axes.

    >>> import jax.numpy as jnp
    >>> unpatchify(jnp.ones((16, 16)), (8, 8), 2).shape
    (4, 8, 8)
    """
    grid, sizes = patch_grid(spatial, patch_size, "unpatchify")
    n = len(grid)
    inside = (-1, *sizes) if channels_first else (*sizes, -1)
    channel, first = (n, n + 1) if channels_first else (2 * n, n)
    x = tokens.reshape(*grid, *inside)
    pairs = (k for i in range(n) for k in (i, first + i))
    return x.transpose(channel, *pairs).reshape(-1, *spatial)


def patch_grid(
    spatial: tuple[int, ...], patch_size: int | tuple[int, ...], name: str = "patch_grid"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many patches lie along each axis, and their sizes.

    **Raises** `ValueError`, which begins with `name`, for a side that does not divide.

    >>> patch_grid((8, 12), 4)
    ((2, 3), (4, 4))
    """
    sizes = patch_sizes(patch_size, len(spatial))
    if any(p < 1 or side % p for side, p in zip(spatial, sizes, strict=True)):
        shown = lambda sides: " x ".join(map(str, sides))
        patch = sizes[0] if len(set(sizes)) == 1 else shown(sizes)
        raise ValueError(f"{name}: {shown(spatial)} does not divide by the patch size {patch}.")
    return tuple(side // p for side, p in zip(spatial, sizes, strict=True)), sizes
