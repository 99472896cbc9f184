"""A wave from the magnitudes of its spectra alone."""

import numpy as np
from jaxtyping import Float

from .stft import istft, stft


def griffin_lim(
    magnitudes: Float[np.ndarray, "frames bins"],
    window: int,
    hop: int,
    *,
    iterations: int = 40,
    momentum: float = 0.99,
    seed: int = 0,
) -> Float[np.ndarray, " n"]:
    """A wave of `frames * hop` samples whose spectra have about these magnitudes.

    From random phases, again and again: the wave of the spectra, and the phases of the spectra of
    that wave (Griffin & Lim 1984, section III), each step going on by `momentum` (Perraudin et al.
    2013, algorithm 2). The loudness is right, the phases are any that go together.

    >>> wave = np.sin(np.arange(512.0))
    >>> magnitudes = np.abs(stft(wave, 64, 16))
    >>> again = np.abs(stft(griffin_lim(magnitudes, 64, 16), 64, 16))
    >>> bool(np.abs(again - magnitudes)[4:-4].max() < 0.1)
    True
    """
    rng = np.random.default_rng(seed)
    spectra = magnitudes * np.exp(2j * np.pi * rng.random(magnitudes.shape))
    before = np.zeros_like(spectra)
    for _ in range(iterations):
        possible = stft(istft(spectra, window, hop), window, hop)
        ahead = possible + momentum * (possible - before)
        spectra = magnitudes * ahead / np.maximum(np.abs(ahead), 1e-12)
        before = possible
    return istft(spectra, window, hop)
