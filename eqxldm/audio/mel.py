"""Mel spectrograms: what a network learns of a sound, and the way back to magnitudes."""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from jaxtyping import Float

from .griffin_lim import griffin_lim
from .stft import stft


@cache
def mel_filters(
    rate: int, window: int, bands: int, low: float, high: float
) -> Float[np.ndarray, "bands bins"]:
    """Triangles over the frequencies of a spectrum, evenly spaced in mel and 1 at their peaks.

    `mel(f) = 2595 log10(1 + f / 700)`; band `k` rises from the centre of band `k - 1` and falls to
    that of band `k + 1`, from `low` to `high` Hz.

    **Raises** `ValueError` unless `0 <= low < high <= rate / 2`.

    >>> mel_filters(8000, 512, 40, 150.0, 3600.0).shape
    (40, 257)
    """
    if not 0 <= low < high <= rate / 2:
        raise ValueError(
            f"mel_filters: need 0 <= low < high <= {rate / 2:g}, half the rate; got {low}, {high}."
        )
    first, last = (2595 * np.log10(1 + f / 700) for f in (low, high))
    mel = np.linspace(first, last, bands + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    frequencies = np.arange(window // 2 + 1) * rate / window
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    return np.maximum(np.minimum(rising, falling), 0)


@dataclass(frozen=True)
class MelSpectrogram:
    """A wave to its loudness over time and pitch, in about [-1, 1], and back.

    `y[j, k] = 1 + 2 log10(max(m, floor)) / -log10(floor)` with `m` the magnitude of frame `j` under
    the triangle of band `k`: -1 is silence, 1 a sine of amplitude 1. Frame `j` is centred at
    `(j + 1/2) hop / rate` seconds.

    **Arguments**:

    - `rate`: samples a second. `window`, `hop`: of the frames, in samples.
    - `bands`: how many, from `low` to `high` Hz.
    - `floor`: the magnitude that counts as silence.

    >>> mel = MelSpectrogram()
    >>> wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    >>> y = mel(wave)
    >>> y.shape, float(y.max()) > 0.7
    ((64, 40), True)
    >>> mel.wave(y).shape
    (8000,)
    """

    rate: int = 8000
    window: int = 512
    hop: int = 125
    bands: int = 40
    low: float = 150.0
    high: float = 3600.0
    floor: float = 1e-3

    @cached_property
    def filters(self) -> Float[np.ndarray, "bands bins"]:
        """`mel_filters` of these numbers."""
        return mel_filters(self.rate, self.window, self.bands, self.low, self.high)

    def __call__(self, wave: Float[np.ndarray, " n"]) -> Float[np.ndarray, "frames bands"]:
        magnitudes = np.abs(stft(wave.astype(np.float64), self.window, self.hop)) @ self.filters.T
        logs = np.log10(np.maximum(magnitudes, self.floor))
        return (1 - 2 * logs / np.log10(self.floor)).astype(np.float32)

    def magnitudes(self, y: Float[np.ndarray, "frames bands"]) -> Float[np.ndarray, "frames bins"]:
        """The magnitudes, none negative, whose spectrogram is nearest to `y`.

        By multiplicative updates of the least squares problem (Lee & Seung 2001, theorem 1). Many
        spectra have one spectrogram; this one is as even as the start, all ones.
        """
        wanted = 10 ** ((np.clip(y, -1, 1.2).astype(np.float64) - 1) * -np.log10(self.floor) / 2)
        wanted = np.where(wanted <= self.floor, 0, wanted)  # silence is silent
        filters = self.filters
        found, up, gram = np.ones((len(y), filters.shape[1])), wanted @ filters, filters.T @ filters
        for _ in range(60):
            found *= up / np.maximum(found @ gram, 1e-9)
        return found

    def wave(
        self, y: Float[np.ndarray, "frames bands"], *, iterations: int = 40
    ) -> Float[np.ndarray, " n"]:
        """A sound whose spectrogram is about `y`: `magnitudes`, then `griffin_lim`."""
        return griffin_lim(self.magnitudes(y), self.window, self.hop, iterations=iterations)

    def seconds(self, frames: int) -> Float[np.ndarray, " frames"]:
        """When the frames are.

        >>> MelSpectrogram(rate=1000, hop=100, high=500.0).seconds(2).tolist()
        [0.05, 0.15]
        """
        return (np.arange(frames) + 0.5) * self.hop / self.rate
