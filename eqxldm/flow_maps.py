"""Flow maps: networks that go from any time to any earlier one in a single call.

A flow map is `(x_t, t, s, cond, *, key=) -> x_s`, the state at `s <= t` of the trajectory of the
probability-flow ODE that is at `x_t` at `t`. Here are the ways to one from a network, and
`sample_map`, the loop over any number of steps.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key, PyTree

from .diffusion import Diffusion
from .paths import AbstractPath, at_least_float32, combine
from .predictions import Denoiser
from .times import Grid, check_times, time_at_angle

X = Float[Array, "*shape"]
ConsistencyFunction = Callable[..., X]  # (x_t, t, cond, *, key=None) -> x0


@runtime_checkable
class FlowMap(Protocol):
    """`(x_t, t, s, cond, *, key=None) -> x_s`, one example; any callable of this signature is one.

    >>> isinstance(lambda x_t, t, s, cond, key=None: x_t, FlowMap)
    True
    """

    def __call__(
        self,
        x_t: Float[Array, "*shape"],
        t: Float[Array, ""],
        s: Float[Array, ""],
        cond: Any,
        /,
        *,
        key: Any = None,
    ) -> Float[Array, "*shape"]: ...


def average_velocity_map(denoiser: Any) -> FlowMap:
    """`x_s = x_t - (t - s) u(x_t, t, h = t - s)`: of a network that outputs average velocities.

    `u = 1/(t - s) int_s^t v(x_tau, tau) dtau` is what MeanFlow and shortcut models learn on
    `LinearFlow` (Geng et al. 2025a, eq. 3 and 12). Guidance, if any, is in the network already.

    >>> network = lambda x_t, t, cond, *, key=None, h: jnp.full_like(x_t, 2.0)
    >>> step = average_velocity_map(network)
    >>> step(jnp.ones(1), jnp.array(1.0), jnp.array(0.5), None)
    Array([0.], dtype=float32)
    """

    def flow_map(x_t, t, s, cond, *, key=None):
        u = denoiser(x_t, t, cond, key=key, h=t - s)
        return combine(1.0, x_t, s - t, u)

    return flow_map


def consistency_function(denoiser: Denoiser, diffusion: Diffusion) -> ConsistencyFunction:
    """`f(x_t, t, cond) = x0`, the estimate of `x0` of a network's output.

    On `CosineVP` with `predict_v` it is TrigFlow's `f = cos(phi) x_t - sin(phi) F`, `phi = pi t /
    2` (Lu & Song 2025, eq. 6), for data of unit variance. `f(x, 0) = x` on every path where the
    prediction is regular at 0.

    >>> from eqxldm import CosineVP, predict_v
    >>> f = consistency_function(lambda x, t, cond, key=None: -x, Diffusion(CosineVP(), predict_v))
    >>> f(jnp.ones(1), jnp.array(1.0), None)
    Array([1.], dtype=float32)
    """

    def function(x_t, t, cond=None, *, key=None):
        return diffusion.estimate(x_t, t, denoiser(x_t, t, cond, key=key)).x0.astype(x_t.dtype)

    return function


def renoise(function: ConsistencyFunction, path: AbstractPath) -> FlowMap:
    """`x_s = alpha(s) f(x_t, t) + sigma(s) eps`: a consistency function as a map to any time.

    To `s = 0` it is `f` itself; to others fresh noise is put onto the estimate, so that
    `sample_map` over `[1, s, 0]` is the two-step sampler of consistency models, and over a longer
    grid the multistep one (Song et al. 2023, algorithm 1). It needs a key.

    >>> from eqxldm import CosineVP
    >>> step = renoise(lambda x_t, t, cond, key=None: jnp.full_like(x_t, 3.0), CosineVP())
    >>> step(jnp.ones(1), jnp.array(1.0), jnp.array(0.0), None, key=jax.random.key(0))
    Array([3.], dtype=float32)
    """

    def flow_map(x_t, t, s, cond, *, key=None):
        if key is None:
            raise ValueError(
                "renoise draws noise and needs a key: sample_map(..., key=jax.random.key(0))."
            )
        x0, at = function(x_t, t, cond), path.coefficients(s)
        return combine(at.alpha, x0, at.sigma, jax.random.normal(key, x_t.shape, x0.dtype))

    return flow_map


def sample_map(
    flow_map: FlowMap,
    times: Grid | Float[Array, " steps_and_one"],
    x_T: X,
    cond: PyTree = None,
    *,
    key: Key[Array, ""] | None = None,
) -> X:
    """Goes from `x_T` at `times[0]` to `times[-1]`, one call of the flow map a step; one example.

    **Arguments**: `times` is a descending grid in [0, 1]: `uniform_times(1)` is a single step,
    `uniform_times(n)` are `n`, and the steps need not be alike. `x_T` as in `sample`; the result
    has its shape and dtype. `key` is handed on, another one to each step; only maps that draw noise
    (`renoise`) need it.

    **Raises** `ValueError` for a grid that does not descend in [0, 1].

    >>> from eqxldm import uniform_times
    >>> network = lambda x_t, t, cond, *, key=None, h: jnp.ones_like(x_t)
    >>> sample_map(average_velocity_map(network), uniform_times(1), jnp.ones(2))
    Array([0., 0.], dtype=float32)
    """
    if not isinstance(times, Tracer):
        times = check_times(times)
        if times[0] < times[-1]:
            raise ValueError("sample_map: times must descend, from noise at 1 to data at 0.")
    work = at_least_float32(x_T.dtype)
    grid = jnp.asarray(times, work)
    rows = grid[:-1], grid[1:], np.arange(len(grid) - 1)

    def step(x, row):
        t, s, i = row
        step_key = None if key is None else jax.random.fold_in(key, i)
        return flow_map(x.astype(x_T.dtype), t, s, cond, key=step_key).astype(work), None

    return jax.lax.scan(step, x_T.astype(work), rows)[0].astype(x_T.dtype)


def change_diffusion(denoiser: Denoiser, source: Diffusion, to: Diffusion) -> Denoiser:
    """A network of one diffusion as a network of another one, exactly.

    All paths noise alike up to scale and clock: at the angle `theta = atan2(sigma, alpha)` the
    state of either is `|(alpha, sigma)|` times the same mix. So a finished eps, x0, v or velocity
    network of any path becomes, for example, a velocity network of `LinearFlow`, from which
    few-step training starts. A network of two times keeps its `h`, the step on the new clock.
    Differentiable in `x_t` and `t`. At angles beyond the last of `source` (DDPM's table ends a
    little before pure noise) the network is asked at its last time.

    >>> from eqxldm import CosineVP, LinearFlow, predict_v, predict_velocity
    >>> v = lambda x_t, t, cond, key=None: jnp.zeros_like(x_t)
    >>> source, flow = Diffusion(CosineVP(), predict_v), Diffusion(LinearFlow(), predict_velocity)
    >>> velocity = change_diffusion(v, source, flow)
    >>> u = velocity(jnp.ones(1), jnp.array(1.0), None)  # out = 0 at pure noise: x0 = 0, eps = x_t
    >>> u.round(4)
    Array([1.], dtype=float32)
    """
    if source == to:
        return denoiser

    def changed(x_t, t, cond, *, key=None, **options):
        t = jnp.asarray(t, at_least_float32(x_t.dtype))
        at = to.path.coefficients(t)
        time = time_at_angle(source.path, jnp.arctan2(at.sigma, at.alpha))
        # Beside the ends, where v and velocity are an eps or an x0 and lose their derivative in t.
        beside = jnp.clip(time, 1e-6, 1 - 1e-6)
        time = time + jax.lax.stop_gradient(beside - time)
        there = source.path.coefficients(time)
        scale = jnp.hypot(there.alpha, there.sigma) / jnp.hypot(at.alpha, at.sigma)
        x = (scale * x_t.astype(t.dtype)).astype(x_t.dtype)
        out = denoiser(x, time, cond, key=key, **options)
        estimate = source.estimate(x, time, out)
        return to.target(estimate.x0, t, estimate.eps).astype(out.dtype)

    return changed
