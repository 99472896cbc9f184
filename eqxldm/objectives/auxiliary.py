"""What is added to a denoising loss: terms on directions, on a network's tokens, on features."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..paths import at_least_float32

EXAMPLES = "examples"  # the name of the batch's axis inside `training.make_loss`
FLOOR = 1e-4  # of the mean square of a vector whose direction is asked for


def cosine_loss(
    found: Float[Array, "c *spatial"], target: Float[Array, "c *spatial"]
) -> Float[Array, ""]:
    """`mean (1 - cos(found, target))`, the angle over the channels at each place.

    Of velocities beside their mean square (Yao et al. 2025, LightningDiT, section 4.2; from
    FasterDiT, Yao et al. 2024). A mean square below `FLOOR` counts as that: the derivative of an
    angle at zero, where a network starts, is infinite.

    >>> x = jnp.array([1.0, 1.0])
    >>> float(cosine_loss(2 * x, x).round(3)), float(cosine_loss(-x, x).round(3))
    (0.0, 2.0)
    """
    return 1 - jnp.mean(_cosine(found, target, 0))


def dispersive_loss(tokens: Float[Array, "b *shape"], temperature: float = 1.0) -> Float[Array, ""]:
    """`log mean_ij exp(-|z_i - z_j|^2 / (d temperature))` of a batch: what pushes tokens apart.

    All `d` numbers of an example are one vector `z`, and the pairs with `i = j` count (Wang & He
    2025, "Diffuse and disperse", InfoNCE with squared distances; `d` and the diagonal as in their
    code). It is at most 0, where all are alike.

    >>> float(dispersive_loss(jnp.ones((3, 4)))) == 0
    True
    """
    z = tokens.reshape(len(tokens), -1).astype(at_least_float32(tokens.dtype))
    # Distances do not change when the mean is taken off, and cancel less.
    z = z - jnp.mean(z, axis=0)
    squares = jnp.sum(z * z, axis=1)
    products = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST)
    distances = jnp.maximum(squares[:, None] + squares - 2 * products, 0.0)
    scores = -distances / (z.shape[1] * temperature)
    return jax.nn.logsumexp(scores) - 2 * jnp.log(len(z))


def alignment_loss(found: Float[Array, "n f"], features: Float[Array, "m g"]) -> Float[Array, ""]:
    """`-mean cos(found, features)` over tokens: that found tell what a good encoder's do.

    `found` are a network's tokens, projected (`nn.Aligned`), and `features` an encoder's of the
    clean image, patch by patch (Yu et al. 2024, REPA, eq. 8, with the cosine as similarity).

    **Raises** `ValueError` where their shapes differ.

    >>> float(alignment_loss(jnp.ones((2, 3)), jnp.ones((2, 3))).round(3))
    -1.0
    """
    if found.shape != features.shape:
        raise ValueError(
            f"alignment_loss: the projected tokens have the shape {found.shape} and the features "
            f"{features.shape}. Resize the features to the grid of the patches."
        )
    return -jnp.mean(_cosine(found, features, -1))


def _cosine(a: Array, b: Array, axis: int) -> Array:
    a, b = (x.astype(at_least_float32(x.dtype)) for x in (a, b))
    size = lambda x: jnp.sqrt(jnp.maximum(jnp.mean(x * x, axis), FLOOR))
    return jnp.mean(a * b, axis) / (size(a) * size(b))
