"""Sound as networks see it: tones, mel spectrograms and back, onsets, files."""

from .files import read_wav as read_wav, wav_bytes as wav_bytes
from .griffin_lim import griffin_lim as griffin_lim
from .mel import MelSpectrogram as MelSpectrogram, mel_filters as mel_filters
from .onsets import Matches as Matches, match_events as match_events, onsets as onsets
from .stft import istft as istft, stft as stft
from .tones import Tones as Tones
