"""Sampling a batch step by step: one compiled program a size, whatever else changes."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..diffusion import Diffusion
from ..paths import LinearFlow
from ..sampling import sampling_steps
from ..solvers import AbstractSolver
from ..times import Grid

# A loop's step looks at its row alone, so any grid and any path make the same one.
ANY_GRID, ANY_PATH = np.array([0.9, 0.5, 0.1]), LinearFlow()


class Keep(NamedTuple):
    """What stays of a picture while the rest is painted anew: `mask` is 1 where it is repainted.

    `noise` is that of the start: the picture is noised with the same at every step.
    """

    mask: Float[Array, "..."]
    latent: Float[Array, "*shape"]
    noise: Float[Array, "n *shape"]


class Step(NamedTuple):
    """After a step: how many are done of how many, the latents, and the estimates of them."""

    done: int
    of: int
    x: Float[Array, "n *shape"]
    x0: Float[Array, "n *shape"]


def steps_of_strength(
    times: Grid, strength: float, *, round_up: bool = False
) -> Float[np.ndarray, " left"]:
    """The end of a grid that image-to-image runs over: `m = int(n strength)` of its n steps.

    `round_up` takes `n - int(n - n strength)` instead: Stable Diffusion 3's and FLUX.1's
    pipelines in diffusers differ so from the older ones.

    **Raises** `ValueError` for a strength outside (0, 1], and if no step is left.

    >>> steps_of_strength(np.array([1.0, 0.75, 0.5, 0.25, 0.0]), 0.5)
    array([0.5 , 0.25, 0.  ])
    """
    n = len(times) - 1
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}.")
    m = n - int(max(n - n * strength, 0)) if round_up else min(int(n * strength), n)
    if m < 1:
        raise ValueError(
            f"strength {strength} leaves none of {n} steps: take more steps, or a strength of at "
            f"least {1 / n:.3g}."
        )
    return times[n - m :]


def latent_mask(mask: Float[Array, "H W"], size: tuple[int, int]) -> Float[Array, "1 h w"]:
    """A mask of a picture, 1 where it is repainted, at the size of its latent: nearest pixels.

    From 0.5 on is 1, and of each square the pixel at its upper left counts, as in torch's
    interpolation.

    >>> latent_mask(jnp.array([[0.2, 0.0], [0.0, 0.0]]) + 0.4, (1, 1)).tolist()
    [[[1.0]]]
    """
    rows, columns = ((jnp.arange(n) * full) // n for n, full in zip(size, mask.shape, strict=True))
    return (mask[rows][:, columns] >= 0.5).astype(jnp.float32)[None]


def start_latents(
    diffusion: Diffusion,
    times: Grid,
    latent: Float[Array, "*shape"],
    noise: Float[Array, "n *shape"],
) -> Float[Array, "n *shape"]:
    """A picture's latent noised to `times[0]`, where image-to-image begins.

    >>> from eqxldm import LinearFlow, predict_velocity
    >>> flow = Diffusion(LinearFlow(), predict_velocity)
    >>> start_latents(flow, np.array([0.25, 0.0]), jnp.ones((1, 1, 1)), jnp.zeros((2, 1, 1, 1)))[0]
    Array([[[0.75]]], dtype=float32)
    """
    at = diffusion.path.coefficients(float(times[0]))
    return float(at.alpha) * latent[None] + float(at.sigma) * noise


def sample_steps(
    denoiser: Any,
    diffusion: Diffusion,
    solver: AbstractSolver,
    times: Grid,
    x_T: Float[Array, "n *shape"],
    cond: PyTree,
    *,
    keys: Any = None,
    keep: Keep | None = None,
) -> Iterator[Step]:
    """`eqxldm.sample` over a batch, one network call at a time; each `Step` as it is done.

    The program that is compiled depends on the shapes alone: no other grid, number of steps,
    strength, prompt, seed, guidance scale or mask compiles again.

    **Arguments**: as in `sample`, for a batch; `denoiser` is a PyTree (`GuidedDenoiser`), `cond`
    has a leading axis, `keys` are one for each example, for solvers that draw noise. With `keep`
    a picture is put back after every step where its mask is 0 (Lugmayr et al. 2022, eq. 8, without
    resampling; diffusers' inpainting with networks of 4 channels).

    >>> from eqxldm import DDIM, LinearFlow, predict_x0, uniform_times
    >>> denoiser = eqx.Partial(lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0))
    >>> flow = Diffusion(LinearFlow(), predict_x0)
    >>> *_, last = sample_steps(denoiser, flow, DDIM(), uniform_times(3), jnp.ones((2, 1)), None)
    >>> last.x.tolist(), last.done
    ([[7.0], [7.0]], 3)
    """
    given = denoiser, diffusion, solver, times, x_T, cond, keys
    _, _, anywhere, _, (x, carry), _, _, keys = step_program(*given)
    rows = _rows(diffusion, solver, times, x_T, keys)
    at = diffusion.path.coefficients(np.asarray(solver.plan(diffusion.path, times).s))
    alpha, sigma = np.array(at.alpha, np.float32), np.array(at.sigma, np.float32)
    alpha[-1], sigma[-1] = 1.0, 0.0  # at the end the picture itself is put back, without noise
    calls = len(alpha)
    for i in range(calls):
        row = jax.tree.map(lambda a, i=i: a[i], rows)
        (x, carry), x0 = _step(denoiser, anywhere, solver, (x, carry), row, cond, keys)
        if keep is not None:
            x = _put_back(x, keep, alpha[i], sigma[i])
        yield Step(i + 1, calls, x, x0)


def sample_latents(*arguments: Any, callback: Callable[[Step], None] | None = None, **options: Any):
    """The latents that `sample_steps` ends with; `callback` sees every step.

    >>> from eqxldm import DDIM, LinearFlow, predict_x0, uniform_times
    >>> denoiser = eqx.Partial(lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0))
    >>> flow = Diffusion(LinearFlow(), predict_x0)
    >>> sample_latents(denoiser, flow, DDIM(), uniform_times(3), jnp.ones((1, 1)), None).tolist()
    [[7.0]]
    """
    step = None
    for step in sample_steps(*arguments, **options):
        if callback is not None:
            callback(step)
    assert step is not None  # a grid has at least one step
    return step.x


def step_program(
    denoiser: Any,
    diffusion: Diffusion,
    solver: AbstractSolver,
    times: Grid,
    x_T: Float[Array, "n *shape"],
    cond: PyTree,
    keys: Any = None,
) -> tuple[Any, ...]:
    """The jitted step of `sample_steps` and its first arguments: `step, *arguments`.

    `step.lower(*arguments).compile()` says what memory it takes, before anything is run.

    >>> from eqxldm import DDIM, LinearFlow, predict_x0, uniform_times
    >>> denoiser = eqx.Partial(lambda x_t, t, cond, key=None: jnp.full_like(x_t, 7.0))
    >>> flow = Diffusion(LinearFlow(), predict_x0)
    >>> step, *first = step_program(
    ...     denoiser, flow, DDIM(), uniform_times(3), jnp.ones((2, 1)), None)
    >>> (x, carry), x0 = step(*first)
    """
    keys = keys if solver.draws_noise else None
    first = jax.tree.map(lambda a: a[0], _rows(diffusion, solver, times, x_T, keys))
    x = x_T.astype(jnp.float32)
    state = x, jax.vmap(solver.init)(x)
    anywhere = Diffusion(ANY_PATH, diffusion.prediction)
    return _step, denoiser, anywhere, solver, state, first, cond, keys


def _rows(diffusion, solver, times, x_T, keys):
    """A row for each network call: its time, and the coefficients there."""
    key = None if keys is None else keys[0]
    network = lambda x_t, t, cond, key=None: x_t  # which is not called
    return sampling_steps(network, diffusion, solver, times, x_T[0], key=key).rows


@eqx.filter_jit
def _step(denoiser, diffusion, solver, state, row, cond, keys):
    """One network call for the whole batch."""

    def one(state, cond, key):
        x, _ = state
        given = denoiser, diffusion, solver, ANY_GRID, x, cond
        return sampling_steps(*given, key=key).step(state, row)

    return jax.vmap(one)(state, cond, keys)


@jax.jit
def _put_back(x, keep, alpha, sigma):
    picture = alpha * keep.latent + sigma * keep.noise
    return (1 - keep.mask) * picture + keep.mask * x
