"""Noise schedules of `T` timesteps: pure functions of numbers, float64 NumPy tables.

A table has one entry a timestep, `0 .. T-1`, from the least noise to the most.
"""

import math

import numpy as np
from jaxtyping import Float

Table = Float[np.ndarray, " timesteps"]


def linear_betas(timesteps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Table:
    """`beta_i` evenly spaced from `start` to `end` (Ho et al. 2020, section 4).

    The defaults are the published ones and belong to `timesteps = 1000`.

    >>> linear_betas(3, 0.1, 0.3)
    array([0.1, 0.2, 0.3])
    """
    _check_count("timesteps", timesteps)
    return _check_betas(np.linspace(start, end, timesteps))


def scaled_linear_betas(timesteps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Table:
    """`beta_i = b_i^2` with `b_i` evenly spaced from `sqrt(start)` to `sqrt(end)`.

    The schedule of latent diffusion and Stable Diffusion (Rombach et al. 2022, their code's
    "linear"). The defaults belong to `timesteps = 1000`.

    >>> scaled_linear_betas(3, 0.04, 0.16).round(4)
    array([0.04, 0.09, 0.16])
    """
    _check_count("timesteps", timesteps)
    if not (0 < start < 1 and 0 < end < 1):
        raise ValueError(f"scaled_linear_betas: start and end in (0, 1), got {start} and {end}.")
    return _check_betas(np.linspace(math.sqrt(start), math.sqrt(end), timesteps) ** 2)


def cosine_betas(timesteps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> Table:
    """`beta_i = min(1 - f((i+1)/T) / f(i/T), largest)`, `f(t) = cos^2(pi/2 (t+s)/(1+s))`.

    `s` is `offset`, `T` is `timesteps` (Nichol & Dhariwal 2021, eq. 17).

    >>> float(cosine_betas(1000)[-1])
    0.999
    """
    _check_count("timesteps", timesteps)
    f = np.cos(np.pi / 2 * (np.arange(timesteps + 1) / timesteps + offset) / (1 + offset)) ** 2
    return _check_betas(np.minimum(1 - f[1:] / f[:-1], largest))


def sigmoid_betas(
    timesteps: int = 1000,
    start: float = -3.0,
    end: float = 3.0,
    temperature: float = 1.0,
    largest: float = 0.999,
) -> Table:
    """The betas of `alpha_bar(t) = (S(end) - S(start + t (end - start))) / (S(end) - S(start))`.

    `S(u) = sigmoid(u / temperature)`, `beta_i = min(1 - alpha_bar((i+1)/T) / alpha_bar(i/T),
    largest)` (Jabri et al. 2022). A smaller temperature or a later
    start adds noise later and faster.

    >>> alpha_bar = alpha_bar_from_betas(sigmoid_betas(4))
    >>> round(float(alpha_bar[1]), 6)
    0.5
    """
    _check_count("timesteps", timesteps)
    if not (start < end and temperature > 0):
        raise ValueError(
            "sigmoid_betas: need start < end and a positive temperature, got "
            f"start {start}, end {end}, temperature {temperature}."
        )
    u = np.linspace(start, end, timesteps + 1) / temperature
    left = 1 / (1 + np.exp(u))  # 1 - S, without cancelling near the end
    alpha_bar = left - left[-1]
    return _check_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], largest))


def alpha_bar_from_betas(betas: Table) -> Table:
    """`alpha_bar_i = prod_{j <= i} (1 - beta_j)` (Ho et al. 2020, below eq. 4).

    Betas lie strictly between 0 and 1; the last may be 1, which is zero terminal SNR.

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

    The last entry may be 0: zero terminal SNR.

    >>> check_alpha_bar(np.array([0.9, 0.1]))
    array([0.9, 0.1])
    """
    alpha_bar = np.asarray(alpha_bar, np.float64)
    if len(alpha_bar) == 0:
        raise ValueError("alpha_bar is empty: it needs one entry a timestep.")
    wrong = ~((alpha_bar > 0) & (alpha_bar < 1))
    wrong[-1] &= alpha_bar[-1] != 0
    if np.any(wrong):
        i = int(np.argmax(wrong))
        raise ValueError(
            "alpha_bar must lie strictly between 0 and 1 (the last entry may be 0), got "
            f"{alpha_bar[i]} at timestep {i}."
        )
    rising = np.diff(alpha_bar) >= 0
    if np.any(rising):
        i = int(np.argmax(rising))
        raise ValueError(
            f"alpha_bar must strictly decrease, got {alpha_bar[i]} and then {alpha_bar[i + 1]} at "
            f"timestep {i + 1}."
        )
    return alpha_bar


def rescale_zero_terminal_snr(alpha_bar: Table) -> Table:
    """Shifts and scales `sqrt(alpha_bar)` so that its last entry is 0 and its first stays.

    `a_i' = a_0 (a_i - a_{T-1}) / (a_0 - a_{T-1})`, `a = sqrt(alpha_bar)` (Lin et al. 2023,
    algorithm 1). At `t = 1` no data is left: predict v, x0 or velocity, not eps.

    >>> rescale_zero_terminal_snr(np.array([0.81, 0.25, 0.01]))
    array([0.81  , 0.2025, 0.    ])
    """
    a = np.sqrt(check_alpha_bar(alpha_bar))
    if len(a) < 2:
        raise ValueError("rescale_zero_terminal_snr: needs at least two timesteps, got 1.")
    return (a[0] * (a - a[-1]) / (a[0] - a[-1])) ** 2


def shift_alpha_bar(alpha_bar: Table, shift: float) -> Table:
    """Divides the signal-to-noise ratio by `shift^2`: `logsnr' = logsnr - 2 log(shift)`.

    For images of `m` pixels and a schedule made for `n`, `shift = sqrt(m / n)`: neighbouring
    pixels repeat the signal and average the noise away (Hoogeboom et al. 2023; in time,
    Esser et al. 2024, eq. 23, which is `times.shift_time`). A `shift` above 1 means more noise.

    >>> shift_alpha_bar(np.array([0.8, 0.5]), 2.0)
    array([0.5, 0.2])
    """
    alpha_bar = check_alpha_bar(alpha_bar)
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift_alpha_bar: shift must be positive, got {shift}.")
    return alpha_bar / (alpha_bar + shift**2 * (1 - alpha_bar))


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}.")


def _check_betas(betas: np.ndarray) -> np.ndarray:
    betas = np.asarray(betas, np.float64)
    if len(betas) == 0:
        raise ValueError("betas is empty: it needs one entry a timestep.")
    wrong = ~((betas > 0) & (betas < 1))
    wrong[-1] &= betas[-1] != 1
    if np.any(wrong):
        i = int(np.argmax(wrong))
        raise ValueError(
            "betas must lie strictly between 0 and 1 (the last may be 1), got "
            f"{betas[i]} at timestep {i}."
        )
    return betas
