"""Data: where it comes from, and how it reaches a training step."""

from .array_records import write_array_record as write_array_record
from .cache import cache_dir as cache_dir
from .decoding import center_crop as center_crop, decode_rgb as decode_rgb
from .digits import (
    DATASETS as DATASETS,
    Digits as Digits,
    DigitsSpec as DigitsSpec,
    load_digits as load_digits,
)
from .idx import DataError as DataError, read_idx as read_idx
from .opening import open_images as open_images
from .records import ImageRecord as ImageRecord, ImageSource as ImageSource
