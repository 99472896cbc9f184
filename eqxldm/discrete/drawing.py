"""Drawing tokens from logits: temperature, top-p, and Gumbel noise that keeps its tail."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def draw_tokens(
    log_p: Float[Array, "n v"],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    key: Key[Array, ""] | None,
) -> Int[Array, " n"]:
    """A token at each position, from `softmax(log_p / temperature)`, restricted to its nucleus.

    **Arguments**: `temperature` 0 takes the likeliest, without a key. `top_p` in (0, 1] keeps the
    smallest set of likeliest tokens whose probabilities add up to it (Holtzman et al. 2020).

    Draws are exact in float32. Gumbel noise made of uniforms of 23 bits ends at 15.9, so that a
    token of probability 1e-8 never wins: the temperature is lowered in effect, texts look better
    than the model is, and are less diverse (Zheng et al. 2024). JAX's `mode="high"` has the tail.

    >>> draw_tokens(jnp.log(jnp.array([[0.1, 0.9]])), temperature=0.0, key=None)
    Array([1], dtype=int32)
    """
    check_drawing("draw_tokens", temperature, top_p)
    if temperature == 0:
        return jnp.argmax(log_p, axis=-1).astype(jnp.int32)
    if key is None:
        raise ValueError("draw_tokens: drawing needs a key; temperature=0 takes the likeliest.")
    log_p = log_p / temperature
    if top_p < 1:
        log_p = nucleus(jax.nn.log_softmax(log_p, axis=-1), top_p)
    return jax.random.categorical(key, log_p, axis=-1, mode="high").astype(jnp.int32)


def draw_tokens_at(
    log_p: Float[Array, "n v"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""] | None,
    *,
    key: Key[Array, ""],
) -> Int[Array, " n"]:
    """`draw_tokens` with numbers that a compiled program is given. `top_p` None keeps all tokens,
    and sorts none.

    >>> log_p = jnp.log(jnp.array([[0.1, 0.9]]))
    >>> draw_tokens_at(log_p, jnp.array(0.0), None, key=jax.random.key(0))
    Array([1], dtype=int32)
    """
    scaled = log_p / jnp.where(temperature > 0, temperature, 1.0)
    if top_p is not None:
        kept = nucleus(jax.nn.log_softmax(scaled, axis=-1), top_p)
        scaled = jnp.where(top_p < 1, kept, scaled)
    drawn = jax.random.categorical(key, scaled, axis=-1, mode="high")
    found = jnp.where(temperature > 0, drawn, jnp.argmax(log_p, axis=-1))
    return found.astype(jnp.int32)


def nucleus(log_p: Float[Array, "n v"], top_p: Any) -> Float[Array, "n v"]:
    """`log_p` with minus infinity outside of the smallest set that holds `top_p`.

    >>> jnp.exp(nucleus(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), 0.6)).round(2).tolist()[0][2]
    0.0
    """
    # By places and not by comparing with the last one's value: XLA may compute `log_p` twice, with
    # other rounding, and then the last token of the set would not be in it.
    order = jnp.argsort(log_p, axis=-1, descending=True)
    p = jnp.exp(jnp.take_along_axis(log_p, order, axis=-1))
    count = jnp.sum(jnp.cumsum(p, axis=-1) - p < top_p, axis=-1, keepdims=True)
    place = jnp.argsort(order, axis=-1)
    return jnp.where(place < jnp.maximum(count, 1), log_p, -jnp.inf)


def check_drawing(name: str, temperature: Any, top_p: Any) -> None:
    """`ValueError` for a temperature below 0, or a `top_p` outside (0, 1].

    >>> check_drawing("draw_tokens", 1.0, 0.9)
    """
    if not temperature >= 0:
        raise ValueError(f"{name}: temperature must be 0 or above, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"{name}: top_p must lie in (0, 1], got {top_p}.")
