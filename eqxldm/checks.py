"""Checks of values inside `jit`, where Python cannot see them: `equinox.error_if`.

Each returns its argument, which must be used for the check to happen. They cost a reduction and a
call to the host: for debugging, not for hot loops. Set `EQX_ON_ERROR=breakpoint` to stop there.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .predictions import Denoiser


def check_time(t: Float[Array, "*t"]) -> Float[Array, "*t"]:
    """`t`; an error at run time unless every entry lies in [0, 1] (0 is data, 1 is noise).

    >>> float(check_time(jnp.array(0.5)))
    0.5
    """
    inside = jnp.all((t >= 0) & (t <= 1))
    message = "t must lie in [0, 1] (0 is data, 1 is noise). Timestep i of T is t = (i + 1) / T."
    return eqx.error_if(t, ~inside, message)


def check_finite(x: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    """`x`; an error at run time that names it if an entry is NaN or infinite.

    >>> check_finite(jnp.zeros(2), "x_T")
    Array([0., 0.], dtype=float32)
    """
    return eqx.error_if(x, ~jnp.all(jnp.isfinite(x)), f"{name} holds NaN or infinity.")


def checked(denoiser: Denoiser) -> Denoiser:
    """The denoiser with its time, its input and its output checked at every call.

    `sample(checked(denoiser), ...)` stops at the step where a NaN appears, and says whether it
    came in or went out; a label that has no row in the network's table comes out as NaN. Of an
    argument that the denoiser does not use, the check may be left out by the compiler.

    >>> denoiser = checked(lambda x_t, t, cond, key=None: 2 * x_t)
    >>> denoiser(jnp.ones(2), jnp.array(0.5), None)
    Array([2., 2.], dtype=float32)
    """

    def inspected(x_t: Any, t: Any, cond: Any, *, key: Any = None, **options: Any) -> Any:
        out = denoiser(check_finite(x_t, "x_t"), check_time(t), cond, key=key, **options)
        return check_finite(out, "the denoiser's output")

    return inspected
