"""Guidance: functions from a denoiser to a denoiser."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .predictions import Denoiser

Scale = float | Float[Array, ""] | Callable[[Float[Array, ""]], Float[Array, ""]]


def guide(
    denoiser: Denoiser,
    null: Any,
    scale: Scale,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoiser:
    """Classifier-free guidance: `out_u + w (out_c - out_u)` (Ho & Salimans 2022, eq. 6).

    `w`, theirs plus 1: 1 is the conditional network, 0 the unconditional one. Both branches run as
    one batch of two. The mix is linear, so it is the same for eps, x0, v and velocity.

    **Arguments**:

    - `null`: the condition that means "none", a PyTree like `cond` (for a DiT, `dit.null`).
    - `scale`: a number, or a function of `t` for dynamic guidance.
    - `interval`: `(t_low, t_high)`; outside of it only the conditional network is called
      (Kynkäänniemi et al. 2024).

    >>> denoiser = lambda x_t, t, cond, key=None: cond * x_t
    >>> guided = guide(denoiser, jnp.array(1.0), 3.0)
    >>> guided(jnp.ones(2), jnp.array(0.5), jnp.array(2.0))
    Array([4., 4.], dtype=float32)
    """
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"guide: interval must satisfy 0 <= low < high <= 1, got {interval}.")

    def guided(x_t, t, cond, *, key=None):
        def both(_):
            pair = jax.tree.map(lambda n, c: jnp.stack([jnp.asarray(n, c.dtype), c]), null, cond)
            out_u, out_c = jax.vmap(lambda c: denoiser(x_t, t, c, key=key))(pair)
            w = scale(t) if callable(scale) else scale
            return out_u + jnp.asarray(w, out_u.dtype) * (out_c - out_u)

        if (low, high) == (0.0, 1.0):
            return both(None)
        inside = (t >= low) & (t <= high)
        return jax.lax.cond(inside, both, lambda _: denoiser(x_t, t, cond, key=key), None)

    return guided
