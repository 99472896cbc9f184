"""From the bytes of an image file to pixels: decoding and ADM's centre crop."""

import io
from typing import Any

import numpy as np
from jaxtyping import UInt8

from .errors import DataError

CROP = "ADM centre crop: halve by box, bicubic, cut"  # what a latent cache's header says
# Named, because Pillow would try all formats that it knows, among them one that starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
MAX_PIXELS = 89_478_485  # Pillow's own bound: a quarter of a GiB as RGB
# JPEG's own bound. Pillow takes a pointer and some time for each row: a PNG of 2 x 40,000,000 took
# 15 s and 400 MB.
MAX_SIDE = 65_535
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# An enlarged image of more pixels, in crops, is cut first. Below, the result is ADM's to the bit.
_ELONGATED = 16

Size = int | tuple[int, int]
Image = bytes | UInt8[np.ndarray, "h w _"]


def as_size(size: Size) -> tuple[int, int]:
    """`(height, width)` of a side or of both.

    >>> as_size(64), as_size((64, 96))
    ((64, 64), (64, 96))
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size: need a height and a width of at least 1, got {height} x {width}.")
    return height, width


def decode_image(
    image: Image, channels: int = 3, *, name: str = "image", max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "h w channels"]:
    """The pixels of an image file, converted as in ADM: Pillow's `convert`.

    With 3 channels grey is repeated, transparency dropped, CMYK and palettes converted; 1 channel
    is ITU-R 601 luma, 4 add opacity. An orientation tag is ignored. The differences to ADM: 16-bit
    grey keeps its high byte, where Pillow saturates, and integers of 32 bits beyond 255 or floats
    are refused, as nobody knows their white. Pixels instead of a file are converted likewise;
    their channels may be any number if it is the one asked for.

    **Arguments**:

    - `image`: the bytes of a file in one of `FORMATS`, or pixels, uint8 `(h, w, c)`.
    - `channels`: 1 to 4 of a file.
    - `name`: what errors call it.
    - `max_pixels`: the most pixels that a file may have. Pillow itself warns above `MAX_PIXELS` and
      refuses twice that, whatever is asked for here; see `PIL.Image.MAX_IMAGE_PIXELS`. No side may
      be longer than `MAX_SIDE`.

    **Raises** `DataError`, with `name`, if not all of it can be read or it has too many pixels.

    >>> import PIL.Image
    >>> file = io.BytesIO()
    >>> PIL.Image.new("LA", (3, 2), (7, 0)).save(file, "PNG")
    >>> decode_image(file.getvalue())[0, 0]
    array([7, 7, 7], dtype=uint8)
    """
    return _array(_opened(image, channels, name, max_pixels))


def center_crop(image: UInt8[np.ndarray, "h w c"], size: Size) -> UInt8[np.ndarray, "H W c"]:
    """ADM's crop: halved by box while both sides allow it, then bicubic, then the middle cut out.

    It is halved while height and width are twice `size` or more; the bicubic step makes one side
    fit and the other no smaller, enlarging too if need be.

    **Arguments**:

    - `size`: the side of a square, or `(height, width)`.

    Source: Dhariwal & Nichol 2021, guided-diffusion's `center_crop_arr`, which DiT uses too; for
    squares it is the same to the bit, unless the image is more than 16 times as long as wide.

    >>> center_crop(np.zeros((300, 200, 3), np.uint8), (64, 32)).shape
    (64, 32, 3)
    """
    return _cropped(_picture(image), as_size(size))


def decode_and_crop(
    image: Image,
    size: Size,
    channels: int = 3,
    *,
    name: str = "image",
    max_pixels: int = MAX_PIXELS,
) -> UInt8[np.ndarray, "H W channels"]:
    """`center_crop(decode_image(...), size)` without the array between them.

    >>> import PIL.Image
    >>> file = io.BytesIO()
    >>> PIL.Image.new("RGB", (30, 20), "red").save(file, "JPEG")
    >>> decode_and_crop(file.getvalue(), (8, 12)).shape
    (8, 12, 3)
    """
    size = as_size(size)
    if isinstance(image, np.ndarray) and image.shape == (*size, channels):
        return image
    return _cropped(_opened(image, channels, name, max_pixels), size)


def encode_png(pixels: UInt8[np.ndarray, "h w c"]) -> bytes:
    """The pixels as a PNG file, of 1 to 4 channels.

    >>> decode_image(encode_png(np.full((2, 3, 1), 7, np.uint8)), 1)[0, 0]
    array([7], dtype=uint8)
    """
    if pixels.shape[2] not in _MODES:
        raise DataError(f"a PNG file has 1 to 4 channels, got {pixels.shape[2]}.")
    file = io.BytesIO()
    _picture(pixels).save(file, "PNG")
    return file.getvalue()


# A picture is an image of Pillow or, of more channels than it has, a list of grey ones.


def _picture(pixels: np.ndarray) -> Any:
    from PIL import Image

    if pixels.shape[2] in _MODES:
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return [Image.fromarray(pixels[..., k]) for k in range(pixels.shape[2])]


def _array(picture: Any) -> np.ndarray:
    if isinstance(picture, list):
        return np.stack([np.array(band) for band in picture], -1)
    array = np.array(picture)
    return array[..., None] if array.ndim == 2 else array


def _opened(image: Image, channels: int, name: str, max_pixels: int) -> Any:
    from PIL import Image as pil

    if isinstance(image, np.ndarray):
        if image.shape[2] == channels:
            return _picture(image)
        if image.shape[2] not in _MODES or channels not in _MODES:
            raise DataError(f"{name}: has {image.shape[2]} channels, asked for are {channels}.")
        return _picture(image).convert(_MODES[channels])
    if channels not in _MODES:
        raise ValueError(f"channels: an image file gives 1 to 4, asked for are {channels}.")
    try:
        picture = pil.open(io.BytesIO(image), formats=FORMATS)
        width, height = picture.size
        if width * height > max_pixels:
            raise DataError(f"{width} x {height} pixels are more than max_pixels, {max_pixels}")
        if max(width, height) > MAX_SIDE:
            raise DataError(f"{width} x {height} pixels: no side may be longer than {MAX_SIDE}")
        picture.load()
        picture = _eight_bits(picture)
        return picture if picture.mode == _MODES[channels] else picture.convert(_MODES[channels])
    except Exception as error:  # each format's reader has its own ways to fail
        reason = str(error).strip() or type(error).__name__
        if "cannot identify image file" in reason:
            reason = f"it is none of {', '.join(FORMATS)}"
        raise DataError(f"{name}: cannot be decoded ({len(image)} bytes): {reason}.") from error


def _eight_bits(picture: Any) -> Any:
    """Grey of 16 bits by its high byte; of 32 bits as it is if it fits, as its white is unknown."""
    from PIL import Image

    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format != "TIFF"):
        high = np.asarray(picture) >> 8
        return Image.fromarray(high.clip(0, 255).astype(np.uint8))
    if picture.mode == "I":
        low, high = picture.getextrema()
        if low < 0 or high > 255:
            raise DataError(
                f"its integers of 32 bits go from {low} to {high}: save it with 8 or 16 bits"
            )
        return Image.fromarray(np.asarray(picture).astype(np.uint8))
    if picture.mode == "F":
        raise DataError("its pixels are floats: save it with 8 or 16 bits")
    return picture


def _cropped(picture: Any, size: tuple[int, int]) -> np.ndarray:
    if isinstance(picture, list):
        return np.concatenate([_cropped(band, size) for band in picture], -1)
    from PIL import Image

    height, width = size
    w, h = picture.size
    while w >= 2 * width and h >= 2 * height:
        w, h = w // 2, h // 2
        picture = picture.resize((w, h), Image.Resampling.BOX)
    scale = max(height / h, width / w)
    W, H = round(w * scale), round(h * scale)
    left, top = (W - width) // 2, (H - height) // 2
    right, bottom = left + width, top + height
    if _ELONGATED * height * width < W * H:
        # A line of 1 x 65,000 pixels would be 256 x 16,640,000 before the cut.
        box = (left * w / W, top * h / H, right * w / W, bottom * h / H)
        return _array(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))
    picture = picture.resize((W, H), Image.Resampling.BICUBIC)
    return _array(picture.crop((left, top, right, bottom)))
