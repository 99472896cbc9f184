"""Denoisers of one array from a network of several parts, each of which has a time of its own.

Such a network is `(x_t, t, cond) -> out` with dicts of the same names, `models.TwoTowers` say. The
solvers, guidance and everything else of this library take denoisers of one array at one time.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

Parts = Mapping[str, Float[Array, "..."]]
JointDenoiser = Callable[..., dict[str, Array]]


class Together(NamedTuple):
    """All parts as one array: its denoiser, its length, and `split`, which gives the parts back."""

    denoiser: Any
    size: int
    split: Callable[[Array], Any]


def together(denoiser: JointDenoiser, shapes: Mapping[str, tuple[int, ...]]) -> Together:
    """To make all parts at once: they lie in one flat array, and have one time.

    >>> zeros = lambda x_t, t, cond, *, key=None: {name: 0 * x for name, x in x_t.items()}
    >>> made = together(zeros, {"video": (2, 3), "sound": (4,)})
    >>> made.denoiser(jnp.ones(made.size), jnp.array(0.5), None).shape
    (10,)
    >>> made.split(jnp.ones(10))["video"].shape
    (2, 3)
    """
    like = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    flat, split = ravel_pytree(like)

    def joined(x_t: Array, t: Array, cond: Any = None, *, key: Any = None) -> Array:
        return ravel_pytree(denoiser(split(x_t), dict.fromkeys(like, t), cond, key=key))[0]

    return Together(joined, flat.size, split)


def one_part(
    denoiser: JointDenoiser, part: str, others: Parts, *, time: float = 0.0
) -> Callable[..., Array]:
    """To make one part while the others stay what they are, at their own `time`.

    At `time=0` the others are given, and the part is made to go with them: p(part | others). At
    `time=1` they must be noise, which says nothing, and the part is made alone: p(part). (Bao et
    al. 2023, section 3.)

    >>> sums = lambda x_t, t, cond, *, key=None: {"a": x_t["a"] + x_t["b"] + t["b"], "b": x_t["b"]}
    >>> one_part(sums, "a", {"b": jnp.ones(2)})(jnp.zeros(2), jnp.array(0.5))
    Array([1., 1.], dtype=float32)
    """

    def made(x_t: Array, t: Array, cond: Any = None, *, key: Any = None) -> Array:
        times = {name: jnp.full_like(t, time) for name in others} | {part: t}
        return denoiser({**others, part: x_t}, times, cond, key=key)[part]

    return made
