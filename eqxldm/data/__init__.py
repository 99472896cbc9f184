"""Data: where it comes from, and how it reaches a training step.

`open_images` or `open_mnist` give an `ImageSource`; `image_batches` makes batches of it, and
`write_latents` a cache, of which `latent_batches` makes batches; `prefetch_to_device` puts them on
the devices.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .clip_vocabulary import fetch_clip_vocabulary as fetch_clip_vocabulary
from .clips import (
    ANIMATION_ENDINGS as ANIMATION_ENDINGS,
    VIDEO_ENDINGS as VIDEO_ENDINGS,
    ClipFile as ClipFile,
    Wanted as Wanted,
    clips_digest as clips_digest,
    list_clips as list_clips,
    open_clips as open_clips,
    read_clips as read_clips,
    write_clips as write_clips,
)
from .conditions import (
    Condition as Condition,
    caption_bytes as caption_bytes,
    label_condition as label_condition,
    no_condition as no_condition,
)
from .decode import (
    center_crop as center_crop,
    decode_and_crop as decode_and_crop,
    decode_image as decode_image,
)
from .download import cache_dir as cache_dir
from .emoji import EMOJI as EMOJI, EmojiSet as EmojiSet, open_emoji as open_emoji
from .errors import DataError as DataError
from .image_source import ImageRecord as ImageRecord, ImageSource as ImageSource
from .latent_cache import (
    Latents as Latents,
    latent_header as latent_header,
    open_latents as open_latents,
)
from .latent_writer import write_latents as write_latents
from .mnist import (
    DATASETS as DATASETS,
    MnistSpec as MnistSpec,
    open_mnist as open_mnist,
    read_idx as read_idx,
)
from .moving_digits import (
    DIRECTIONS as DIRECTIONS,
    MovingClip as MovingClip,
    MovingDigits as MovingDigits,
    caption_of as caption_of,
    direction_of as direction_of,
    read_caption as read_caption,
)
from .pixels import to_float as to_float, to_uint8 as to_uint8
from .sources.arrayrecord import write_array_record as write_array_record
from .sources.arrays import ImageArrays as ImageArrays
from .sources.open import open_images as open_images
from .text import (
    open_wikipedia as open_wikipedia,
    read_text as read_text,
    text8_rule as text8_rule,
)

if TYPE_CHECKING:
    from .loader import (
        Batches as Batches,
        flip_mask as flip_mask,
        image_batches as image_batches,
        latent_batches as latent_batches,
    )
    from .prefetch import DevicePrefetch as DevicePrefetch, prefetch_to_device as prefetch_to_device

# Imported when first used: grain takes longer to import than all the rest.
_LAZY = {
    "Batches": "loader",
    "flip_mask": "loader",
    "image_batches": "loader",
    "latent_batches": "loader",
    "DevicePrefetch": "prefetch",
    "prefetch_to_device": "prefetch",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
