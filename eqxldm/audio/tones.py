"""Tones that are struck and fade: sounds whose truth is known."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Tones:
    """Writes sounds of struck tones: each begins at once and fades exponentially.

    Tone `k` has the frequency `lowest 2^(k step / 12)`, `step` semitones above the one before, and
    is `amplitude sin(2 pi f s) exp(-s / fading)` at `s` seconds after it was struck.

    **Arguments**: `rate`, samples a second; `lowest` in Hz; `fading` in seconds.

    >>> Tones(rate=8000).wave([(0.25, 3)], seconds=0.5).shape
    (4000,)
    """

    rate: int = 8000
    lowest: float = 330.0
    step: float = 3.0
    amplitude: float = 0.3
    fading: float = 0.08

    def frequency(self, tone: int) -> float:
        """Of a tone, in Hz.

        >>> Tones(lowest=220.0, step=12.0).frequency(1)
        440.0
        """
        return self.lowest * 2 ** (tone * self.step / 12)

    def wave(self, struck: Iterable[tuple[float, int]], seconds: float) -> Float[np.ndarray, " n"]:
        """The sum of the tones that are struck at `(second, tone)`, float32."""
        wave = np.zeros(round(seconds * self.rate))
        time = np.arange(len(wave)) / self.rate
        for second, tone in struck:
            since = time[time >= second] - second
            # A rise of two milliseconds, without which every tone begins with a click.
            loud = self.amplitude * np.exp(-since / self.fading) * -np.expm1(-since / 0.002)
            wave[len(wave) - len(since) :] += loud * np.sin(
                2 * np.pi * self.frequency(tone) * since
            )
        return wave.astype(np.float32)
