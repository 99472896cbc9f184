"""What a network is told besides x_t: a vector, and a sequence of tokens with a mask."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PyTree


class Conditioning(eqx.Module):
    """A condition as networks take it: a vector, a sequence of tokens, or both.

    `vector` is added to the embedding of the time. `tokens` are what blocks attend to, `mask` is
    true for those that count; without one all do. `numbers` are what some networks are told
    besides: FLUX its guidance scale, SDXL the sizes of the picture. What `embed_cond` of a network
    gives.

    >>> Conditioning(tokens=jnp.ones((3, 8)), mask=jnp.array([True, True, False])).vector is None
    True
    """

    vector: Float[Array, "*batch d"] | None = None
    tokens: Float[Array, "*batch n size"] | None = None
    mask: Bool[Array, "*batch n"] | None = None
    numbers: Float[Array, "*batch k"] | None = None


def embed_condition(
    name: str,
    time: Float[Array, " d"],
    embed: Callable[..., Any] | None,
    cond: PyTree,
) -> Conditioning:
    """`embed(cond)`, its vector added to that of the time; the time alone where `embed` is None.

    **Raises** `ValueError`, with the network's `name`, for a missing or a needless condition and
    for a vector of another shape.

    >>> embed_condition("DiT", jnp.zeros(2), None, None).vector
    Array([0., 0.], dtype=float32)
    """
    if embed is None:
        if cond is not None:
            raise ValueError(
                f"{name}: the network is unconditional, so cond must be None. "
                "Make it with num_classes or embed_cond."
            )
        return Conditioning(time)
    if cond is None:
        raise ValueError(
            f"{name}: the network is conditional, but cond is None. Give a condition; the one that "
            "means none is the network's null."
        )
    embedded = embed(cond)
    if not isinstance(embedded, Conditioning):
        embedded = Conditioning(embedded)
    vector, tokens, mask = embedded.vector, embedded.tokens, embedded.mask
    if vector is None:
        return Conditioning(time, tokens, mask)
    if vector.shape != time.shape:
        raise ValueError(
            f"{name}: embed_cond must give a vector of shape {time.shape}, got {vector.shape}."
        )
    return Conditioning(time + vector.astype(time.dtype), tokens, mask)


def embed_times(
    name: str,
    time_embedding: Callable[..., Any],
    step_embedding: Callable[..., Any] | None,
    t: Float[Array, ""],
    h: Any,
) -> Float[Array, " d"]:
    """`time_embedding(t) + step_embedding(h)`: what a network knows of its one or two times.

    `h = t - s >= 0` is the step that a flow map takes; None is 0, where the network is a denoiser.

    **Raises** `ValueError` for an `h` given to a network of one time, and for a `t` outside
    [0, 1] that is not traced.

    >>> embed_times("DiT", lambda t: t * jnp.ones(2), None, jnp.array(0.5), None)
    Array([0.5, 0.5], dtype=float32)
    """
    if not isinstance(t, Tracer) and not 0 <= float(t) <= 1:
        raise ValueError(
            f"{name}: t must lie in [0, 1] (0 is data, 1 is noise), got {float(t):g}. Timestep i "
            "of T is t = (i + 1) / T."
        )
    time = time_embedding(t)
    if step_embedding is not None:
        step = jnp.zeros_like(t) if h is None else jnp.asarray(h, t.dtype)
        return time + step_embedding(step)
    if h is not None:
        raise ValueError(
            f"{name}: the network has one time, t, and takes no step h. "
            "Make it with step_embedding=nn.Sinusoid(scale=1.0, offset=0.0)."
        )
    return time
