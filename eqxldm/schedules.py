"""Noise schedules and time grids: pure functions of numbers, float64 NumPy tables.

A table has one entry a timestep, `0 .. T-1`, from the least noise to the most. A time grid
descends from 1 (noise) to 0 (data), one entry more than there are steps.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

Table = Float[np.ndarray, " timesteps"]
Grid = Float[np.ndarray, " steps_and_one"]


def linear_betas(timesteps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Table:
    """`beta_i` evenly spaced from `start` to `end` (Ho et al. 2020, section 4).

    The defaults are the published ones and belong to `timesteps = 1000`.

    >>> linear_betas(3, 0.1, 0.3)
    array([0.1, 0.2, 0.3])
    """
    _check_count("timesteps", timesteps)
    return _check_betas(np.linspace(start, end, timesteps))


def cosine_betas(timesteps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> Table:
    """`beta_i = min(1 - f((i+1)/T) / f(i/T), largest)`, `f(t) = cos^2(pi/2 (t+s)/(1+s))`.

    `s` is `offset`, `T` is `timesteps` (Nichol & Dhariwal 2021, eq. 17).

    >>> float(cosine_betas(1000)[-1])
    0.999
    """
    _check_count("timesteps", timesteps)
    f = np.cos(np.pi / 2 * (np.arange(timesteps + 1) / timesteps + offset) / (1 + offset)) ** 2
    return _check_betas(np.minimum(1 - f[1:] / f[:-1], largest))


def alpha_bar_from_betas(betas: Table) -> Table:
    """`alpha_bar_i = prod_{j <= i} (1 - beta_j)` (Ho et al. 2020, below eq. 4).

    >>> alpha_bar_from_betas(np.array([0.5, 0.5]))
    array([0.5 , 0.25])
    """
    return np.cumprod(1 - _check_betas(betas))


def betas_from_alpha_bar(alpha_bar: Table) -> Table:
    """`beta_i = 1 - alpha_bar_i / alpha_bar_{i-1}` with `alpha_bar_{-1} = 1`.

    Inverts `alpha_bar_from_betas`; of a respaced table it gives the respaced betas.

    >>> betas_from_alpha_bar(np.array([0.5, 0.25]))
    array([0.5, 0.5])
    """
    alpha_bar = check_alpha_bar(alpha_bar)
    return 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])


def check_alpha_bar(alpha_bar: Table) -> Table:
    """Returns the table if it lies in (0, 1) and strictly decreases, else raises `ValueError`.

    >>> check_alpha_bar(np.array([0.9, 0.1]))
    array([0.9, 0.1])
    """
    alpha_bar = np.asarray(alpha_bar, np.float64)
    inside = len(alpha_bar) > 0 and np.all((alpha_bar > 0) & (alpha_bar < 1))
    if not (inside and np.all(np.diff(alpha_bar) < 0)):
        raise ValueError("alpha_bar must be non-empty, lie in (0, 1) and strictly decrease.")
    return alpha_bar


def respace(timesteps: int, counts: Sequence[int]) -> Int[np.ndarray, " kept"]:
    """The timesteps kept when each of `len(counts)` equal sections keeps `counts[k]` of its own.

    A section's first and last timestep are kept, the others evenly between, rounded. `[25]` is
    the respacing "25" of guided-diffusion and DiT (Nichol & Dhariwal 2021, section 4).

    **Raises** `ValueError` if a section has fewer timesteps than it should keep.

    >>> respace(1000, [4])
    array([  0, 333, 666, 999])
    """
    _check_count("timesteps", timesteps)
    if not counts or len(counts) > timesteps:
        raise ValueError(f"respace: need 1 to {timesteps} counts, got {len(counts)}.")
    kept, start = [], 0
    for k, count in enumerate(counts):
        size = timesteps // len(counts) + (k < timesteps % len(counts))
        if not 1 <= count <= size:
            raise ValueError(
                f"respace: cannot keep {count} of the {size} timesteps of section {k}."
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        kept += [start + round(j * stride) for j in range(count)]
        start += size
    return np.array(kept)


def stride(timesteps: int, count: int) -> Int[np.ndarray, " kept"]:
    """Every `k`-th timestep from 0, for the smallest whole `k` that keeps `count` of them.

    The respacing "ddimN" of guided-diffusion (Song et al. 2021, appendix D.2).

    **Raises** `ValueError` if no whole stride keeps exactly `count`.

    >>> stride(1000, 4)
    array([  0, 250, 500, 750])
    """
    _check_count("timesteps", timesteps)
    if 1 <= count <= timesteps:
        for step in range(1, timesteps + 1):
            kept = np.arange(0, timesteps, step)
            if len(kept) == count:
                return kept
    raise ValueError(f"stride: no whole stride keeps {count} of {timesteps} timesteps.")


def timestep_times(timesteps: int, kept: Int[np.ndarray, " kept"]) -> Grid:
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


def uniform_times(steps: int) -> Grid:
    """`1, 1 - 1/N, ..., 0`: `steps + 1` evenly spaced times.

    >>> uniform_times(2)
    array([1. , 0.5, 0. ])
    """
    _check_count("steps", steps)
    return np.linspace(1.0, 0.0, steps + 1)


def shifted_times(steps: int, shift: float) -> Grid:
    """`t' = s t / (1 + (s - 1) t)` of uniform times: more steps near noise for `shift > 1`.

    (Esser et al. 2024, eq. 23, with `s = sqrt(m / n)`); `shift = 1` changes nothing.

    >>> shifted_times(2, 3.0)
    array([1.  , 0.75, 0.  ])
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shifted_times: shift must be positive, got {shift}.")
    t = uniform_times(steps)
    return shift * t / (1 + (shift - 1) * t)


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}.")


def _check_betas(betas: np.ndarray) -> np.ndarray:
    betas = np.asarray(betas, np.float64)
    if len(betas) == 0 or not np.all((betas > 0) & (betas < 1)):
        raise ValueError("betas must be non-empty and lie strictly between 0 and 1.")
    return betas
