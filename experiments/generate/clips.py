"""Clips out: an animated PNG with the settings that made it, and beside it an MP4 where one can."""

import io
import json
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin

from eqxldm.durable import replacing

from .pictures import KEY

Frames = UInt8[np.ndarray, "f h w 3"]


def write_clip(path: Path, frames: Frames, fps: float, settings: dict[str, Any]) -> list[Path]:
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
    written = [(path, file.getvalue())]
    if (film := mp4(frames, fps)) is not None:
        written.append((path.with_suffix(".mp4"), film))
    for target, content in written:
        with replacing(target) as temporary:
            temporary.write_bytes(content)
    return [target for target, _ in written]


def mp4(frames: Frames, fps: float) -> bytes | None:
    """The frames as H.264, by the package av or the program ffmpeg; None where neither is there.

    Odd sides get one more row or column, as the format has colours for 2 x 2 pixels.
    """
    h, w = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1000)
    try:
        import av
    except ImportError:
        return _by_ffmpeg(frames, rate)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue()


def _by_ffmpeg(frames: Frames, rate: Fraction) -> bytes | None:
    if shutil.which("ffmpeg") is None:
        return None
    h, w = frames.shape[1:3]
    command = f"ffmpeg -v error -f rawvideo -pix_fmt rgb24 -s {w}x{h} -r {rate} -i -".split()
    command += "-pix_fmt yuv420p -movflags frag_keyframe+empty_moov -f mp4 -".split()
    done = subprocess.run(command, input=frames.tobytes(), capture_output=True)
    return done.stdout if done.returncode == 0 else None
