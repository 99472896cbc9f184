"""Sampling with fewer computations a step, without training: outputs of blocks kept over steps.

Between neighbouring steps of sampling the outputs of a transformer's attention and MLPs change
little. FORA (Selvaraju et al. 2024, "FORA: Fast-forward caching in diffusion transformer
acceleration", section 3.2) computes them at every `every`-th network call and takes them as they
were in between, where only embeddings, modulation and the last layer are computed.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from .diffusion import Diffusion
from .guidance import extrapolate, stack_conditions
from .sampling import Times, sampling_steps
from .solvers import AbstractSolver


@runtime_checkable
class Keeping(Protocol):
    """A network whose blocks' outputs can be kept, such as `models.DiT`."""

    def keep(self, x_t: Any, t: Any, cond: Any = None) -> tuple[Any, Any]:
        """The output, and what to keep."""
        ...

    def reuse(self, x_t: Any, t: Any, cond: Any, kept: Any) -> Any:
        """The output, with what was kept of another call."""
        ...


def sample_cached(
    network: Keeping,
    diffusion: Diffusion,
    solver: AbstractSolver,
    times: Times,
    x_T: Float[Array, "*shape"],
    cond: PyTree = None,
    *,
    every: int = 2,
    null: PyTree = None,
    scale: float | Float[Array, ""] = 1.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "*shape"]:
    """`sample` with the blocks of the network run at every `every`-th call only.

    **Arguments** as in `sample`, and:

    - `network`: a `DiT` with the library's blocks, or anything else that can `keep` and `reuse`.
    - `every`: 1 is `sample` itself; 2 runs half of the blocks' computations, and so on. What it
      costs in quality grows fast: measure it on the model at hand.
    - `null`, `scale`: of classifier-free guidance, as in `guidance.guide`; 1 is none.

    `jax.vmap` over `x_T`, `cond` and `key` makes a batch.

    **Raises** `ValueError` for an `every` below 1, and as `sample`.

    >>> from eqxldm import DDIM, LinearFlow, predict_velocity, uniform_times
    >>> from eqxldm.models import DiT
    >>> dit = DiT((1, 4, 4), patch_size=2, depth=1, width=8, num_heads=1, key=jax.random.key(0))
    >>> flow = Diffusion(LinearFlow(), predict_velocity)
    >>> sample_cached(dit, flow, DDIM(), uniform_times(5), jnp.ones((1, 4, 4)), every=2).shape
    (1, 4, 4)
    """
    if every < 1:
        raise ValueError(f"sample_cached: every must be at least 1, got {every}.")
    guided = not (isinstance(scale, int | float) and scale == 1)
    kept: list[Any] = [None]  # set and read in the trace of one group of calls alone

    def denoiser(x_t: Any, t: Any, cond: Any, *, key: Any = None) -> Any:
        call = _keep if kept[0] is None else _reuse
        if not guided:
            out, kept[0] = call(network, x_t, t, cond, kept[0])
            return out
        pair = stack_conditions(null, cond)
        axes = (0, None if kept[0] is None else 0)
        both = jax.vmap(lambda c, k: call(network, x_t, t, c, k), in_axes=axes)
        (without, out), kept[0] = both(pair, kept[0])
        return extrapolate(x_t, t, out, without, scale)

    loop = sampling_steps(denoiser, diffusion, solver, times, x_T, cond, key=key)
    calls = len(jax.tree.leaves(loop.rows)[0])

    def group(state: Any, rows: Any) -> tuple[Any, None]:
        kept[0] = None
        for i in range(len(jax.tree.leaves(rows)[0])):
            state, _ = loop.step(state, jax.tree.map(lambda a, i=i: jnp.asarray(a)[i], rows))
        kept[0] = None
        return state, None

    whole = calls - calls % every
    grouped = lambda a: jnp.asarray(a)[:whole].reshape(whole // every, every, *a.shape[1:])
    state, _ = jax.lax.scan(group, loop.state, jax.tree.map(grouped, loop.rows))
    if whole < calls:
        state, _ = group(state, jax.tree.map(lambda a: jnp.asarray(a)[whole:], loop.rows))
    return state[0].astype(x_T.dtype)


def _keep(network: Keeping, x_t: Any, t: Any, cond: Any, kept: None) -> tuple[Any, Any]:
    return network.keep(x_t, t, cond)


def _reuse(network: Keeping, x_t: Any, t: Any, cond: Any, kept: Any) -> tuple[Any, Any]:
    return network.reuse(x_t, t, cond, kept), kept
