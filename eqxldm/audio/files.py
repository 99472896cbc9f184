"""Sounds as WAV files of 16 bits."""

import io
import wave as _wave
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import Float

RATES = (1_000, 768_000)  # of a file: of fewer, a short one would become a very long one


def wav_bytes(wave: Float[np.ndarray, " n"], rate: int) -> bytes:
    """A WAV file of one channel; what is beyond [-1, 1] is clipped.

    >>> wav_bytes(np.zeros(8), 8000)[:4]
    b'RIFF'
    """
    file = io.BytesIO()
    with _wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.round(np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def read_wav(path: Path, rate: int) -> Float[np.ndarray, " n"]:
    """A WAV file's sound at `rate` samples a second: its channels' mean, float32 in [-1, 1].

    Rates whose quotient is no fraction of small numbers are taken for one that is, within a
    thousandth: SciPy's filter is as long as the numbers are large.

    **Raises** `ValueError` for what is no WAV file of 8, 16 or 32 bits and 1,000 to 768,000 samples
    a second, or is cut off.
    """
    try:
        with _wave.open(str(path), "rb") as file:
            width, channels, given = file.getsampwidth(), file.getnchannels(), file.getframerate()
            count, data = file.getnframes(), file.readframes(file.getnframes())
    except (_wave.Error, EOFError) as error:
        raise ValueError(f"{path}: no WAV file of whole numbers: {error}.") from None
    kinds = {1: "u1", 2: "<i2", 4: "<i4"}
    known = width in kinds and RATES[0] <= given <= RATES[1]
    if not known or len(data) != count * width * channels:
        raise ValueError(
            f"{path}: {8 * width} bits, {given} samples a second, {len(data)} bytes; needed is a "
            f"whole WAV file of 8, 16 or 32 bits and {RATES[0]} to {RATES[1]} samples a second."
        )
    numbers = np.frombuffer(data, kinds[width]).astype(np.float64)
    numbers = (numbers - 128) / 128 if width == 1 else numbers / 2 ** (8 * width - 1)
    wave = numbers.reshape(-1, channels).mean(1)
    if given != rate and len(wave):
        from scipy.signal import resample_poly

        ratio = Fraction(rate, given).limit_denominator(2000)
        wave = resample_poly(wave, ratio.numerator, ratio.denominator)
    return np.asarray(wave, np.float32)
