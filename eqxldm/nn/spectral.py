"""Spectral normalisation: a convolution whose weights have the largest singular value 1."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .conv import Conv

SQUARINGS = 10


def spectral_norm(matrix: Float[Array, "m n"]) -> Float[Array, ""]:
    """The largest singular value, `sigma = u^T W v`, with the gradient `d sigma / dW = u v^T`.

    Without a state and without chance: `v` is the largest column of `(W^T W)^1024` (of the smaller
    of the two Gram matrices), which ten squarings give. They are `2^10` power iterations from each
    unit vector, of which one is never orthogonal to the answer; hence no gap between the singular
    values is needed. The value is never too large but by rounding, and too small by less than 1e-3.
    A zero matrix gives 0 and the gradient 0.

    **Source**: Miyato et al. 2018, who keep `u` from step to step instead (algorithm 1).

    >>> float(spectral_norm(jnp.diag(jnp.array([3.0, -4.0]))))
    4.0
    """
    with jax.default_matmul_precision("highest"):
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(matrix)))
        w = jax.lax.stop_gradient(matrix) / jnp.where(largest > 0, largest, 1.0)
        wide = w.shape[1] > w.shape[0]
        power = w @ w.T if wide else w.T @ w
        for _ in range(SQUARINGS):
            power = power / jnp.where(largest > 0, jnp.trace(power), 1.0)
            power = power @ power
        a = _unit(power[:, jnp.argmax(jnp.diagonal(power))])
        b = _unit(w.T @ a if wide else w @ a)
        u, v = (a, b) if wide else (b, a)
        return u @ matrix @ v


def _unit(x: Float[Array, " n"]) -> Float[Array, " n"]:
    x = x / jnp.maximum(jnp.max(jnp.abs(x)), jnp.finfo(x.dtype).tiny)
    return x * jax.lax.rsqrt(jnp.maximum(x @ x, jnp.finfo(x.dtype).tiny))


class SpectralConv(eqx.Module):
    """`Conv` with the weights `w / sigma(w)`, `w` taken as a matrix `(size size in, out)`.

    A function of its parameters alone: no state to carry, the same in training and after. Weights
    that are all zero are left so. Arguments as `Conv`; `gain` does not matter to the outputs.

    >>> conv = SpectralConv(3, 8, 3, stride=2, key=jax.random.key(0))
    >>> conv(jnp.ones((4, 4, 3))).shape
    (2, 2, 8)
    """

    conv: Conv

    def __init__(self, in_channels, out_channels, size, *, stride=1, padding=None, gain=1.0, key):
        self.conv = Conv(
            in_channels, out_channels, size, stride=stride, padding=padding, gain=gain, key=key
        )

    def __call__(self, x: Float[Array, "h w in"]) -> Float[Array, "h2 w2 out"]:
        weight = self.conv.weight
        sigma = spectral_norm(weight.reshape(-1, weight.shape[-1]))
        weight = weight / jnp.where(sigma > 0, sigma, 1.0)
        return eqx.tree_at(lambda c: c.weight, self.conv, weight)(x)
