"""The short-time Fourier transform and its inverse, by frames that are centred."""

import numpy as np
from jaxtyping import Complex, Float


def hann(window: int) -> Float[np.ndarray, " window"]:
    """The periodic Hann window, divided by half its sum.

    So a sine of amplitude `a` has the magnitude `a` at its frequency.

    >>> bool(np.isclose(hann(8).sum(), 2))
    True
    """
    w = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    return w * 2 / w.sum()


def stft(
    wave: Float[np.ndarray, " n"], window: int, hop: int
) -> Complex[np.ndarray, "frames bins"]:
    """`n // hop` spectra of `window // 2 + 1` frequencies, the rest of the wave left out.

    Frame `j` is centred at sample `(j + 1/2) hop`: at the middle of its own hop. Beyond its ends
    the wave is silent.

    **Raises** `ValueError` for a window that is odd or shorter than the hop.

    >>> stft(np.zeros(400), 64, 16).shape
    (25, 33)
    """
    if window % 2 or not 1 <= hop <= window:
        raise ValueError(f"stft: window {window} must be even and at least the hop, {hop}.")
    frames, before = len(wave) // hop, window // 2 - hop // 2
    padded = np.pad(wave, (before, window))
    at = hop * np.arange(frames)[:, None] + np.arange(window)
    return np.fft.rfft(padded[at] * hann(window), axis=1)


def istft(
    spectra: Complex[np.ndarray, "frames bins"], window: int, hop: int
) -> Float[np.ndarray, " n"]:
    """The wave of `frames * hop` samples whose `stft` is nearest to these spectra.

    `x[n] = sum_j w[n - j hop] y_j[n] / sum_j w[n - j hop]^2`, with `y_j` the frames' inverse
    transforms: the least squares solution (Griffin & Lim 1984, eq. 6). Exact for an `stft`.

    >>> wave = np.sin(np.arange(320.0))
    >>> bool(np.allclose(istft(stft(wave, 64, 16), 64, 16), wave))
    True
    """
    frames, before, w = len(spectra), window // 2 - hop // 2, hann(window)
    parts = np.fft.irfft(spectra, window, axis=1) * w
    length = hop * (frames - 1) + window
    wave, weight = np.zeros(length), np.zeros(length)
    for j, part in enumerate(parts):
        wave[j * hop : j * hop + window] += part
        weight[j * hop : j * hop + window] += w**2
    kept = slice(before, before + frames * hop)
    return wave[kept] / np.maximum(weight[kept], 1e-8 * weight.max())
