"""The sampling loop: a solver's step scanned over its plan."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key, PyTree

from .diffusion import Diffusion, Estimate
from .paths import AbstractPath, at_least_float32
from .predictions import Denoiser, apply_inverse, inverse, split_output
from .solvers import DDIM, AbstractSolver
from .times import Grid, check_times

X = Float[Array, "*shape"]
Times = Grid | Float[Array, " steps_and_one"]
# (x0, x_t, t) -> x0
DenoisedFn = Callable[[X, X, Float[Array, ""]], X]
# (call, t, x_t, x0) -> None, on the host
Callback = Callable[[Any, Any, Any, Any], None]


class Trajectory(NamedTuple):
    """The states and the estimates of `x0` along a run; unpacks into the two.

    >>> states, x0 = Trajectory(jnp.zeros((3, 2)), jnp.zeros((2, 2)))
    """

    states: Float[Array, "saved_and_one *shape"]
    x0: Float[Array, "saved *shape"]


class Loop(NamedTuple):
    """A sampling run taken apart: `state, x0 = step(state, row)` for each of the `rows` in turn.

    `state[0]` is `x`; `rows` is a PyTree of arrays with an entry for each network call, made for
    `jax.lax.scan` and as good for a loop of your own.
    """

    state: tuple[X, Any]
    step: Callable[[Any, Any], tuple[Any, X]]
    rows: PyTree


def sample(
    denoiser: Denoiser,
    diffusion: Diffusion,
    solver: AbstractSolver,
    times: Times,
    x_T: Float[Array, "*shape"],
    cond: PyTree = None,
    *,
    key: Key[Array, ""] | None = None,
    denoised_fn: DenoisedFn | None = None,
    callback: Callback | None = None,
    with_step: bool = False,
) -> Float[Array, "*shape"]:
    """Runs the reverse process from `x_T` at `times[0]` to `times[-1]`, one example.

    **Arguments**:

    - `denoiser`: `(x_t, t, cond, key=) -> out`, called with `key=None`; wrap it with
      `guidance.guide` for guidance.
    - `diffusion`: the path, and what `out` means.
    - `times`: a descending grid in [0, 1], one entry more than there are steps
      (`times.uniform_times`, `timestep_times`, `karras_times`, ...); with a solver that can, one
      that goes back up in between (`repaint_times`). Close over it: its coefficients are then
      computed in float64 and checked when this function is traced. A grid that is itself traced
      (an argument of `jit`) works in its own dtype, with its coefficients checked at run time only.
    - `x_T`: where to start: at `t = 1`, `diffusion.sample_prior(shape, key=key)`; at a smaller
      `times[0]`, a picture noised to that time, `diffusion.noise(x0, times[0], eps)`. The result
      has its shape and dtype.
    - `key`: of the solver's noise. A solver that draws none (`DDIM()`, `Euler()`, `Heun()`,
      `DPMSolverPP2M()`, `DPMSolverPP3M()`, `UniPC()`) needs none.
    - `denoised_fn`: `(x0, x_t, t) -> x0` is applied to every estimate of `x0`, eps following:
      `lambda x0, x_t, t: jnp.clip(x0, -1, 1)` is the clipping of pixel-space models (Ho et al.
      2020, their code); `jnp.where(known, picture, x0)` is inpainting.
    - `callback`: `(call, t, x_t, x0)` is called on the host after each network call, for progress
      and previews; under `jax.vmap` once for each example, in no certain order.
    - `with_step`: the denoiser is called with `h=t - s` too, the step from `t` to `s` that its
      output is used for: what a flow map asks for (`h = 0`: the instantaneous output).

    **Returns** `x` at `times[-1]`. `jax.vmap` over `x_T`, `cond` and `key` makes a batch; under
    `jax.jit` it compiles once for all values of them.

    **Raises** `ValueError` if diffusion, solver and grid do not go together: at some time of the
    grid a coefficient would be infinite.

    >>> from eqxldm import DDIM, LinearFlow, predict_x0, uniform_times
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0)
    >>> flow = Diffusion(LinearFlow(), predict_x0)
    >>> sample(denoiser, flow, DDIM(), uniform_times(3), jnp.ones(2))
    Array([7., 7.], dtype=float32)
    """
    loop = sampling_steps(
        denoiser, diffusion, solver, times, x_T, cond,
        key=key, denoised_fn=denoised_fn, callback=callback, with_step=with_step,
    )  # fmt: skip
    return _end(loop, x_T)


def sampling_steps(
    denoiser: Denoiser,
    diffusion: Diffusion,
    solver: AbstractSolver,
    times: Times,
    x_T: Float[Array, "*shape"],
    cond: PyTree = None,
    *,
    key: Key[Array, ""] | None = None,
    denoised_fn: DenoisedFn | None = None,
    callback: Callback | None = None,
    with_step: bool = False,
) -> Loop:
    """The loop of `sample`, open: its start, its step and the rows that the step runs over.

    For loops of one's own: to stop in between, to change `x`, to share network calls between
    examples at different steps. Arguments as in `sample`.

    >>> from eqxldm import DDIM, LinearFlow, predict_x0, uniform_times
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0)
    >>> flow = Diffusion(LinearFlow(), predict_x0)
    >>> state, step, rows = sampling_steps(denoiser, flow, DDIM(), uniform_times(3), jnp.ones(2))
    >>> for i in range(3):
    ...     state, x0 = step(state, jax.tree.map(lambda a: a[i], rows))
    >>> state[0]
    Array([7., 7.], dtype=float32)
    """
    return _loop(
        denoiser, diffusion, solver, _descending(times, solver), x_T, cond,
        key=key, denoised_fn=denoised_fn, callback=callback, with_step=with_step,
    )  # fmt: skip


def sample_trajectory(
    denoiser: Denoiser,
    diffusion: Diffusion,
    solver: AbstractSolver,
    times: Times,
    x_T: Float[Array, "*shape"],
    cond: PyTree = None,
    *,
    key: Key[Array, ""] | None = None,
    every: int = 1,
    denoised_fn: DenoisedFn | None = None,
    with_step: bool = False,
) -> Trajectory:
    """As `sample`, but returns every `every`-th state, `x_T` first, and the estimates of `x0`.

    `states[j]` is the state after `j every` steps and `x0[j]` the last estimate made on the way
    to `states[j + 1]`; the last state is the result, also where `every` does not divide the
    steps. Only what is returned is kept in memory.

    >>> from eqxldm import DDIM, LinearFlow, predict_x0, uniform_times
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0)
    >>> flow = Diffusion(LinearFlow(), predict_x0)
    >>> times, x_T = uniform_times(7), jnp.ones(2)
    >>> states, x0 = sample_trajectory(denoiser, flow, DDIM(), times, x_T, every=3)
    >>> states.shape, x0.shape
    ((4, 2), (3, 2))
    """
    loop = sampling_steps(
        denoiser, diffusion, solver, times, x_T, cond,
        key=key, denoised_fn=denoised_fn, with_step=with_step,
    )  # fmt: skip
    of_step = loop.rows[0]  # the step that each network call belongs to, which is no tracer
    steps = int(of_step[-1]) + 1
    if not 1 <= every <= steps:
        raise ValueError(
            f"sample_trajectory: every must lie in 1 .. {steps}, the steps, got {every}."
        )
    saved = -(-steps // every)

    def keep(carry, row):
        state, states, estimates = carry
        state, x0 = loop.step(state, row)
        j = row[0] // every  # what the same entry held before is overwritten
        state_at_j, x0 = state[0].astype(x_T.dtype), x0.astype(x_T.dtype)
        return (state, states.at[j].set(state_at_j), estimates.at[j].set(x0)), None

    empty = jnp.zeros((saved, *x_T.shape), x_T.dtype)
    (_, states, estimates), _ = jax.lax.scan(keep, (loop.state, empty, empty), loop.rows)
    return Trajectory(jnp.concatenate([x_T[None], states]), estimates)


def encode(
    denoiser: Denoiser,
    diffusion: Diffusion,
    solver: AbstractSolver,
    times: Times,
    x0: Float[Array, "*shape"],
    cond: PyTree = None,
) -> Float[Array, "*shape"]:
    """`sample` run backwards, from data at `times[-1]` to noise at `times[0]`, without noise drawn.

    `times` descends, as for `sample`, which with the same solver leads back, to the solver's
    order. The solver must be one of the ODE: `DDIM()`, `Euler()`, `Heun()`, `DPMSolverPP2M()`,
    `DPMSolverPP3M()`, `UniPC()`.

    >>> from eqxldm import Heun, LinearFlow, predict_velocity, uniform_times
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.ones_like(x_t)
    >>> flow = Diffusion(LinearFlow(), predict_velocity)
    >>> encode(denoiser, flow, Heun(), uniform_times(4), jnp.zeros(1))
    Array([1.], dtype=float32)
    """
    times = _descending(times)[::-1]
    return _end(_loop(denoiser, diffusion, solver, times, x0, cond), x0)


def ddim_invert(
    denoiser: Denoiser,
    diffusion: Diffusion,
    times: Times,
    x0: Float[Array, "*shape"],
    cond: PyTree = None,
) -> Float[Array, "*shape"]:
    """DDIM inversion: `encode` with `DDIM(0)`, the network asked where each step begins.

    (Song et al. 2021a, section 4.3 and eq. 14.) A network trained on DDPM's timesteps never saw
    `t = 0`: end the grid at its first timestep.

    >>> from eqxldm import LinearFlow, predict_velocity, uniform_times
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.ones_like(x_t)
    >>> flow = Diffusion(LinearFlow(), predict_velocity)
    >>> ddim_invert(denoiser, flow, uniform_times(4), jnp.zeros(1))
    Array([1.], dtype=float32)
    """
    return encode(denoiser, diffusion, DDIM(), times, x0, cond)


def nfe(path: AbstractPath, solver: AbstractSolver, times: Grid) -> int:
    """The number of function evaluations (NFE): how often a run calls the denoiser.

    A guided denoiser counts once; inside, it runs the network on two conditions.

    >>> from eqxldm import DDIM, LinearFlow, uniform_times
    >>> nfe(LinearFlow(), DDIM(), uniform_times(20))
    20
    """
    return len(solver.plan(path, check_times(times, rises=solver.goes_back_up)).t)


def check_combination(diffusion: Diffusion, solver: AbstractSolver, times: Grid) -> None:
    """`ValueError` if the three do not go together: a coefficient would be infinite on the grid.

    `sample` does the same when it is traced; this is for asking earlier, before training.

    >>> from eqxldm import DDIM, LinearFlow, predict_velocity, uniform_times
    >>> flow = Diffusion(LinearFlow(), predict_velocity)
    >>> check_combination(flow, DDIM(), uniform_times(20))
    """
    _tables(diffusion, solver, check_times(times, rises=solver.goes_back_up))


def _descending(times, solver=None):
    """The grid in float64, checked, unless it is traced."""
    if isinstance(times, Tracer):
        return times
    times = check_times(times, rises=solver is not None and solver.goes_back_up)
    if times[0] < times[-1]:
        raise ValueError(
            "times must descend, from noise at 1 to data at 0; these ascend. Reverse them, or use "
            "encode to go from data to noise."
        )
    return times


def _end(loop: Loop, x: Array) -> Array:
    (end, _), _ = jax.lax.scan(
        lambda state, row: (loop.step(state, row)[0], None), loop.state, loop.rows
    )
    return end.astype(x.dtype)


def _tables(diffusion, solver, times):
    """The plan, the path's coefficients at its times and those of `(x0, eps)` from the output."""
    solver.check(diffusion)
    path, prediction = diffusion.path, diffusion.prediction
    if isinstance(times, Tracer):
        plan = solver.plan(path, times)
        at = path.coefficients(plan.t)
        return plan, at, inverse(prediction, at)
    with jax.ensure_compile_time_eval():  # paths and predictions may be written with jnp
        plan = solver.plan(path, times)
        at = path.coefficients(plan.t)
        solution = inverse(prediction, at)
        _check_coefficients(diffusion, solver, plan, at, solution)
    return plan, at, solution


def _loop(
    denoiser, diffusion, solver, times, x_T, cond,
    *, key=None, denoised_fn=None, callback=None, with_step=False,
) -> Loop:  # fmt: skip
    _check_finite(x_T)
    plan, at, solution = _tables(diffusion, solver, times)
    if key is None and solver.draws_noise:
        raise ValueError(
            f"{_name(solver)} draws noise and needs a key: sample(..., key=jax.random.key(0))."
        )
    h = plan.t - plan.s
    rows = (plan.step, np.arange(len(plan.t)), plan.t, h, at, solution, plan.table)
    # The first two, which count, stay NumPy: so a trajectory knows its length when it is traced.
    to_jax = lambda a: jnp.asarray(a, jax.dtypes.canonicalize_dtype(a.dtype))
    rows = (*rows[:2], *jax.tree.map(to_jax, rows[2:]))

    def step(state, row):
        _, i, t, h, at, solution, table = row
        x, carry = state
        x_t, time = x.astype(x_T.dtype), t.astype(x.dtype)
        options = {"h": h.astype(x.dtype)} if with_step else {}
        out = denoiser(x_t, time, cond, key=None, **options).astype(x.dtype)
        out, variance = split_output(diffusion.prediction, x, out)
        x0, eps = apply_inverse(solution, x, out)
        if denoised_fn is not None:
            x0 = denoised_fn(x0, x, time)
            alpha, sigma = (jnp.asarray(c, x.dtype) for c in (at.alpha, at.sigma))
            followed = (x - alpha * x0) / jnp.where(sigma > 0, sigma, 1)
            eps = jnp.where(sigma > 0, followed, eps)  # at sigma = 0, x is x0 and eps stays
        if callback is not None:
            jax.debug.callback(callback, i, t, x, x0)
        noise_key = None if key is None else jax.random.fold_in(key, i)
        x, carry = solver.step(table, x, Estimate(x0, eps, variance), carry, key=noise_key)
        return (x, carry), x0

    x = x_T.astype(at_least_float32(x_T.dtype))  # the state is never bfloat16
    if isinstance(times, Tracer):
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((solution, plan.table))]
        message = (
            "A coefficient of the solver is infinite at one of the times. Close over the grid "
            "instead of tracing it, and the message will say at which and why."
        )
        x = eqx.error_if(x, ~jnp.all(jnp.stack(finite)), message)
    return Loop((x, solver.init(x)), step, rows)


def _check_coefficients(diffusion, solver, plan, at, solution) -> None:
    """Refuses, with the time and the reason, what would end in NaN."""
    t, path = plan.t, diffusion.path

    def first_infinite(tree):
        leaves = [np.asarray(leaf).reshape(len(t), -1) for leaf in jax.tree.leaves(tree)]
        wrong = ~np.all([np.all(np.isfinite(leaf), axis=1) for leaf in leaves], axis=0)
        return int(np.argmax(wrong)) if np.any(wrong) else None

    def where(i):
        off = {at.alpha[i] == 0: "start=0.999", at.sigma[i] == 0: "end=0.001"}.get(True)
        here = f"at t = {t[i]:g}, where alpha = {at.alpha[i]:g} and sigma = {at.sigma[i]:g}"
        example = f", as in uniform_times(20, {off})" if off else ""
        return here, f"Keep the grid off that time{example}"

    i = first_infinite(solution)
    if i is not None:
        unknown = "x0" if at.alpha[i] == 0 else "eps"
        here, advice = where(i)
        raise ValueError(
            f"{_name(diffusion.prediction)} on {_name(path)} says nothing about {unknown} {here}. "
            f"{advice}, or use a prediction that holds there: predict_v or predict_velocity."
        )
    i = first_infinite(plan.table)
    if i is not None:
        here, advice = where(i)
        raise ValueError(
            f"{_name(solver)} on {_name(path)} has infinite coefficients {here}. {advice}, or use "
            "DDIM, which is finite everywhere."
        )


def _check_finite(x_T: Array) -> None:
    if not isinstance(x_T, Tracer) and not np.all(np.isfinite(np.asarray(x_T))):
        raise ValueError("x_T holds NaN or infinity; it should be noise.")


def _name(thing: Any) -> str:
    return getattr(thing, "__name__", type(thing).__name__)
