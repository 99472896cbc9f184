"""The precision of what must not be rounded: statistics, softmax, angles."""

from typing import Any

import jax.numpy as jnp


def at_least_float32(dtype: Any) -> Any:
    """float32 for all that is narrower; float64 stays, so that derivatives can be checked in it.

    >>> at_least_float32(jnp.bfloat16)
    dtype('float32')
    """
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
