"""The Gaussian error linear unit and its two approximations: published weights fit one of them."""

import jax
from jaxtyping import Array, Float


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x Phi(x)`, with the normal distribution's own function (Hendrycks & Gimpel 2016).

    >>> import jax.numpy as jnp
    >>> print(f'{gelu(jnp.array(1.0)):.4f}')
    0.8413
    """
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`: that of DiT, T5 and GPT-2.

    >>> import jax.numpy as jnp
    >>> print(f'{gelu_tanh(jnp.array(1.0)):.4f}')
    0.8412
    """
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x sigmoid(1.702 x)`: that of OpenAI's CLIP.

    >>> import jax.numpy as jnp
    >>> print(f'{quick_gelu(jnp.array(1.0)):.4f}')
    0.8458
    """
    return x * jax.nn.sigmoid(1.702 * x)
