"""Clips as files: animations, and filmstrips with a clip in each row."""

import io
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from eqxldm.audio import wav_bytes
from eqxldm.durable import replacing

from ..train.figures import image_grid, save_png
from ..train.terminal import UserError

Frames = UInt8[np.ndarray, "n f h w c"]
ENDINGS = (".png", ".apng", ".gif", ".webp", ".mp4")
SHOWN = 9  # frames of a filmstrip


def grid_frames(clips: Frames, columns: int = 4, *, scale: int = 2) -> UInt8[np.ndarray, "f H W c"]:
    """All clips side by side, playing at once."""
    return np.stack([image_grid(clips[:, f], columns, scale=scale) for f in range(clips.shape[1])])


def filmstrip(clips: Frames, *, scale: int = 2) -> UInt8[np.ndarray, "H W c"]:
    """A clip in each row, some frames of it from the first to the last."""
    shown = np.linspace(0, clips.shape[1] - 1, min(SHOWN, clips.shape[1])).round().astype(int)
    rows = clips[:, shown]
    return image_grid(rows.reshape(-1, *rows.shape[2:]), len(shown), scale=scale)


def save_filmstrip(path: Path, clips: Frames, *, scale: int = 2) -> None:
    save_png(path, filmstrip(clips, scale=scale))


def save_animation(
    path: Path,
    frames: UInt8[np.ndarray, "f H W c"],
    fps: float,
    sound: tuple[Float[np.ndarray, " n"], int] | None = None,
    **options: Any,
) -> None:
    """Frames as an animation; the ending decides: .png and .apng are lossless and play in browsers,
    .mp4 needs the package av or the program ffmpeg. It can have a `sound`, a wave and its rate.

    `options` are Pillow's, for the others.
    """
    check_ending(path)
    ending = path.suffix.lower()
    if ending == ".mp4":
        with replacing(path) as temporary:
            temporary.write_bytes(_mp4(frames, fps, sound))
        return
    from PIL import Image

    pictures = [Image.fromarray(f[..., 0] if f.shape[-1] == 1 else f) for f in frames]
    kind = {".gif": "GIF", ".webp": "WEBP"}.get(ending, "PNG")
    how = dict(duration=max(1000 / fps, 10), lossless=True) | options  # the latter is of WEBP alone
    file, rest = io.BytesIO(), pictures[1:]
    pictures[0].save(file, kind, save_all=True, append_images=rest, loop=0, **how)
    with replacing(path) as temporary:
        temporary.write_bytes(file.getvalue())


def check_ending(path: Path) -> None:
    """Refuses what no animation can be written as, before one is drawn."""
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"--out {path}: an animation ends with {', '.join(ENDINGS)}.")
    if path.suffix.lower() == ".mp4" and not can_write_mp4():
        raise UserError(
            f"--out {path}: mp4 needs the package av (pip install 'eqxldm[video]') or ffmpeg. "
            ".png and .gif need nothing more."
        )


def can_write_mp4() -> bool:
    try:
        import av  # noqa: F401
    except ImportError:
        return shutil.which("ffmpeg") is not None
    return True


def _mp4(frames: UInt8[np.ndarray, "f H W c"], fps: float, sound: Any = None) -> bytes:
    colours = frames.repeat(3, -1) if frames.shape[-1] == 1 else frames[..., :3]
    h, w = colours.shape[1:3]
    colours = np.pad(colours, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    try:
        import av
    except ImportError:
        return _by_ffmpeg(colours, fps, sound)
    from fractions import Fraction

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16"})
        stream.height, stream.width = colours.shape[1:3]
        stream.pix_fmt = "yuv420p"
        heard: Any = (
            None if sound is None else container.add_stream("aac", rate=sound[1], layout="mono")
        )
        for image in colours:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        if sound is not None:
            wave, rate = sound
            numbers = np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16)[None]
            samples = av.AudioFrame.from_ndarray(numbers, format="s16", layout="mono")
            samples.sample_rate = rate
            container.mux(heard.encode(samples))
            container.mux(heard.encode())
    return file.getvalue()


def _by_ffmpeg(colours: UInt8[np.ndarray, "f H W 3"], fps: float, sound: Any) -> bytes:
    h, w = colours.shape[1:3]
    command = f"ffmpeg -v error -f rawvideo -pix_fmt rgb24 -s {w}x{h} -r {fps} -i -".split()
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        if sound is not None:
            file.write(wav_bytes(*sound))
            file.flush()
            command += ["-i", file.name]
        command += "-pix_fmt yuv420p -movflags frag_keyframe+empty_moov -f mp4 -".split()
        done = subprocess.run(command, input=colours.tobytes(), capture_output=True)
    if done.returncode:
        raise UserError(f"ffmpeg: {done.stderr.decode(errors='replace').strip()[:300]}")
    return done.stdout
