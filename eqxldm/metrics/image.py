"""Image similarity: PSNR and SSIM of images in [0, 1]."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Images = Float[Array, "b c h w"]


def psnr(x: Images, y: Images) -> Float[Array, " b"]:
    """Peak signal-to-noise ratio in dB of each pair: `-10 log10 mean (x - y)^2`, peak 1.

    Infinite for equal images.

    >>> psnr(jnp.zeros((1, 1, 4, 4)), 0.1 * jnp.ones((1, 1, 4, 4)))
    Array([20.], dtype=float32)
    """
    return -10 * jnp.log10(jnp.mean((x - y) ** 2, axis=(1, 2, 3)))


def ssim(x: Images, y: Images) -> Float[Array, " b"]:
    """Structural similarity of each pair, in [-1, 1], 1 for equal ones (Wang et al. 2004, eq. 13).

    The published settings: a Gaussian window 11 x 11 of standard deviation 1.5 inside the image,
    `K1 = 0.01`, `K2 = 0.03`, range 1; averaged over positions and channels. Both sides of the
    image must be at least 11.

    >>> ssim(jnp.ones((1, 1, 16, 16)), jnp.ones((1, 1, 16, 16)))
    Array([1.], dtype=float32)
    """
    if min(x.shape[2:]) < 11:
        raise ValueError(f"ssim: images must be at least 11 x 11, got {x.shape[2:]}.")
    mean_x, mean_y = _blur(x), _blur(y)
    # The second moments are of small numbers whose means cancel: this is float32's weak spot,
    # and the constants c1 and c2 are far above its error.
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _blur(x: Images) -> Float[Array, "b c h2 w2"]:
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = jnp.asarray(window / window.sum(), x.dtype)
    along = lambda v: jnp.convolve(v, window, mode="valid", precision="highest")
    for axis in (2, 3):
        x = jnp.moveaxis(x, axis, -1)
        flat = jax.vmap(along)(x.reshape(-1, x.shape[-1]))
        x = jnp.moveaxis(flat.reshape(*x.shape[:-1], -1), -1, axis)
    return x
