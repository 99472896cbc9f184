"""Denoising of several parts at once, each noised at a time of its own."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from ..diffusion import Diffusion
from ..loss_weights import Weight, constant_weight
from ..times import TimeSampler, uniform_time
from .base import AbstractObjective, Aux, Context


class JointDenoising(AbstractObjective):
    """Train a network of several parts: the sum over parts of `w(t) mean (out - target)^2`.

    The times of the parts are of one of four kinds, in each example:

    - one time for all, as when all are made together;
    - `given`: one part, by chance, is at a time, and the others at 0: they are given. Of a part at
      time 0 nothing is to be learned, and its loss is 0;
    - `alone`: one part is at a time, the others at 1: they are noise;
    - `apart`: a time for each (Bao et al. 2023, UniDiffuser, eq. 6, which has this kind alone, and
      so never quite the times that are used).

    **Arguments**: `parts` are the names; `given`, `alone` and `apart` the shares of the examples,
    the rest has one time; `weight` is one of `eqxldm.loss_weights`, by default the constant 1. `x0`
    of the loss, and what the network takes and gives, are dicts.

    **Raises** `ValueError` for shares that are negative or more than 1 together.

    >>> from eqxldm import LinearFlow, predict_velocity
    >>> objective = JointDenoising(Diffusion(LinearFlow(), predict_velocity), ("video", "sound"))
    >>> sorted(objective.times(jax.random.key(0), 3))
    ['sound', 'video']
    """

    diffusion: Diffusion
    parts: tuple[str, ...] = eqx.field(static=True)
    time_sampler: TimeSampler = eqx.field(static=True, default=uniform_time)
    given: float = eqx.field(static=True, default=0.4)
    alone: float = eqx.field(static=True, default=0.1)
    apart: float = eqx.field(static=True, default=0.1)
    weight: Weight = eqx.field(static=True, default=constant_weight)

    def __check_init__(self):
        shares = self.given, self.alone, self.apart
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                f"JointDenoising: given, alone and apart are shares of the examples, got {shares}."
            )

    def times(self, key: Key[Array, ""], n: int) -> dict[str, Float[Array, " n"]]:
        own_key, kind_key, which_key = jax.random.split(key, 3)
        count = len(self.parts)
        own = self.time_sampler(own_key, count * n).reshape(count, n)
        kind = jax.random.uniform(kind_key, (n,))
        is_made = jax.random.randint(which_key, (n,), 0, count) == jnp.arange(count)[:, None]
        given = jnp.where(is_made, own, 0.0)
        alone = jnp.where(is_made, own, 1.0)
        one = jnp.broadcast_to(own[:1], own.shape)
        ends = self.given, self.given + self.alone, self.given + self.alone + self.apart
        conditions = [kind < end for end in ends]
        times = jnp.select(conditions, [given, alone, own], one)
        return dict(zip(self.parts, times, strict=True))

    def loss(
        self,
        denoiser: Any,
        x0: Any,
        times: PyTree,
        cond: PyTree,
        *,
        key: Any,
        context: Context | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        keys = jax.random.split(key, len(self.parts) + 1)
        x_t, targets = {}, {}
        for name, eps_key in zip(self.parts, keys[1:], strict=True):
            eps = jax.random.normal(eps_key, x0[name].shape, x0[name].dtype)
            x_t[name] = self.diffusion.noise(x0[name], times[name], eps)
            targets[name] = self.diffusion.target(x0[name], times[name], eps)
        out = denoiser(x_t, times, cond, key=keys[0])
        weight = lambda t: self.weight(self.diffusion.path.coefficients(t))
        error = lambda name: (
            weight(times[name]) * jnp.mean((out[name].astype(jnp.float32) - targets[name]) ** 2)
        )
        errors = {name: jnp.where(times[name] > 0, error(name), 0.0) for name in self.parts}
        return jnp.sum(jnp.stack(list(errors.values()))), errors
