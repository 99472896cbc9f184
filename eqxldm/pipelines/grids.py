"""The time grids of published schedulers: which timesteps of a table, which times of a flow."""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import numpy as np

from ..times import Grid, shift_time
from .errors import PipelineError

# (timesteps of the table, steps) -> timesteps that are visited, increasing
Spacing = Callable[[int, int], Any]


def leading(timesteps: int, steps: int) -> Any:
    """`0, k, ..., (n - 1) k` with `k = T // n`.

    >>> leading(1000, 3)
    array([  0, 333, 666])
    """
    return np.arange(steps) * (timesteps // steps)


def leading_after_first(timesteps: int, steps: int) -> Any:
    """`k, 2 k, ..., n k` with `k = T // (n + 1)`: of DPM-Solver and UniPC in diffusers.

    >>> leading_after_first(1000, 3)
    array([250, 500, 750])
    """
    return leading(timesteps, steps + 1)[1:]


def linspace(timesteps: int, steps: int) -> Any:
    """`round(linspace(0, T - 1, n))`.

    >>> linspace(1000, 3)
    array([  0., 500., 999.])
    """
    return np.round(np.linspace(0, timesteps - 1, steps))


def linspace_after_first(timesteps: int, steps: int) -> Any:
    """The last n of n + 1 timesteps of `linspace`: of DPM-Solver and UniPC in diffusers.

    >>> linspace_after_first(1000, 3)
    array([333., 666., 999.])
    """
    return linspace(timesteps, steps + 1)[1:]


def linspace_fractional(timesteps: int, steps: int) -> Any:
    """`linspace(0, T - 1, n)`, not rounded (but to float32): of Euler in diffusers.

    >>> linspace_fractional(1000, 3)
    array([  0. , 499.5, 999. ])
    """
    rounded = np.linspace(0, timesteps - 1, steps, dtype=np.float32)
    return rounded.astype(np.float64)


class AbstractGrid(eqx.Module):
    """From a number of steps to times; `tokens` is how many the network makes of the latent."""

    @abc.abstractmethod
    def times(self, steps: int, tokens: int | None = None) -> Grid:
        """From the first time to the last, `steps` steps."""


class TableGrid(AbstractGrid):
    """Timesteps of a table, `t = (timestep + 1) / T`, then the end: 0 or the first timestep.

    **Arguments**:

    - `timesteps`: of the table, T.
    - `spacing`: which of them are visited.
    - `offset`: what is added to each (`steps_offset`).
    - `to_data`: whether the last step leads to clean data at t = 0, or to the table's first
      timestep, `alpha_bar[0]`, as Stable Diffusion's `set_alpha_to_one: false` has it. A run whose
      last timestep is that one has one step less then: it would lead nowhere.

    >>> TableGrid(1000, leading, offset=1, to_data=False).times(4)
    array([0.752, 0.502, 0.252, 0.002, 0.001])
    """

    timesteps: int = eqx.field(static=True)
    spacing: Spacing = eqx.field(static=True)
    offset: int = eqx.field(static=True, default=0)
    to_data: bool = eqx.field(static=True, default=True)

    def times(self, steps: int, tokens: int | None = None) -> Grid:
        if not 1 <= steps <= self.timesteps:
            raise PipelineError(
                f"{steps} steps: the scheduler's table allows 1 to {self.timesteps}."
            )
        kept = np.asarray(self.spacing(self.timesteps, steps), np.float64) + self.offset
        if kept[-1] > self.timesteps - 1 or np.any(np.diff(kept) <= 0):
            raise PipelineError(
                f"{steps} steps are too many for the scheduler: with steps_offset = {self.offset} "
                f"it would visit timestep {kept[-1]:g} of 0 .. {self.timesteps - 1}, or one twice."
            )
        times = (kept[::-1] + 1) / self.timesteps
        end = 0.0 if self.to_data else 1 / self.timesteps
        grid = np.append(times, end) if times[-1] > end else times
        if len(grid) < 2:
            raise PipelineError(
                f"{steps} step: it begins at the table's first timestep and ends there, so nothing "
                "would be done. Take more steps."
            )
        return grid


class FlowGrid(AbstractGrid):
    """Times of a flow, evenly spaced and then shifted; the last step leads to t = 0.

    From 1 to `1 / 1000`, which is shifted once itself where the shift is fixed: so Stable
    Diffusion 3's grid is shifted twice (its own program's `get_sigmas` does so too). With
    `every_nth` from 1 to `1 / n`, as FLUX.1's program asks the scheduler to.

    **Arguments**:

    - `shift`: of `times.shift_time`, a number, where there are no `mus`.
    - `mus`: `(tokens, mu, more tokens, their mu)`: the shift is `exp(mu)`, `mu` linear in the
      number of the latent's tokens, or `mu` itself with `linear_mu` (after Esser et al. 2024,
      eq. 23; FLUX.1's program).
    - `terminal`: where the last time before 0 lies; None leaves it where it is.

    >>> FlowGrid(3.0).times(3).round(5)  # Stable Diffusion 3's
    array([1.     , 0.75112, 0.00893, 0.     ])
    >>> FlowGrid(1.0, every_nth=True).times(4)  # FLUX.1 schnell's
    array([1.  , 0.75, 0.5 , 0.25, 0.  ])
    """

    shift: float = eqx.field(static=True, default=1.0)
    mus: tuple[float, float, float, float] | None = eqx.field(static=True, default=None)
    linear_mu: bool = eqx.field(static=True, default=False)
    every_nth: bool = eqx.field(static=True, default=False)
    terminal: float | None = eqx.field(static=True, default=None)

    def times(self, steps: int, tokens: int | None = None) -> Grid:
        if not 1 <= steps <= 1000:
            raise PipelineError(f"{steps} steps: the scheduler allows 1 to 1000.")
        last = 1 / 1000
        if self.every_nth:
            last = 1 / steps
        elif self.mus is None:
            last = float(shift_time(np.array(last), self.shift))
        times = np.linspace(1.0, last, steps)
        times = shift_time(times, self.shift if self.mus is None else self.shift_at(tokens))
        if self.terminal is not None:
            if steps < 2:
                raise PipelineError("1 step: the scheduler's shift_terminal needs at least 2.")
            times = 1 - (1 - times) * (1 - self.terminal) / (1 - times[-1])
        return np.append(times, 0.0)

    def shift_at(self, tokens: int | None) -> float:
        """`exp(mu)` for a latent of so many tokens.

        >>> grid = FlowGrid(mus=(256, 0.5, 4096, 1.15))
        >>> round(grid.shift_at(4096), 4) == round(math.exp(1.15), 4)
        True
        """
        if self.mus is None:
            return self.shift
        if tokens is None:
            raise PipelineError(
                "the scheduler shifts its times with the size of the picture: give tokens=, how "
                "many the network makes of the latent, or height and width."
            )
        few, low, many, high = self.mus
        mu = low + (high - low) * (tokens - few) / (many - few)
        return mu if self.linear_mu else math.exp(mu)


class MultistepFlowGrid(AbstractGrid):
    """Times of a flow as UniPC's scheduler in diffusers spaces them: `n` of `n + 1` from 1 on.

    `linspace(1, 1 / T, n + 1)` without its end, shifted once (`times.shift_time`), in float32, and
    at last 0. The first is `1 - 1e-6`: at 1 no logSNR is finite. Its networks are told `floor(T t)`
    (`NetworkDenoiser`), so a time whose product rounds to another whole number is moved by its last
    bit.

    **Arguments**: `shift`; `timesteps`, T.

    >>> MultistepFlowGrid(3.0).times(3).round(4)  # Wan's at 480p
    array([1.    , 0.8573, 0.6007, 0.    ])
    """

    shift: float = eqx.field(static=True, default=1.0)
    timesteps: int = eqx.field(static=True, default=1000)

    def times(self, steps: int, tokens: int | None = None) -> Grid:
        total = self.timesteps
        if not 1 <= steps <= total:
            raise PipelineError(f"{steps} steps: the scheduler allows 1 to {total}.")
        times = shift_time(np.linspace(1.0, 1 / total, steps + 1)[:-1], self.shift)
        times[0] = min(times[0], 1 - 1e-6)
        told, rounded = np.floor(times * total), times.astype(np.float32)
        floor = lambda t: np.floor(np.float32(total) * t)
        rounded = np.where(floor(rounded) < told, np.nextafter(rounded, np.float32(2)), rounded)
        rounded = np.where(floor(rounded) > told, np.nextafter(rounded, np.float32(0)), rounded)
        return np.append(rounded.astype(np.float64), 0.0)
