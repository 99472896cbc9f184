"""Pictures in and out, with the settings that made them."""

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, PngImagePlugin

from eqxldm.data import DataError, decode_image
from eqxldm.durable import read_file, replacing

from ..train.terminal import UserError, user_errors

KEY = "eqxldm"


def read_picture(path: Path, size: tuple[int, int] | None = None) -> Float[np.ndarray, "3 h w"]:
    """A picture in [-1, 1], in colour, brought to a size (height, width) if one is given."""
    image = Image.fromarray(_pixels(path, 3))
    if size is not None and image.size != size[::-1]:
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.moveaxis(np.asarray(image, np.float32) / 127.5 - 1, -1, 0)


def read_mask(
    path: Path, size: tuple[int, int], picture: tuple[int, int]
) -> Float[np.ndarray, "h w"]:
    """A mask: 1, from grey 128 on, is what is repainted. It must have the size of its picture."""
    image = Image.fromarray(_pixels(path, 1)[..., 0])
    if image.size != picture[::-1]:
        raise UserError(
            f"the mask {path} is {image.size[1]} x {image.size[0]} and the picture "
            f"{picture[0]} x {picture[1]}: they must have the same size."
        )
    image = image.resize((size[1], size[0]), Image.Resampling.NEAREST)
    return (np.asarray(image, np.float32) >= 127.5).astype(np.float32)


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width."""
    height, width = _pixels(path, 1).shape[:2]
    return height, width


def file_digest(path: Path) -> str:
    """What identifies a file: the start of its SHA-256."""
    return hashlib.sha256(_content(path)).hexdigest()[:16]


def write_picture(path: Path, pixels: UInt8[np.ndarray, "h w c"], settings: dict[str, Any]) -> None:
    """A PNG with its settings in a text chunk; a write that is killed leaves none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        picture, info = Image.fromarray(pixels.squeeze()), settings_chunk(settings)
        picture.save(temporary, format="PNG", pnginfo=info)


def settings_chunk(settings: dict[str, Any]) -> PngImagePlugin.PngInfo:
    """A text chunk for a PNG, which `read_settings` finds."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps(settings))
    return info


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a picture that `write_picture` wrote."""
    content = _content(path)
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()  # what comes behind the pixels, too
            text = getattr(image, "text", {}).get(KEY)
        settings = json.loads(text) if text is not None else None
    except Exception:  # Pillow has many ways to fail
        settings = None
    if not isinstance(settings, dict):
        raise UserError(
            f"{path} holds no settings: it was not written by make generate, or saved again by a "
            "program that drops them."
        )
    return settings


def next_path(folder: Path) -> Path:
    """`0000.png`, or the next number that is free.

    >>> next_path(Path("/no/such/folder")).name
    '0000.png'
    """
    begins = (re.match("[0-9]+", f.stem) for f in folder.glob("[0-9]*.png"))
    taken = [int(found[0]) for found in begins if found]
    return folder / f"{max(taken, default=-1) + 1:04d}.png"


def paths_of(out: Path, n: int) -> list[Path]:
    """One path a picture: `a.png`, or `a-0.png`, `a-1.png`, ...

    >>> [p.name for p in paths_of(Path("a.png"), 2)]
    ['a-0.png', 'a-1.png']
    """
    if n == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(n)]


def _content(path: Path) -> bytes:
    try:
        return read_file(path)
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def _pixels(path: Path, channels: int) -> UInt8[np.ndarray, "h w c"]:
    with user_errors(DataError, what="no picture that can be read"):
        return decode_image(_content(path), channels, name=str(path))
