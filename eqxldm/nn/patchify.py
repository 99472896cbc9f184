"""Images to sequences of patches and back."""

from jaxtyping import Array, Float


def patchify(x: Float[Array, "c H W"], patch: int) -> Float[Array, "n d"]:
    """Cuts an image into `patch x patch` tokens, row by row: `c (h p) (w q) -> (h w) (c p q)`.

    >>> import jax.numpy as jnp
    >>> patchify(jnp.ones((4, 8, 8)), 2).shape
    (16, 16)
    """
    c, height, width = x.shape
    if height % patch or width % patch:
        raise ValueError(f"patchify: {height} x {width} does not divide by the patch size {patch}.")
    x = x.reshape(c, height // patch, patch, width // patch, patch)
    return x.transpose(1, 3, 0, 2, 4).reshape(-1, c * patch * patch)


def unpatchify(
    tokens: Float[Array, "n d"], height: int, width: int, patch: int
) -> Float[Array, "c height width"]:
    """Tokens to an image: `(h w) (p q c) -> c (h p) (w q)`, channels last in a token as in DiT.

    Not the inverse of `patchify`, whose tokens are channels first: the published weights of DiT
    have this asymmetry.

    >>> import jax.numpy as jnp
    >>> unpatchify(jnp.ones((16, 16)), 8, 8, 2).shape
    (4, 8, 8)
    """
    h, w = height // patch, width // patch
    x = tokens.reshape(h, w, patch, patch, -1)
    return x.transpose(4, 0, 2, 1, 3).reshape(-1, height, width)
