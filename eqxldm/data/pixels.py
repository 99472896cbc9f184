"""Between stored images, uint8 `(n, h, w, c)`, and what the networks see, floats `(n, c, h, w)`."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def to_float(images: UInt8[Array, "n h w c"], *, pad: int = 0) -> Float[Array, "n c H W"]:
    """`x / 127.5 - 1`: bytes to [-1, 1], channels first, with a border of `pad` black pixels.

    Call it inside jit: it is the one transpose of an image's way.

    >>> to_float(jnp.zeros((2, 28, 28, 1), jnp.uint8), pad=2).shape
    (2, 1, 32, 32)
    """
    x = jnp.moveaxis(images.astype(jnp.float32) / 127.5 - 1, -1, 1)
    return jnp.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=-1.0)


def to_uint8(x: Float[Array, "n c H W"], *, pad: int = 0) -> UInt8[Array, "n h w c"]:
    """Inverts `to_float`: clips to [-1, 1], rounds to the nearest byte and cuts the border off.

    >>> to_uint8(to_float(jnp.full((1, 4, 4, 1), 200, jnp.uint8), pad=2), pad=2)[0, 0, 0]
    Array([200], dtype=uint8)
    """
    height, width = x.shape[2:]
    x = x[:, :, pad : height - pad, pad : width - pad]
    x = jnp.round((jnp.clip(x, -1.0, 1.0) + 1) * 127.5)
    return jnp.moveaxis(x, 1, -1).astype(jnp.uint8)
