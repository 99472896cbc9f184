"""The terms of an adversarial autoencoder's loss: KL of the posterior, hinge losses of the GAN."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def kl_to_standard_normal(
    mean: Float[Array, "*shape"], logvar: Float[Array, "*shape"]
) -> Float[Array, ""]:
    """`KL(N(mean, exp(logvar)) || N(0, I)) = 1/2 sum (mean^2 + exp(logvar) - 1 - logvar)`, in nats.

    (Kingma & Welling 2014, appendix B)

    >>> float(kl_to_standard_normal(jnp.zeros(3), jnp.zeros(3)))
    0.0
    """
    return 0.5 * jnp.sum(mean**2 + jnp.expm1(logvar) - logvar)


def hinge_discriminator_loss(
    real: Float[Array, "*shape"], fake: Float[Array, "*shape"]
) -> Float[Array, ""]:
    """`1/2 (mean max(0, 1 - real) + mean max(0, 1 + fake))` of the logits (Lim & Ye 2017).

    >>> float(hinge_discriminator_loss(jnp.zeros(2), jnp.zeros(2)))
    1.0
    """
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def hinge_generator_loss(fake: Float[Array, "*shape"]) -> Float[Array, ""]:
    """`-mean fake` of the logits (Lim & Ye 2017).

    >>> float(hinge_generator_loss(jnp.ones(2)))
    -1.0
    """
    return -jnp.mean(fake)
