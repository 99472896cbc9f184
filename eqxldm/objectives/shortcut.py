"""Self-consistency of steps: shortcut models and split mean flows, without derivatives of networks.

A long step must be what two shorter ones make together: with `r < s < t`,

    (t - r) u(z_t; t, t - r) = (t - s) u(z_t; t, t - s) + (s - r) u(z_s; s, s - r)

which holds for average velocities and, with the velocity at `h = 0`, for nothing else. The right
side is a constant. Any attention kernel will do, and bfloat16.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from ..predictions import Denoiser
from ..times import TimeSampler, logit_normal_time, uniform_time
from .base import AbstractObjective, Aux, Context
from .flow_map import FLOW, two_times

X = Float[Array, "*shape"]
T = Float[Array, ""]


def split_velocity(
    teacher: Denoiser, z: X, t: T, first: T, second: T, cond: PyTree, clip: float | None = None
) -> X:
    """The average velocity of two steps in a row, `first` from `t`, then `second`; a constant.

    `(a u(z, t, a) + b u(z - a u, t - a, b)) / (a + b)`. A step of 0 counts nothing. The state in
    between and the result are clipped to `[-clip, clip]`.

    >>> u = lambda z, t, cond, *, key=None, h: jnp.full_like(z, 2.0)
    >>> third = jnp.array(0.3)
    >>> split_velocity(u, jnp.ones(1), jnp.array(1.0), third, third, None)
    Array([2.], dtype=float32)
    """
    return _two_steps(teacher, z, t, (first, first), (second, second), cond, clip)


def _two_steps(teacher, z, t, first, second, cond, clip):
    """Each step is `(length, h)`: how far it goes, and what the network is told of that."""
    bounded = (lambda x: x) if clip is None else (lambda x: jnp.clip(x, -clip, clip))
    (a, h_a), (b, h_b) = first, second
    u_a = teacher(z, t, cond, key=None, h=h_a)
    u_b = teacher(bounded(z - a * u_a), t - a, cond, key=None, h=h_b)
    total = jnp.where(a + b > 0, a + b, 1.0)
    return jax.lax.stop_gradient(bounded((a * u_a + b * u_b) / total))


class Shortcut(AbstractObjective):
    """Shortcut models: steps of powers of two, each taught by two of half its length.

    A share of the examples learns the velocity, `|u(z, t, 0) - (e - x)|^2`. The others draw a step
    `h` of 1, 1/2, ..., `2 / steps` and a `t` on the grid of its multiples, and learn
    `|u(z, t, h) - sg(target)|^2`, the target of two half steps by the averaged network
    (`context.ema[0]`; without one, the network itself). Half of the shortest step is taken with the
    velocity, `h = 0`. The loss is a mean over the entries.

    **Arguments**:

    - `steps`: the finest grid, a power of two.
    - `flow_share`: the share that learns the velocity; 7/8 in the paper, where it saves time. Here
      the targets of all are computed.
    - `time_sampler`: of the velocity's examples.
    - `clip`: what the state between the half steps and the target are clipped to (their code: 4,
      for latents of unit variance); None for neither.
    - `guidance`, `null`: classifier-free guidance of the velocities that the shortest step is made
      of; longer steps inherit it. 1 for none.
    - `interval`: of the times `t` with guidance.

    **Raises** `ValueError` for steps that are no power of two, guidance without `null`, and an
    interval outside of [0, 1].

    (Frans et al. 2025, "One step diffusion via shortcut models")

    >>> times = Shortcut(steps=8, flow_share=0.5).times(jax.random.key(0), 8)
    >>> bool(jnp.all(times["h"] <= times["t"]))
    True
    """

    steps: int = eqx.field(static=True, default=128)
    flow_share: float = eqx.field(static=True, default=0.75)
    time_sampler: TimeSampler = eqx.field(static=True, default=uniform_time)
    clip: float | None = eqx.field(static=True, default=4.0)
    guidance: float = eqx.field(static=True, default=1.0)
    null: PyTree = None
    interval: tuple[float, float] = eqx.field(static=True, default=(0.0, 1.0))

    def __check_init__(self):
        if self.steps < 2 or self.steps & (self.steps - 1):
            raise ValueError(f"Shortcut: steps must be a power of two, got {self.steps}.")
        if not 0 <= self.flow_share <= 1:
            raise ValueError(f"Shortcut: flow_share must lie in [0, 1], got {self.flow_share}.")
        if self.guidance != 1 and self.null is None:
            raise ValueError("Shortcut: guidance needs null, the condition that means 'none'.")
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(f"Shortcut: need an interval within [0, 1], got {self.interval}.")

    def times(self, key: Key[Array, ""], n: int) -> dict[str, Float[Array, " n"]]:
        k1, k2, k3, k4, k5 = jax.random.split(key, 5)
        share = (jnp.arange(n) + jax.random.uniform(k1)) / n
        flow = jax.random.permutation(k2, share < self.flow_share)
        level = jax.random.randint(k3, (n,), 0, self.steps.bit_length() - 1)
        h = 0.5**level
        t = h * (1 + jnp.floor(jax.random.uniform(k4, (n,)) * 2**level))
        return {
            "t": jnp.where(flow, self.time_sampler(k5, n), jnp.minimum(t, 1.0)),
            "h": jnp.where(flow, 0.0, h),
        }

    def loss(
        self,
        denoiser: Any,
        x0: X,
        times: dict[str, T],
        cond: PyTree,
        *,
        key: Any,
        context: Context | None = None,
    ) -> tuple[T, Aux]:
        half = times["h"] / 2
        told = jnp.where(half > 1 / self.steps, half, 0.0)
        step = half, told
        teacher = _teacher(denoiser, context)
        if self.guidance != 1:
            teacher = _guided_velocity(teacher, self.null, self.guidance, self.interval)
        target = lambda z: _two_steps(teacher, z, times["t"], step, step, cond, self.clip)
        return _loss(denoiser, x0, times, cond, target, key)


class SplitMeanFlow(AbstractObjective):
    """Split mean flows: the same for any two times and any place between them.

    `t` and `r` are drawn as in `MeanFlow`, and `s = t - lambda h`, `lambda ~ U(0, 1)`. The averaged
    network makes the target, or the network itself. The loss is a mean over the entries.

    (Guo et al. 2025, "SplitMeanFlow: interval splitting consistency in few-step generative
    modeling")

    >>> times = SplitMeanFlow().times(jax.random.key(0), 4)
    >>> sorted(times), bool(jnp.all(times["first"] <= times["h"]))
    (['first', 'h', 't'], True)
    """

    flow_share: float = eqx.field(static=True, default=0.5)
    time_sampler: TimeSampler = eqx.field(static=True, default=logit_normal_time(-0.4, 1.0))
    clip: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if not 0 <= self.flow_share <= 1:
            raise ValueError(
                f"SplitMeanFlow: flow_share must lie in [0, 1], got {self.flow_share}."
            )

    def times(self, key: Key[Array, ""], n: int) -> dict[str, Float[Array, " n"]]:
        key, split_key = jax.random.split(key)
        times = two_times(self.time_sampler, self.flow_share, key, n)
        return {**times, "first": jax.random.uniform(split_key, (n,)) * times["h"]}

    def loss(
        self,
        denoiser: Any,
        x0: X,
        times: dict[str, T],
        cond: PyTree,
        *,
        key: Any,
        context: Context | None = None,
    ) -> tuple[T, Aux]:
        teacher, t, first = _teacher(denoiser, context), times["t"], times["first"]
        second = times["h"] - first
        target = lambda z: split_velocity(teacher, z, t, first, second, cond, self.clip)
        return _loss(denoiser, x0, times, cond, target, key)


def _loss(denoiser, x0, times, cond, target, key):
    eps_key, denoiser_key = jax.random.split(key)
    t, h = times["t"], times["h"]
    e = jax.random.normal(eps_key, x0.shape, x0.dtype)
    z = FLOW.noise(x0, t, e)
    wanted = jnp.where(h > 0, target(z), FLOW.target(x0, t, e))
    u = denoiser(z, t, cond, key=denoiser_key, h=h)
    error = jnp.mean((u - jax.lax.stop_gradient(wanted)) ** 2)
    return error, {}


def _teacher(denoiser: Any, context: Context | None) -> Any:
    return context.ema[0] if context is not None and context.ema else denoiser


def _guided_velocity(
    teacher: Any, null: PyTree, scale: float, interval: tuple[float, float]
) -> Any:
    """The teacher with guidance where it is asked for a velocity, `h = 0`, within the interval."""
    low, high = interval

    def guided(z, t, cond, *, key, h):
        u = teacher(z, t, cond, key=key, h=h)
        without = teacher(z, t, null, key=key, h=h)
        plain = (h > 0) | (t < low) | (t > high)
        return jnp.where(plain, u, without + scale * (u - without))

    return guided
