"""Average velocities: MeanFlow and improved MeanFlow, one loss with two choices.

On `LinearFlow`, `z = (1 - t) x + t e` has the velocity `v = e - x`, and `u(z, t, h)` is its average
over the trajectory from `r = t - h` to `t`. From `(t - r) u = int_r^t v` follows

    u + h du/dt = v,    du/dt = d_z u . v + d_t u   (r fixed: so h moves with t)

(Geng et al. 2025a, eq. 6). Both methods regress `V = u + h sg(du/dt)` on a velocity; they differ in
the tangent of `z` and in that target:

| | tangent of z | target | r = t |
|---|---|---|---|
| MeanFlow | the target: `e - x`, or guided | the same | 75 % |
| iMF, boundary | `u(z, t, 0)` | `e - x`, or guided | 50 % |
| distillation | the teacher's velocity | the same | 0 to 50 % |
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from ..diffusion import Diffusion
from ..paths import LinearFlow, at_least_float32
from ..predictions import predict_velocity
from ..times import TimeSampler, logit_normal_time
from .base import AbstractObjective, Aux, Context
from .velocity_targets import AbstractVelocityTarget, DataVelocity, Velocities

X = Float[Array, "*shape"]
T = Float[Array, ""]
# Of the velocities at z, the tangent of z in the derivative along the trajectory.
Tangent = Callable[[Velocities], X]
FLOW = Diffusion(LinearFlow(), predict_velocity)


def target_tangent(v: Velocities) -> X:
    """The target itself: MeanFlow's (Geng et al. 2025a, algorithm 1), and that of distillation.

    >>> float(target_tangent(Velocities(jnp.array(1.0), lambda: jnp.array(2.0))))
    1.0
    """
    return v.target


def boundary_tangent(v: Velocities) -> X:
    """The network's own velocity `u(z, t, 0)`: that of improved MeanFlow (Geng et al. 2025b).

    All that the network is given is then a function of `z`, and `V` a prediction of `v`.

    >>> float(boundary_tangent(Velocities(jnp.array(1.0), lambda: jnp.array(2.0))))
    2.0
    """
    return v.boundary()


def mean_flow_velocity(
    denoiser: Any, z: X, t: T, h: T, cond: PyTree, tangent: X, *, key: Any = None
) -> tuple[X, X]:
    """`V = u + h sg(du/dt)` and `h du/dt`, with `du/dt` the derivative along `(tangent, 1, 1)`.

    The tangents are those of `(z, t, h)`: `r = t - h` stays. At the true `u` and `v`, `V = v`
    (Geng et al. 2025a, eq. 8; 2025b, section 3). Float32 at least.

    >>> u = lambda z, t, cond, *, key=None, h: jnp.full_like(z, 2.0)  # data at a point
    >>> V, _ = mean_flow_velocity(u, jnp.ones(1), jnp.array(0.5), jnp.array(0.5), None, jnp.ones(1))
    >>> V
    Array([2.], dtype=float32)
    """
    along = lambda z, t, h: denoiser(z, t, cond, key=key, h=h)
    one = jnp.ones_like(t)
    u, derivative = jax.jvp(along, (z, t, h), (tangent.astype(z.dtype), one, one))
    work = at_least_float32(u.dtype)
    change = h.astype(work) * jax.lax.stop_gradient(derivative).astype(work)
    return u.astype(work) + change, change


def adaptive(square: T, power: float, eps: float) -> T:
    """`l / sg((l + eps)^p)` of a sum of squares (Geng et al. 2025a, eq. 22).

    `p = 0` is the plain square; with `p = 1` every example counts alike, whatever its error.

    >>> float(adaptive(jnp.array(3.0), 1.0, 1.0))
    0.75
    """
    return square / jax.lax.stop_gradient((square + eps) ** power)


class MeanFlow(AbstractObjective):
    """Learn average velocities `u(z, t, h)` on the linear flow, for one or few network calls.

    The loss of an example is `adaptive(sum (V - sg(target))^2)`, with `V` of
    `mean_flow_velocity`. The network is one of two times (`denoiser(z, t, cond, h=)`), reads them
    unscaled (`nn.Sinusoid(scale=1.0, offset=0.0)`: the loss has its derivative in `t`), and
    attends without kernels of their own derivative. `average_velocity_map` and `sample_map`
    sample it; with `h = 0` it is a velocity network for every solver. By default it is MeanFlow's;
    `improved_mean_flow` has iMF's.

    **Arguments**:

    - `tangent`: `target_tangent` or `boundary_tangent`.
    - `target`: `DataVelocity()`, `e - x`; `FixedGuidance` or `ConditionedGuidance`, with guidance
      inside; `TeacherVelocity` for distillation.
    - `flow_share`: the share of examples with `r = t`, which learn the velocity alone.
    - `time_sampler`: two independent draws of it are `t`, the larger one, and `r`.
    - `power`, `eps`: of `adaptive`. `eps` stands beside a sum over all dimensions.
    - `flow_steps`: so many steps at the start have `r = t` throughout, for a network that knows no
      velocity yet.

    Scalars to log: `error`, the mean square of `V - target`, and `change`, the root mean square of
    `h du/dt`: a derivative that grows without bound shows there first.

    **Raises** `ValueError` for a share outside [0, 1].

    (Geng et al. 2025a, "Mean flows for one-step generative modeling"; 2025b, "Improved mean flows")

    >>> times = MeanFlow().times(jax.random.key(0), 8)
    >>> int(jnp.sum(times["h"] == 0)), bool(jnp.all(times["h"] <= times["t"]))
    (6, True)
    """

    tangent: Tangent = eqx.field(static=True, default=target_tangent)
    target: AbstractVelocityTarget = DataVelocity()
    flow_share: float = eqx.field(static=True, default=0.75)
    time_sampler: TimeSampler = eqx.field(static=True, default=logit_normal_time(-0.4, 1.0))
    power: float = eqx.field(static=True, default=1.0)
    eps: float = eqx.field(static=True, default=0.01)
    flow_steps: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        if not 0 <= self.flow_share <= 1:
            raise ValueError(f"MeanFlow: flow_share must lie in [0, 1], got {self.flow_share}.")

    def times(self, key: Key[Array, ""], n: int) -> dict[str, Float[Array, " n"]]:
        return two_times(self.time_sampler, self.flow_share, key, n)

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
        eps_key, cond_key, denoiser_key = jax.random.split(key, 3)
        t, h = times["t"], times["h"]
        if self.flow_steps and context is not None:
            h = jnp.where(context.step < self.flow_steps, 0.0, h)
        e = jax.random.normal(eps_key, x0.shape, x0.dtype)
        z, v = FLOW.noise(x0, t, e), FLOW.target(x0, t, e)
        cond = self.target.draw(cond, h, key=cond_key)
        velocities = self.target(denoiser, z, t, cond, v, context)
        tangent = jax.lax.stop_gradient(self.tangent(velocities))
        V, change = mean_flow_velocity(denoiser, z, t, h, cond, tangent, key=denoiser_key)
        square = jnp.sum((V - jax.lax.stop_gradient(velocities.target).astype(V.dtype)) ** 2)
        aux = {"error": square / V.size, "change": jnp.sqrt(jnp.mean(change**2))}
        return adaptive(square, self.power, self.eps), aux


def improved_mean_flow(
    target: AbstractVelocityTarget | None = None, *, flow_share: float = 0.5, **options: Any
) -> MeanFlow:
    """iMF: `MeanFlow` with `boundary_tangent` and half of the examples at `r = t`.

    (Geng et al. 2025b, "Improved mean flows: on the challenges of fastforward generative models")

    >>> improved_mean_flow().tangent is boundary_tangent
    True
    """
    target = DataVelocity() if target is None else target
    return MeanFlow(boundary_tangent, target, flow_share, **options)


def two_times(
    sampler: TimeSampler, flow_share: float, key: Key[Array, ""], n: int
) -> dict[str, Float[Array, " n"]]:
    """`{"t", "h"}` of two independent draws: `t` the larger, `h` their distance, or 0 for a share.

    >>> two_times(logit_normal_time(), 1.0, jax.random.key(0), 2)["h"]
    Array([0., 0.], dtype=float32)
    """
    k1, k2, k3, k4, k5 = jax.random.split(key, 5)
    # Samplers spread their draws over the batch in order: mixed, so that the two are independent.
    a, b = sampler(k1, n), jax.random.permutation(k3, sampler(k2, n))
    share = (jnp.arange(n) + jax.random.uniform(k4)) / n
    flow = jax.random.permutation(k5, share < flow_share)
    t = jnp.maximum(a, b)
    return {"t": t, "h": jnp.where(flow, 0.0, t - jnp.minimum(a, b))}
