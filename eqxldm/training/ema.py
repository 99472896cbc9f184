"""Exponential moving averages of parameters."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree


def update_ema(ema: PyTree, params: PyTree, step: Int[Array, ""], decay: float) -> PyTree:
    """`ema = d ema + (1 - d) params`, `d = min(decay, (1 + step) / (10 + step))`.

    The warm-up lets the average forget the random start. Averages are kept in float32: at a decay
    of 0.9999 a bfloat16 average never moves.

    >>> float(update_ema(jnp.array(0.0), jnp.array(1.0), jnp.array(0), 0.999))
    0.8999999761581421
    """
    d = jnp.minimum(decay, (1 + step) / (10 + step)).astype(jnp.float32)
    return jax.tree.map(lambda e, p: e + (1 - d) * (p.astype(jnp.float32) - e), ema, params)
