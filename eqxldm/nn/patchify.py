"""Images to sequences of patches and back."""

from jaxtyping import Array, Float


def patchify(x: Float[Array, "c H W"], patch_size: int) -> Float[Array, "n d"]:
    """Cuts an image into `patch x patch` tokens, row by row: `c (h p) (w q) -> (h w) (c p q)`.

    >>> import jax.numpy as jnp
    >>> patchify(jnp.ones((4, 8, 8)), 2).shape
    (16, 16)
    """
    c, height, width = x.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patchify: {height} x {width} does not divide by the patch size {patch_size}."
        )
    x = x.reshape(c, height // patch_size, patch_size, width // patch_size, patch_size)
    return x.transpose(1, 3, 0, 2, 4).reshape(-1, c * patch_size * patch_size)


def unpatchify(
    tokens: Float[Array, "n d"], height: int, width: int, patch_size: int
) -> Float[Array, "c height width"]:
    """Tokens to an image: `(h w) (p q c) -> c (h p) (w q)`, channels last in a token as in DiT.

    Not the inverse of `patchify`, whose tokens are channels first: the published weights of DiT
    have this asymmetry.

    >>> import jax.numpy as jnp
    >>> unpatchify(jnp.ones((16, 16)), 8, 8, 2).shape
    (4, 8, 8)
    """
    h, w = height // patch_size, width // patch_size
    x = tokens.reshape(h, w, patch_size, patch_size, -1)
    return x.transpose(4, 0, 2, 1, 3).reshape(-1, height, width)
