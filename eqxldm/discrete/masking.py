"""The masking path: tokens become [MASK] one by one, and what a network says of those that are."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

# t in [0, 1] to the probability that a token is masked: 0 at t = 0, 1 at t = 1, rising.
Schedule = Callable[[Any], Any]


def linear_masking(t: Any) -> Any:
    """`p(t) = t`, the schedule of MDLM and LLaDA, whose weight is `1 / t` (Sahoo et al. 2024).

    >>> linear_masking(0.25)
    0.25
    """
    return t


def cosine_masking(t: Any) -> Any:
    """`p(t) = sin(pi t / 2)`, MaskGIT's: few tokens in the first steps of sampling, many at last.

    (Chang et al. 2022, section 3.3; `alpha = 1 - cos(pi (1 - t) / 2)` of Shi et al. 2024)

    >>> round(float(cosine_masking(1 / 3)), 4)
    0.5
    """
    return jnp.sin(jnp.pi * jnp.asarray(t) / 2)


def polynomial_masking(power: float) -> Schedule:
    """`p(t) = t^power` (Shi et al. 2024, table 1), `power > 0`.

    >>> polynomial_masking(2.0)(0.5)
    0.25
    """
    if not power > 0:
        raise ValueError(f"polynomial_masking: power must be positive, got {power}.")
    return lambda t: t**power


class Masking(eqx.Module):
    """Each token is replaced by [MASK] with the probability `p(t)`, independently of the others.

    In the notation of the literature `p(t) = 1 - alpha_t` (Sahoo et al. 2024, eq. 3). Written with
    `p`, nothing cancels near the data, where the weights of the loss are large.

    **Arguments**: `mask_id` is the token that means [MASK]; `probability` is `linear_masking`,
    `cosine_masking`, `polynomial_masking(r)` or any function that JAX can differentiate.

    >>> path = Masking(mask_id=9)
    >>> path.mask(jnp.arange(4), jnp.array(1.0), key=jax.random.key(0)).tolist()
    [9, 9, 9, 9]
    >>> float(path.weight(jnp.array(0.25)))
    4.0
    """

    mask_id: int = eqx.field(static=True)
    probability: Schedule = eqx.field(static=True, default=linear_masking)

    def __check_init__(self):
        if self.mask_id < 0:
            raise ValueError(f"Masking: mask_id must be a token, 0 or above, got {self.mask_id}.")

    def mask(
        self, x0: Int[Array, " n"], t: Float[Array, "..."], *, key: Key[Array, ""]
    ) -> Int[Array, " n"]:
        """`x_t` of one example; `t` is a scalar, or a time for each token."""
        hidden = jax.random.uniform(key, x0.shape) < self.probability(t)
        return jnp.where(hidden, self.mask_id, x0)

    def weight(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """`p'(t) / p(t)`: what makes the masked tokens' cross entropy a bound.

        (Sahoo et al. 2024, eq. 10; Shi et al. 2024, eq. 4: `-alpha' / (1 - alpha)`)
        """
        p, slope = jax.jvp(self.probability, (t,), (jnp.ones_like(t),))
        return slope / p

    def reveals(self, t: Any, s: Any) -> Any:
        """The probability that a token masked at `t` is revealed by `s < t`: `1 - p(s) / p(t)`."""
        return 1 - self.probability(s) / self.probability(t)


def log_probabilities(
    logits: Float[Array, "n v"], mask_id: int | None = None
) -> Float[Array, "n v"]:
    """`log softmax` in float32, in which [MASK] has none: a network never predicts it.

    The first half of SUBS (Sahoo et al. 2024, section 3.2.3). `mask_id` None: there is no mask.

    >>> jnp.exp(log_probabilities(jnp.zeros((1, 3)), 2)).tolist()
    [[0.5, 0.5, 0.0]]
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if mask_id is not None:
        if not mask_id < logits.shape[-1]:
            raise ValueError(
                f"log_probabilities: mask_id {mask_id} is outside of the {logits.shape[-1]} tokens "
                "of the network. Make it with a vocabulary that has the mask."
            )
        logits = logits.at[:, mask_id].set(-jnp.inf)
    return jax.nn.log_softmax(logits, axis=-1)


def subs(logits: Float[Array, "n v"], x_t: Int[Array, " n"], mask_id: int) -> Float[Array, "n v"]:
    """`log p(x0 | x_t)`: the network's where [MASK] stands, certainty where a token does.

    The parameterisation SUBS, "substitution": zero probability of [MASK], and tokens that are
    visible are copied (Sahoo et al. 2024, section 3.2.3).

    >>> jnp.exp(subs(jnp.zeros((2, 3)), jnp.array([2, 0]), mask_id=2)).tolist()
    [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]
    """
    copied = jnp.where(jnp.arange(logits.shape[-1]) == x_t[:, None], 0.0, -jnp.inf)
    masked = (x_t == mask_id)[:, None]
    return jnp.where(masked, log_probabilities(logits, mask_id), copied)


def token_losses(
    logits: Float[Array, "n v"], x0: Int[Array, " n"], mask_id: int | None = None
) -> Float[Array, " n"]:
    """`-log p(x0[i])` at each position, in nats.

    >>> token_losses(jnp.zeros((2, 3)), jnp.array([0, 1]), mask_id=2).round(4)
    Array([0.6931, 0.6931], dtype=float32)
    """
    log_p = log_probabilities(logits, mask_id)
    return -jnp.take_along_axis(log_p, x0[:, None], axis=-1)[:, 0]


def mask_exactly(
    x0: Int[Array, " n"], count: Int[Array, ""], mask_id: int, *, key: Key[Array, ""]
) -> Int[Array, " n"]:
    """`x0` with `count` of its positions masked, all sets of so many alike.

    >>> masked = mask_exactly(jnp.arange(5), jnp.array(2), 9, key=jax.random.key(0))
    >>> int(jnp.sum(masked == 9))
    2
    """
    return jnp.where(jax.random.permutation(key, len(x0)) < count, mask_id, x0)


def is_masked(x: Int[Array, "*shape"], mask_id: int) -> Bool[Array, "*shape"]:
    """Where [MASK] stands.

    >>> is_masked(jnp.array([0, 9]), 9).tolist()
    [False, True]
    """
    return x == mask_id
