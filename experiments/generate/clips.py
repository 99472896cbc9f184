"""Clips out: an animated PNG with the settings that made it, and beside it an MP4 where one can."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ..video.pictures import can_write_mp4, save_animation
from .pictures import settings_chunk


def write_clip(
    path: Path, frames: UInt8[np.ndarray, "f h w 3"], fps: float, settings: dict[str, Any]
) -> list[Path]:
    """An animated PNG, which browsers play, and the same as MP4 with PyAV or ffmpeg; what was
    written. Only the PNG has the settings. A write that is killed leaves none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_animation(path, frames, fps, duration=1000 / fps, pnginfo=settings_chunk(settings))
    if not can_write_mp4():
        return [path]
    film = path.with_suffix(".mp4")
    save_animation(film, frames, fps)
    return [path, film]
