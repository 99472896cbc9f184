"""Clips out: an animated PNG with the settings that made it, and beside it an MP4 where one can."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin

from eqxldm.durable import replacing

from ..video.pictures import can_write_mp4, save_animation
from .pictures import KEY


def write_clip(
    path: Path, frames: UInt8[np.ndarray, "f h w 3"], fps: float, settings: dict[str, Any]
) -> list[Path]:
    """An animated PNG, which browsers play, and the same as MP4 with PyAV or ffmpeg; what was
    written. Only the PNG has the settings. A write that is killed leaves none."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps(settings))
    first, *rest = (Image.fromarray(frame) for frame in frames)
    file = io.BytesIO()
    first.save(
        file, "PNG", save_all=True, append_images=rest, duration=1000 / fps, loop=0, pnginfo=info
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(file.getvalue())
    if not can_write_mp4():
        return [path]
    film = path.with_suffix(".mp4")
    save_animation(film, frames, fps)
    return [path, film]
