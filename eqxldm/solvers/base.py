"""What a solver is: a plan over a grid, an `init` and a `step`."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ..diffusion import Diffusion, Estimate
from ..paths import AbstractPath, Coefficients, Time

X = Float[Array, "*shape"]


class Plan(eqx.Module):
    """The network calls of a run, one entry each: where they are made, and the coefficients.

    `t` is the time at which the network is called and `s` the one that the call's step leads to
    (`s = t` for a call that corrects the step before it); `step` counts the step that the call
    belongs to; `table` is what the solver's `step` gets.

    >>> from eqxldm import DDIM, LinearFlow
    >>> plan = DDIM().plan(LinearFlow(), np.array([1.0, 0.5, 0.0]))
    >>> plan.t, plan.s, plan.step
    (array([1. , 0.5]), array([0.5, 0. ]), array([0, 1]))
    """

    t: Time
    s: Time
    step: Any
    table: Any


class Interval(eqx.Module):
    """The steps `t -> s` of a grid and the path's coefficients at their ends.

    `at_before` belongs to the step before, the one that ended at `t`: where it began. The first
    step has none before it, and there it is `at_t`.

    >>> from eqxldm import LinearFlow
    >>> interval = intervals(LinearFlow(), np.array([1.0, 0.5, 0.0]))
    >>> interval.s, interval.at_before.sigma
    (array([0.5, 0. ]), array([1., 1.]))
    """

    t: Time
    s: Time
    at_t: Coefficients
    at_s: Coefficients
    at_before: Coefficients


def intervals(path: AbstractPath, times: Any) -> Interval:
    """The intervals of a grid, as arrays with one entry a step.

    >>> from eqxldm import LinearFlow
    >>> intervals(LinearFlow(), np.array([1.0, 0.5, 0.0])).at_t.sigma
    array([1. , 0.5])
    """
    xp = jnp if isinstance(times, jax.Array) else np
    return interval_at(path, times[:-1], times[1:], xp.concatenate([times[:1], times[:-2]]))


def interval_at(path: AbstractPath, t: Time, s: Time, before: Time) -> Interval:
    at = path.coefficients
    return Interval(t, s, at(t), at(s), at(before))


class AbstractSolver(eqx.Module):
    """A solver. To add one, write `plan`, `init` and `step`.

    What a solver can do beside, it says: `draws_noise` (True unless said otherwise, and then
    sampling needs a key), `goes_back_up` (False: grids must descend), and `check` refuses a
    diffusion that it cannot work with.

    >>> class Nearest(AbstractSolver):  # x_s = alpha_s x0 + sigma_s eps
    ...     def plan(self, path, times):
    ...         at_s = path.coefficients(times[1:])
    ...         return one_call_a_step(times, (at_s.alpha, at_s.sigma))
    ...     def init(self, x):
    ...         return None
    ...     def step(self, table, x, estimate, carry, *, key):
    ...         alpha, sigma = table
    ...         return alpha * estimate.x0 + sigma * estimate.eps, carry
    """

    @property
    def draws_noise(self) -> bool:
        """Whether `step` uses its key."""
        return True

    @property
    def goes_back_up(self) -> bool:
        """Whether a grid may rise between steps, the state being noised again there."""
        return False

    def check(self, diffusion: Diffusion) -> None:
        """`ValueError` for a diffusion that this solver cannot sample; by default there is none."""

    @abc.abstractmethod
    def plan(self, path: AbstractPath, times: Any) -> Plan:
        """The network calls over a grid, and the solver's coefficients for each."""

    @abc.abstractmethod
    def init(self, x: X) -> Any:
        """What the solver carries from call to call besides `x`; None for nothing."""

    @abc.abstractmethod
    def step(
        self, table: Any, x: X, estimate: Estimate, carry: Any, *, key: Key[Array, ""] | None
    ) -> tuple[X, Any]:
        """What follows one network call at `x`: the next `x` and the next carry.

        `key` is None only where `draws_noise` is False.
        """


def one_call_a_step(times: Any, table: Any) -> Plan:
    """The plan of a solver that calls the network once a step, where the step begins.

    >>> one_call_a_step(np.array([1.0, 0.0]), None).t
    array([1.])
    """
    return Plan(times[:-1], times[1:], np.arange(len(times) - 1), table)


def add_noise(x: X, eta: float, std: Array, key: Any) -> X:
    return x + std * normal(key, x) if eta else x


def normal(key: Any, x: X) -> X:
    return jax.random.normal(key, x.shape, x.dtype)


def as_like(x: X, *scalars: Any) -> list[Any]:
    return [None if c is None else jnp.asarray(c, x.dtype) for c in scalars]


def check_eta(name: str, eta: float) -> float:
    if not 0 <= eta <= 1:
        raise ValueError(f"{name}: eta must lie in [0, 1], got {eta}.")
    return eta


def check_descending(solver: AbstractSolver, times: Any) -> None:
    if isinstance(times, np.ndarray) and len(times) > 1 and times[0] < times[-1]:
        raise ValueError(
            f"{type(solver).__name__} draws noise and cannot run from data to noise: times must "
            "descend. To encode, take DDIM(), Euler(), Heun(), DPMSolverPP2M(), DPMSolverPP3M() or "
            "UniPC()."
        )
