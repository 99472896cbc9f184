"""The sampling loop: a solver's step scanned over a time grid."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from .paths import AbstractPath
from .predictions import Denoiser, Prediction, to_x0_eps
from .schedules import Grid
from .solvers import AbstractSolver, Interval

X = Float[Array, "*shape"]


def sample(
    denoiser: Denoiser,
    path: AbstractPath,
    prediction: Prediction,
    solver: AbstractSolver,
    times: Grid | Float[Array, " steps_and_one"],
    x_T: Float[Array, "*shape"],
    cond: PyTree = None,
    *,
    key: Key[Array, ""],
) -> Float[Array, "*shape"]:
    """Runs the reverse process from `x_T` at `times[0]` to `times[-1]`, one example.

    **Arguments**:

    - `denoiser`: `(x_t, t, cond, key=) -> out`; wrap it with `guidance.guide` for guidance.
    - `prediction`: what `out` means.
    - `times`: a descending grid in [0, 1], one entry more than there are steps
      (`schedules.uniform_times`, `timestep_times`, ...). A NumPy grid is checked, and its
      coefficients are computed in float64.
    - `x_T`: noise, `N(0, sigma(1)^2)`. The result has its shape and dtype.

    **Returns** `x` at `times[-1]`. `jax.vmap` over `x_T`, `cond` and `key` makes a batch; under
    `jax.jit` it compiles once for all values of them.

    >>> from eqxldm import DDIM, LinearFlow, predict_x0, uniform_times
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0)
    >>> sample(denoiser, LinearFlow(), predict_x0, DDIM(), uniform_times(3), jnp.ones(2),
    ...        key=jax.random.key(0))
    Array([7., 7.], dtype=float32)
    """
    body, rows = _prepare(denoiser, path, prediction, solver, times, cond, key)
    (x, _), _ = jax.lax.scan(lambda c, r: (body(c, r)[0], None), (x_T, solver.init(x_T)), rows)
    return x


def sample_trajectory(
    denoiser: Denoiser,
    path: AbstractPath,
    prediction: Prediction,
    solver: AbstractSolver,
    times: Grid | Float[Array, " steps_and_one"],
    x_T: Float[Array, "*shape"],
    cond: PyTree = None,
    *,
    key: Key[Array, ""],
) -> tuple[Float[Array, "steps_and_one *shape"], Float[Array, "steps *shape"]]:
    """As `sample`, but returns every state, `x_T` first, and every estimate of `x0`.

    >>> from eqxldm import DDIM, LinearFlow, predict_x0, uniform_times
    >>> denoiser = lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0)
    >>> states, estimates = sample_trajectory(denoiser, LinearFlow(), predict_x0, DDIM(),
    ...     uniform_times(3), jnp.ones(2), key=jax.random.key(0))
    >>> states.shape, estimates.shape
    ((4, 2), (3, 2))
    """
    body, rows = _prepare(denoiser, path, prediction, solver, times, cond, key)
    _, (states, estimates) = jax.lax.scan(body, (x_T, solver.init(x_T)), rows)
    return jnp.concatenate([x_T[None], states]), estimates


def _prepare(denoiser, path, prediction, solver, times, cond, key):
    if isinstance(times, np.ndarray):
        times = times.astype(np.float64)
        inside = len(times) > 1 and times[0] <= 1 and times[-1] >= 0
        if not (inside and np.all(np.diff(times) < 0)):
            raise ValueError("times must descend within [0, 1] and hold at least two entries.")
    interval = Interval(
        times[:-1], times[1:], path.coefficients(times[:-1]), path.coefficients(times[1:])
    )
    steps = len(times) - 1
    rows = (interval, solver.tables(path, interval), np.arange(steps))
    rows = jax.tree.map(lambda a: jnp.asarray(a, _default_dtype(a)), rows)

    def predict(x, t, at):
        return to_x0_eps(prediction, at, x, denoiser(x, t, cond, key=None))

    def body(state, row):
        interval, table, i = row
        x, carry = state
        x, carry, x0 = solver.step(
            predict, interval, table, x, carry, key=jax.random.fold_in(key, i)
        )
        return (x, carry), (x, x0)

    return body, rows


def _default_dtype(a: Any) -> Any:
    return jax.dtypes.canonicalize_dtype(a.dtype)
