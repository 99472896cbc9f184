"""What average velocities are averages of: the data's velocity, a guided one, or a teacher's."""

import abc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .base import Context

X = Float[Array, "*shape"]
T = Float[Array, ""]


class Velocities(NamedTuple):
    """At one `z`: the velocity to regress on, and a function for the network's own, `u(z, t, 0)`.

    >>> float(Velocities(jnp.array(1.0), lambda: jnp.array(2.0)).boundary())
    2.0
    """

    target: X
    boundary: Callable[[], X]


class AbstractVelocityTarget(eqx.Module):
    """What `V` of a mean flow is regressed on. To add one, write `__call__`."""

    def draw(self, cond: PyTree, h: T, *, key: Any) -> PyTree:
        """The condition of the network for an example: `cond`, or with something drawn beside it.

        `h` is the example's step; 0 for those that learn the velocity.
        """
        return cond

    @abc.abstractmethod
    def __call__(
        self, denoiser: Any, z: X, t: T, cond: PyTree, v: X, context: Context | None
    ) -> Velocities:
        """The velocities at `z`; `v = e - x` is the example's, `cond` what `draw` gave."""


class DataVelocity(AbstractVelocityTarget):
    """`v = e - x`, whose mean at `z` is the velocity of the data's own flow.

    >>> target = DataVelocity()
    >>> u = lambda z, t, cond, *, key=None, h: 2 * z
    >>> found = target(u, jnp.ones(1), jnp.array(0.5), None, jnp.zeros(1), None)
    >>> found.target, found.boundary()
    (Array([0.], dtype=float32), Array([2.], dtype=float32))
    """

    def __call__(
        self, denoiser: Any, z: X, t: T, cond: PyTree, v: X, context: Context | None
    ) -> Velocities:
        return Velocities(v, lambda: _instant(denoiser, z, t, cond))


class TeacherVelocity(AbstractVelocityTarget):
    """The velocity of a finished network, with its guidance: distillation.

    **Arguments**: `teacher`: `(z, t, cond, key=None)`, a velocity network of `LinearFlow`, such as
    `guide(velocity, null, 1.6)`; of another diffusion, `change_diffusion` makes it one. No
    gradient flows into it.

    >>> target = TeacherVelocity(lambda z, t, cond, key=None: 3 * z)
    >>> target(None, jnp.ones(1), jnp.array(0.5), None, jnp.zeros(1), None).target
    Array([3.], dtype=float32)
    """

    teacher: Any

    def __call__(
        self, denoiser: Any, z: X, t: T, cond: PyTree, v: X, context: Context | None
    ) -> Velocities:
        velocity = jax.lax.stop_gradient(self.teacher(z, t, cond, key=None))
        return Velocities(velocity, lambda: _instant(denoiser, z, t, cond))


class FixedGuidance(AbstractVelocityTarget):
    """Guidance inside the target: `v_g = w v + (1 - w - k) v_u + k v_c`.

    `v_c` and `v_u` are the network's own velocities with the condition and with `null`. At the
    fixed point that is classifier-free guidance of scale `w / (1 - k)`, which costs nothing when
    it is sampled (Geng et al. 2025a, eq. 19 to 21 and appendix).

    **Arguments**: `null` is the condition for "none"; an example that has it, by the dropout of
    `make_loss`, has the target `v`. `scale` is `w > 0`; `mix` is `k` in [0, 1). `interval` is that
    of `t` in which there is guidance.

    **Raises** `ValueError` for numbers out of range.

    >>> target = FixedGuidance(jnp.array(10), scale=1.0, mix=0.5)
    >>> target.effective_scale
    2.0
    """

    null: PyTree
    scale: float = eqx.field(static=True, default=1.0)
    mix: float = eqx.field(static=True, default=0.5)
    interval: tuple[float, float] = eqx.field(static=True, default=(0.0, 1.0))

    def __check_init__(self):
        low, high = self.interval
        if not (self.scale > 0 and 0 <= self.mix < 1 and 0 <= low < high <= 1):
            raise ValueError(
                "FixedGuidance: need scale > 0, mix in [0, 1) and an interval within [0, 1], got "
                f"{self.scale}, {self.mix} and {self.interval}."
            )

    @property
    def effective_scale(self) -> float:
        """`w / (1 - k)`: the scale of `guide` that the network is trained to."""
        return self.scale / (1 - self.mix)

    def __call__(
        self, denoiser: Any, z: X, t: T, cond: PyTree, v: X, context: Context | None
    ) -> Velocities:
        v_u, v_c = (_instant(denoiser, z, t, c) for c in (self.null, cond))
        low, high = self.interval
        guided = (t >= low) & (t <= high) & ~_same(cond, self.null)
        w, k = self.scale, self.mix
        return Velocities(jnp.where(guided, w * v + (1 - w - k) * v_u + k * v_c, v), lambda: v_c)


class ConditionedGuidance(AbstractVelocityTarget):
    """Guidance inside the target, its scale and interval a condition: chosen when it is sampled.

    Each example draws `w` in `[1, largest]` with a density proportional to `w^-beta`, and an
    interval `t_min ~ U(0, 1/2)`, `t_max ~ U(1/2, 1)`, which is [0, 1] where `h = 0`. The network's
    condition is the pair `(cond, (1 - 1/w, t_min, t_max))`, as `guided_condition` makes it and
    `nn.GuidanceEmbedding` reads it, and the target is

        v_g = v + (1 - 1/w) (v_c(w) - v_u)

    with `v_u` of `null` at `w = 1`, and `w = 1` outside of the interval. Its fixed point is
    classifier-free guidance of scale `w`, and as `1 - 1/w < 1` training contracts to it (Geng et
    al. 2025b, section 4).

    **Arguments**: `null` is the condition for "none", without guidance beside it; examples that
    have it learn `v`.

    >>> target = ConditionedGuidance(jnp.array(10))
    >>> cond, guidance = target.draw(jnp.array(3), jnp.array(0.5), key=jax.random.key(0))
    >>> bool(0 <= guidance[0] <= 0.875)
    True
    """

    null: PyTree
    largest: float = eqx.field(static=True, default=8.0)
    beta: float = eqx.field(static=True, default=1.0)

    def __check_init__(self):
        if not (self.largest > 1 and math.isfinite(self.largest)):
            raise ValueError(f"ConditionedGuidance: largest must exceed 1, got {self.largest}.")

    def draw(self, cond: PyTree, h: T, *, key: Any) -> PyTree:
        a, low, high = jax.random.uniform(key, (3,))
        if self.beta == 1:
            w = jnp.exp(a * math.log(self.largest))
        else:
            power = 1 - self.beta
            w = (1 + a * (self.largest**power - 1)) ** (1 / power)
        interval = jnp.where(h > 0, jnp.stack([low / 2, (1 + high) / 2]), jnp.array([0.0, 1.0]))
        w = jnp.where(_same(cond, self.null), 1.0, w)
        return cond, jnp.concatenate([1 - 1 / w[None], interval])

    def __call__(
        self, denoiser: Any, z: X, t: T, cond: PyTree, v: X, context: Context | None
    ) -> Velocities:
        cond, (strength, low, high) = cond
        strength = jnp.where((t >= low) & (t <= high), strength, 0.0)
        of = lambda c, s: _instant(denoiser, z, t, (c, jnp.stack([s, 0 * s, 1 + 0 * s])))
        v_u, v_c = of(self.null, 0 * strength), of(cond, strength)
        return Velocities(v + strength * (v_c - v_u), lambda: v_c)


def guided_condition(
    cond: PyTree, scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)
) -> tuple[PyTree, Float[Array, " 3"]]:
    """The condition of a network of `ConditionedGuidance`: `(cond, (1 - 1/w, low, high))`.

    **Arguments**: `scale >= 1`, 1 for none; `interval` that of `t` with guidance.

    >>> guided_condition(jnp.array(3), 2.0)[1]
    Array([0.5, 0. , 1. ], dtype=float32)
    """
    low, high = interval
    if not (scale >= 1 and 0 <= low < high <= 1):
        raise ValueError(
            "guided_condition: need a scale of at least 1 and an interval within [0, 1], got "
            f"{scale} and {interval}."
        )
    return cond, jnp.array([1 - 1 / scale, low, high])


def _instant(denoiser: Any, z: X, t: T, cond: PyTree) -> X:
    """The network's own velocity `u(z, t, 0)`, as a constant, without dropout."""
    return jax.lax.stop_gradient(denoiser(z, t, cond, key=None, h=jnp.zeros_like(t)))


def _same(cond: PyTree, null: PyTree) -> Bool[Array, ""]:
    """Whether a condition is the null one."""
    equal = jax.tree.map(lambda c, n: jnp.all(jnp.asarray(c) == jnp.asarray(n)), cond, null)
    return jnp.all(jnp.stack(jax.tree.leaves(equal)))
