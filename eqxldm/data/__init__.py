"""Data: where it comes from, and how it reaches a training step."""

from .cache import cache_dir as cache_dir
from .digits import (
    DATASETS as DATASETS,
    Digits as Digits,
    DigitsSpec as DigitsSpec,
    load_digits as load_digits,
)
from .idx import DataError as DataError, read_idx as read_idx
