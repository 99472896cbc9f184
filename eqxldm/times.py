"""Time grids: descending float64 NumPy arrays from noise to data, one entry more than steps.

Time 1 is noise, 0 is data. What a solver computes from a NumPy grid, it computes in float64.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from .betas import Timesteps
from .paths import AbstractPath, Time, time_at_logsnr

Grid = Float[np.ndarray, " steps_and_one"]


def timestep_times(timesteps: int, kept: Timesteps) -> Grid:
    """The time grid that visits the timesteps `kept` from the last to the first and ends at 0.

    Timestep `i` of `T` lies at time `(i + 1) / T`; time 0 is clean data.

    >>> timestep_times(10, np.array([0, 4, 9]))
    array([1. , 0.5, 0.1, 0. ])
    """
    kept = np.asarray(kept)
    if kept.size == 0 or kept[0] < 0 or kept[-1] >= timesteps or np.any(np.diff(kept) <= 0):
        raise ValueError(
            f"timestep_times: kept must increase within 0 .. {timesteps - 1}, got {kept}."
        )
    return np.concatenate([(kept[::-1] + 1) / timesteps, [0.0]])


def uniform_times(steps: int, start: float = 1.0, end: float = 0.0) -> Grid:
    """`steps + 1` evenly spaced times from `start` down to `end`.

    >>> uniform_times(2)
    array([1. , 0.5, 0. ])
    """
    _check_steps("uniform_times", steps)
    if not 0 <= end < start <= 1:
        raise ValueError(f"uniform_times: need 0 <= end < start <= 1, got {start} and {end}.")
    return np.linspace(start, end, steps + 1)


def shift_time(t: Time, shift: float) -> Time:
    """`t' = s t / (s t + 1 - t)`: on `LinearFlow`, logsnr(t') = logsnr(t) - 2 log(s).

    The resolution shift of Esser et al. 2024, eq. 23, with `s = sqrt(m / n)` for images of `m`
    pixels where `n` were tuned; `s > 1` moves times towards noise. For grids and, inside a time
    sampler, for training.

    >>> float(shift_time(np.array(0.5), 3.0))
    0.75
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift_time: shift must be positive, got {shift}.")
    return shift * t / (shift * t + (1 - t))


def shifted_times(steps: int, shift: float) -> Grid:
    """`shift_time` of uniform times: more steps near noise for `shift > 1` (Esser et al. 2024).

    `shift = 1` changes nothing.

    >>> shifted_times(2, 3.0)
    array([1.  , 0.75, 0.  ])
    """
    return shift_time(uniform_times(steps), shift)


def karras_times(
    path: AbstractPath,
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Grid:
    """Times at which the noise-to-signal ratio `sigma / alpha` takes Karras et al.'s values.

    `ratio_i = (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho` for
    `i = 0 .. N - 1`, then 0 (Karras et al. 2022, eq. 5). The defaults are theirs; a path of
    bounded ratio, like DDPM's table (about 157), needs `sigma_max` below its bound.

    **Raises** `ValueError` if the path does not reach a ratio.

    >>> from eqxldm.paths import LinearFlow
    >>> karras_times(LinearFlow(), 3, sigma_min=0.25, sigma_max=4.0).round(3)
    array([0.8  , 0.534, 0.2  , 0.   ])
    """
    _check_steps("karras_times", steps)
    if not (0 < sigma_min < sigma_max and rho > 0):
        raise ValueError(
            "karras_times: need 0 < sigma_min < sigma_max and rho > 0, got "
            f"{sigma_min}, {sigma_max} and {rho}."
        )
    ratio = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho
    return np.append(_times_at("karras_times", path, -2 * np.log(ratio)), 0.0)


def logsnr_times(path: AbstractPath, steps: int, low: float = -10.0, high: float = 10.0) -> Grid:
    """Times at which logSNR is evenly spaced from `low` to `high`, then 0.

    The natural grid of DPM-Solver, whose step is a difference of logSNRs (Lu et al. 2022a,
    with lambda = logSNR / 2).

    **Raises** `ValueError` if the path does not reach a logSNR.

    >>> from eqxldm.paths import LinearFlow
    >>> logsnr_times(LinearFlow(), 3, -2.0, 2.0).round(3)
    array([0.731, 0.5  , 0.269, 0.   ])
    """
    _check_steps("logsnr_times", steps)
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"logsnr_times: need finite low < high, got {low} and {high}.")
    return np.append(_times_at("logsnr_times", path, np.linspace(low, high, steps)), 0.0)


def check_times(times: Any) -> Grid:
    """Returns the grid in float64 if it strictly descends within [0, 1], else `ValueError`.

    An ascending grid is accepted as well: it is that of `sampling.encode`.

    >>> check_times(np.array([1.0, 0.0]))
    array([1., 0.])
    """
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(
            f"times must be one row of at least two entries, got the shape {times.shape}."
        )
    outside = ~((times >= 0) & (times <= 1))
    if np.any(outside):
        i = int(np.argmax(outside))
        raise ValueError(f"times must lie in [0, 1], got times[{i}] = {times[i]}.")
    steps = np.diff(times)
    turns = np.sign(steps) != np.sign(steps[0]) if steps[0] else np.ones(len(steps), bool)
    if np.any(turns):
        i = int(np.argmax(turns))
        raise ValueError(
            "times must descend strictly, got "
            f"times[{i}] = {times[i]} and times[{i + 1}] = {times[i + 1]}."
        )
    return times


def _times_at(name: str, path: AbstractPath, logsnr: np.ndarray) -> np.ndarray:
    low, high = float(path.logsnr(1.0)), float(path.logsnr(0.0))
    if math.isfinite(low):  # asking for the end itself is asking for it up to rounding
        logsnr = np.where(np.abs(logsnr - low) < 1e-6, low, logsnr)
    inside = (logsnr >= low) & (logsnr <= high)
    if not np.all(inside):
        wrong = float(logsnr[np.argmin(inside)])
        raise ValueError(
            f"{name}: logSNR {wrong:.4g} (sigma / alpha = {math.exp(-wrong / 2):.4g}) lies outside "
            f"of what {type(path).__name__} reaches, [{low:.4g}, {high:.4g}] "
            f"(sigma / alpha up to {math.exp(-low / 2):.4g}). Lower sigma_max, or raise low."
        )
    return time_at_logsnr(path, logsnr)


def _check_steps(name: str, steps: int) -> None:
    if steps < 1:
        raise ValueError(f"{name}: steps must be at least 1, got {steps}.")
