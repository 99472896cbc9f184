"""Times: the timesteps of a table that are kept, grids to sample at, and times to train at.

Time 1 is noise, 0 is data. A grid is a descending float64 NumPy array from noise to data, one entry
more than steps: what a solver computes from it, it computes in float64. A respacing is the
increasing array of a table's timesteps that are kept. A time sampler draws a batch of times.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from .paths import AbstractPath, Time, time_at_logsnr

Timesteps = Int[np.ndarray, " kept"]
TimeSampler = Callable[[Key[Array, ""], int], Float[Array, " batch"]]
Grid = Float[np.ndarray, " steps_and_one"]


def respace(timesteps: int, counts: Sequence[int]) -> Timesteps:
    """The timesteps kept when each of `len(counts)` equal sections keeps `counts[k]` of its own.

    A section's first and last timestep are kept, the others evenly between. `[25]` is the
    respacing "25" of guided-diffusion and DiT (Nichol & Dhariwal 2021, section 4; the code's
    `space_timesteps`), whose rule is followed to the letter: position `j` is the sum of `j` strides
    added one after the other in float64, then rounded, half to even. The sum's own rounding
    decides where a position falls between two timesteps, so `round(j * stride)` would not do.

    **Raises** `ValueError` if a section has fewer timesteps than it should keep.

    >>> respace(1000, [4])
    array([  0, 333, 666, 999])
    """
    _check_kept("respace", timesteps, 1)
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
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return np.array(kept)


def stride(timesteps: int, count: int) -> Timesteps:
    """Every `k`-th timestep from 0, for the smallest whole `k` that keeps `count` of them.

    The respacing "ddimN" of guided-diffusion (Song et al. 2021, appendix D.2).

    **Raises** `ValueError` if no whole stride keeps exactly `count`.

    >>> stride(1000, 4)
    array([  0, 250, 500, 750])
    """
    _check_kept("stride", timesteps, 1)
    if 1 <= count <= timesteps:
        for step in range(1, timesteps + 1):
            kept = np.arange(0, timesteps, step)
            if len(kept) == count:
                return kept
    raise ValueError(f"stride: no whole stride keeps {count} of {timesteps} timesteps.")


def leading_timesteps(timesteps: int, count: int) -> Timesteps:
    """`0, k, 2 k, ..., (count - 1) k` with `k = floor(T / count)` (Lin et al. 2023, table 2).

    The last timestep is not among them (unless all are), so sampling starts from less noise than
    training saw.

    >>> leading_timesteps(1000, 3)
    array([  0, 333, 666])
    """
    _check_kept("leading_timesteps", timesteps, count)
    return np.arange(count) * (timesteps // count)


def trailing_timesteps(timesteps: int, count: int) -> Timesteps:
    """`round(T - j T / count) - 1` for `j = 0 .. count - 1` (Lin et al. 2023, table 2).

    Evenly spaced from the last timestep down; the one to use with zero terminal SNR.

    >>> trailing_timesteps(1000, 4)
    array([249, 499, 749, 999])
    """
    _check_kept("trailing_timesteps", timesteps, count)
    descending = np.round(timesteps - np.arange(count) * (timesteps / count)) - 1
    return descending[::-1].astype(int)


def linspace_timesteps(timesteps: int, count: int) -> Timesteps:
    """`round(linspace(0, T - 1, count))`: both ends kept (Lin et al. 2023, table 2).

    Half is rounded to even, as NumPy does. `respace(timesteps, [count])` is the same rule with the
    strides summed one after the other, and may differ from it by one timestep.

    >>> linspace_timesteps(1000, 4)
    array([  0, 333, 666, 999])
    """
    _check_kept("linspace_timesteps", timesteps, count)
    return np.round(np.linspace(0, timesteps - 1, count)).astype(int)


def parse_respacing(timesteps: int, spec: str) -> Timesteps:
    """The respacing that guided-diffusion and DiT write as `"25"`, `"10,15,20"` or `"ddim50"`.

    One count or one a section is `respace`, `ddimN` is `stride`; `""` keeps every timestep
    (Nichol & Dhariwal 2021; their code's `space_timesteps`).

    >>> parse_respacing(1000, "ddim4")
    array([  0, 250, 500, 750])
    >>> parse_respacing(9, "1,2,3")
    array([0, 3, 5, 6, 7, 8])
    """
    numbers = spec.removeprefix("ddim").split(",") if spec else [str(timesteps)]
    if not all(n.strip().isdecimal() for n in numbers) or (
        spec.startswith("ddim") and len(numbers) > 1
    ):
        raise ValueError(f'parse_respacing: expected "25", "10,15,20" or "ddim50", got "{spec}".')
    counts = [int(n) for n in numbers]
    return stride(timesteps, counts[0]) if spec.startswith("ddim") else respace(timesteps, counts)


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


def repaint_times(steps: int, jump: int = 10, resamplings: int = 10) -> Grid:
    """Uniform times that go back up `jump` steps, `resamplings - 1` times at each place (RePaint).

    Every `jump` steps down, the state is noised again by as many steps and comes down once more,
    so that what is filled in gets into harmony with what is known (Lugmayr et al. 2022, section
    4.2 and appendix B; theirs are 250 steps, jumps of 10 and 10 resamplings). For solvers that
    `goes_back_up`: `DDPM`. Network calls: about `steps resamplings`.

    >>> repaint_times(4, jump=2, resamplings=2)
    array([1.  , 0.75, 0.5 , 1.  , 0.75, 0.5 , 0.25, 0.  , 0.5 , 0.25, 0.  ])
    """
    for name, value in (("jump", jump), ("resamplings", resamplings)):
        if value < 1:
            raise ValueError(f"repaint_times: {name} must be at least 1, got {value}.")
    grid = uniform_times(steps)
    at = [0]
    for end in range(jump, steps + 1, jump):
        down = list(range(end - jump + 1, end + 1))
        at += down + [end - jump, *down] * (resamplings - 1)
    return grid[at + list(range(at[-1] + 1, steps + 1))]


def check_times(times: Any, *, rises: bool = False) -> Grid:
    """Returns the grid in float64 if it strictly descends within [0, 1], else `ValueError`.

    An ascending grid is accepted as well: it is that of `sampling.encode`. With `rises` it may also
    turn, as long as it begins and ends with a step down.

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
    if rises and np.all(steps) and steps[0] < 0 and steps[-1] < 0:
        return times
    turns = np.sign(steps) != np.sign(steps[0]) if steps[0] else np.ones(len(steps), bool)
    if np.any(turns):
        i = int(np.argmax(turns))
        raise ValueError(
            "times must descend strictly, got "
            f"times[{i}] = {times[i]} and times[{i + 1}] = {times[i + 1]}."
        )
    return times


def uniform_time(key: Key[Array, ""], batch: int) -> Float[Array, " batch"]:
    """`t ~ U(0, 1]`, independent; never exactly 0, where some losses are infinite.

    >>> uniform_time(jax.random.key(0), 3).shape
    (3,)
    """
    return 1 - jax.random.uniform(key, (batch,))


def stratified_time(key: Key[Array, ""], batch: int) -> Float[Array, " batch"]:
    """`t_i = 1 - (u + i / n) mod 1`: each `U(0, 1]`, together evenly spread (Kingma et al. 2021).

    The batch mean of a loss has a lower variance than with `uniform_time`.

    >>> bool(jnp.ptp(jnp.diff(jnp.sort(stratified_time(jax.random.key(0), 4)))) < 1e-6)
    True
    """
    return 1 - (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0


def logit_normal_time(mean: float = 0.0, stddev: float = 1.0) -> TimeSampler:
    """`t = sigmoid(m + s n)`, `n ~ N(0, 1)`: middle times more often (Esser et al. 2024, eq. 19).

    A positive mean favours noisy times. Stratified over the batch: `n` are normal quantiles of
    stratified uniforms.

    >>> logit_normal_time(0.0, 1.0)(jax.random.key(0), 3).shape
    (3,)
    """
    if not math.isfinite(mean):
        raise ValueError(f"logit_normal_time: mean must be finite, got {mean}.")
    if not (stddev > 0 and math.isfinite(stddev)):
        raise ValueError(f"logit_normal_time: stddev must be positive, got {stddev}.")

    def sampler(key: Key[Array, ""], batch: int) -> Float[Array, " batch"]:
        # Keep the quantile finite: float32 uniforms can be exactly 0.
        u = jnp.clip(stratified_time(key, batch), 1e-6, 1 - 1e-6)
        return jax.nn.sigmoid(mean + stddev * jax.scipy.stats.norm.ppf(u))

    return sampler


def angle_time(mean: float = -0.3, stddev: float = 1.4) -> TimeSampler:
    """`t = 2/pi arctan(e^tau)`, `tau ~ N(mean, stddev^2)`: `log(sigma / alpha)` of `CosineVP`.

    The proposal of sCM, `phi = arctan(e^tau / sigma_d)` (Lu & Song 2025, section 5): `mean` is
    theirs minus `log sigma_d`, as data have unit variance here. -0.3 and 1.4 are those of CIFAR-10.
    On `LinearFlow` the same is `logit_normal_time`. Stratified over the batch.

    >>> angle_time()(jax.random.key(0), 3).shape
    (3,)
    """
    logistic = logit_normal_time(mean, stddev)

    def sampler(key: Key[Array, ""], batch: int) -> Float[Array, " batch"]:
        s = logistic(key, batch)
        return jnp.arctan2(s, 1 - s) * (2 / math.pi)

    return sampler


def discrete_time(timesteps: int) -> TimeSampler:
    """`t = (i + 1) / T` with `i ~ U{0, ..., T-1}`: DDPM's own times, where `DiscreteVP` is exact.

    >>> discrete_time(1)(jax.random.key(0), 2)
    Array([1., 1.], dtype=float32)
    """
    if timesteps < 1:
        raise ValueError(f"discrete_time: timesteps must be at least 1, got {timesteps}.")
    return lambda key, batch: (
        (jax.random.randint(key, (batch,), 0, timesteps) + 1).astype(jnp.float32) / timesteps
    )


def time_at_angle(path: AbstractPath, angle: Float[Array, ""]) -> Float[Array, ""]:
    """The time at which `atan2(sigma, alpha)` of a path is `angle`, within [0, 1].

    By bisection, and one step of Newton's method whose derivative is the inverse's. Under `jit`;
    for float64 NumPy `paths.time_at_logsnr`.

    >>> from eqxldm import CosineVP
    >>> round(float(time_at_angle(CosineVP(), jnp.array(0.75 * np.pi / 2))), 6)
    0.75
    """
    last = path.coefficients(jnp.ones_like(angle))
    most = jnp.arctan2(last.sigma, last.alpha)
    angle = jnp.where(angle > most * (1 + 1e-6), most, angle)
    wanted = jax.lax.stop_gradient(angle)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        at = path.coefficients(middle)
        below = jnp.arctan2(at.sigma, at.alpha) < wanted
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    ends = jnp.zeros_like(angle), jnp.ones_like(angle)
    t = sum(jax.lax.fori_loop(0, jnp.finfo(angle.dtype).nmant + 3, halve, ends)) / 2
    at = path.coefficients(t)
    rate = (at.alpha * at.dsigma - at.sigma * at.dalpha) / (at.alpha**2 + at.sigma**2)
    t = t + (angle - jnp.arctan2(at.sigma, at.alpha)) / rate
    # Rounding must not leave [0, 1]; the derivative is kept at the ends.
    return t + jax.lax.stop_gradient(jnp.clip(t, 0.0, 1.0) - t)


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


def _check_kept(name: str, timesteps: int, count: int) -> None:
    if timesteps < 1:
        raise ValueError(f"timesteps must be at least 1, got {timesteps}.")
    if not 1 <= count <= timesteps:
        raise ValueError(f"{name}: cannot keep {count} of {timesteps} timesteps.")
