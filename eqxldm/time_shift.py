"""Times moved towards noise for data of many dimensions."""

import math

from jaxtyping import Array, Float, Key

from .times import TimeSampler, shift_time


def dimension_shift(shape: tuple[int, ...], base: int = 4096) -> float:
    """`sqrt(d / base)` for data of `d` numbers: the shift of times for their number.

    In many dimensions the same noise hides less, as neighbours tell of each other; the factor is
    that of Esser et al. 2024, eq. 23, with all numbers of a latent counted, not its pixels alone
    (Zheng et al. 2025, "Diffusion transformers with representation autoencoders", who take 4096
    as the base: a latent of 4 x 32 x 32). Below 1 for fewer dimensions than `base`.

    >>> dimension_shift((16, 32, 32)), dimension_shift((4, 32, 32))
    (2.0, 1.0)
    """
    dimensions = math.prod(shape)
    if dimensions < 1 or base < 1:
        raise ValueError(f"dimension_shift: need positive sizes, got {shape} and base {base}.")
    return math.sqrt(dimensions / base)


def shifted_time(sampler: TimeSampler, shift: float) -> TimeSampler:
    """The training times of `sampler`, each moved by `shift_time`; 1 changes nothing.

    Sampling takes its steps at `shifted_times(steps, shift)` then.

    >>> import jax
    >>> from eqxldm import uniform_time
    >>> sampler = shifted_time(uniform_time, 3.0)
    >>> bool(sampler(jax.random.key(0), 4).mean() > uniform_time(jax.random.key(0), 4).mean())
    True
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shifted_time: shift must be positive, got {shift}.")

    def shifted(key: Key[Array, ""], batch: int) -> Float[Array, " batch"]:
        return shift_time(sampler(key, batch), shift)

    return sampler if shift == 1 else shifted
