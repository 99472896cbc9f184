"""From the bytes of an image file to pixels: decoding, ADM's centre crop, flips."""

import io
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from .idx import DataError

CROP = "ADM centre crop: halve by box, bicubic, cut"  # what a latent cache's header says

Pixels = UInt8[np.ndarray, "h w 3"]


def decode_rgb(content: bytes, name: str = "image") -> Pixels:
    """The pixels of an image file, converted as in ADM: Pillow's `convert("RGB")`.

    Grey is repeated, transparency dropped, CMYK and palettes converted, and an orientation tag is
    ignored. The one difference: 16-bit grey keeps its high byte, where Pillow saturates.

    **Raises** `DataError`, with `name`, if Pillow cannot read all of it.

    >>> import PIL.Image
    >>> file = io.BytesIO()
    >>> PIL.Image.new("LA", (3, 2), (7, 0)).save(file, "PNG")
    >>> decode_rgb(file.getvalue())[0, 0]
    array([7, 7, 7], dtype=uint8)
    """
    return np.array(_open_rgb(content, name))


def center_crop(image: Pixels, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """ADM's crop: halved by box while the short side is `2 size` or more, then bicubic, then cut.

    The bicubic step makes the short side `size`, enlarging too if need be.

    Source: Dhariwal & Nichol 2021, guided-diffusion's `center_crop_arr`, which DiT uses too.

    >>> center_crop(np.zeros((300, 200, 3), np.uint8), 64).shape
    (64, 64, 3)
    """
    from PIL import Image

    return _center_crop(Image.fromarray(image), size)


def decode_and_crop(
    content: bytes, size: int, name: str = "image"
) -> UInt8[np.ndarray, "size size 3"]:
    """`center_crop(decode_rgb(content, name), size)` without the array between them.

    >>> import PIL.Image
    >>> file = io.BytesIO()
    >>> PIL.Image.new("RGB", (30, 20), "red").save(file, "JPEG")
    >>> decode_and_crop(file.getvalue(), 8).shape
    (8, 8, 3)
    """
    return _center_crop(_open_rgb(content, name), size)


def flip_mask(
    seed: int, epochs: Int[np.ndarray, " n"], indices: Int[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Which records are flipped, by a fair coin for each (seed, epoch, index).

    A record's coin does not depend on the others, on their order, on processes or on workers.

    >>> flip_mask(0, np.zeros(8, int), np.arange(8)).astype(int)
    array([0, 0, 1, 0, 0, 0, 0, 1])
    """
    bits = np.full(len(indices), seed, np.uint64)
    for value in (np.uint64(0), epochs.astype(np.uint64), indices.astype(np.uint64)):
        bits = _mixed(bits ^ value)
    return (bits >> np.uint64(63)).astype(bool)


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea & Flood 2014): each output bit depends on every input bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _open_rgb(content: bytes, name: str) -> Any:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        if image.mode.startswith("I"):  # 16 bits, read into 16 or 32
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # each format's reader has its own ways to fail
        reason = str(error).strip() or type(error).__name__
        if "cannot identify image file" in reason:
            reason = "it is no image that Pillow knows"
        raise DataError(f"{name}: cannot be decoded ({len(content)} bytes): {reason}.") from error


def _center_crop(image: Any, size: int) -> np.ndarray:
    from PIL import Image

    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))
