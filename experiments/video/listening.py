"""Whether clips sound when something happens in them, and pictures and files with sound."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from eqxldm.audio import (
    Matches,
    MelSpectrogram,
    Tones,
    match_events,
    onsets,
    read_wav,
    wav_bytes,
)
from eqxldm.data import MovingDigits, read_clips
from eqxldm.data.errors import DataError
from eqxldm.durable import check_is_file, replacing
from eqxldm.metrics import motions, track

from ..train.figures import save_png
from ..train.streams import stream_key
from ..train.terminal import UserError, say, user_errors
from .config import Config, Sample
from .data import MEL_FRAMES, spectrogram_of
from .drawing import Drawn, Frames
from .measuring import SIDE
from .pictures import can_write_mp4, save_animation
from .sound_drawing import SoundDrawing
from .training import Job

Seconds = list[float]
SHOWN = 4  # clips in the pictures, and files of each kind
INK, MARK = (102, 144, 234), (217, 138, 61)  # of onsets and of bounces


class Ears:
    """Hears and sees events: onsets of the waves that spectrograms become, bounces of digits."""

    def __init__(self, config: Config):
        self.mel: MelSpectrogram = spectrogram_of(config.clips)
        self.fps, self.digits = config.clips.rate, config.clips.digits

    def waves(self, mels: Float[np.ndarray, "n m bands"]) -> list[np.ndarray]:
        return [self.mel.wave(mel) for mel in mels]

    def onsets(self, wave: Float[np.ndarray, " samples"]) -> Seconds:
        """When tones begin."""
        heard = self.mel(wave)
        return self.mel.seconds(len(heard))[onsets(heard)].tolist()

    def bounces(self, frames: UInt8[np.ndarray, "f h w 1"]) -> Seconds | None:
        """When the best bouncing paths of the tracked digits meet walls; None if none are seen."""
        room = float(frames.shape[1] - SIDE), float(frames.shape[2] - SIDE)
        found = motions(track(frames[..., 0], self.digits), room)
        if found is None:
            return None
        return sorted(b / self.fps for motion in found for b in motion.bounces)

    def tones(self, wave: np.ndarray, truth: list[tuple[float, int]]) -> tuple[int, int]:
        """Of the onsets that are within a frame of a bounce, those that have the tone of a digit
        that bounces then; and how many there are."""
        heard, right, judged = self.mel(wave), 0, 0
        table = Tones(self.mel.rate)
        bins = [round(table.frequency(k) * self.mel.window / self.mel.rate) for k in range(10)]
        bands = self.mel.filters[:, bins].argmax(0)
        for j in onsets(heard):
            second = float(self.mel.seconds(j + 1)[-1])
            there = {digit for time, digit in truth if abs(time - second) <= 1 / self.fps}
            if there:
                loud = 10 ** ((1 - heard) * np.log10(self.mel.floor) / 2)  # the magnitudes
                rise = loud[j : j + 3].max(0) - loud[max(j - 3, 0)]
                judged, right = judged + 1, right + (int(rise[bands].argmax()) in there)
        return right, judged

    def score(self, heard: list[Seconds], seen: list[Seconds | None]) -> dict[str, float]:
        """Precision and recall of sounds at bounces, within one frame, over all clips whose digits
        were seen; of nothing found, or nothing wanted, there is none."""
        pairs = [(a, b) for a, b in zip(heard, seen, strict=True) if b is not None]
        total = Matches.total(match_events(a, b, 1 / self.fps) for a, b in pairs)
        row: dict[str, float] = {"clips": len(pairs), "onsets": total.found}
        row["bounces"] = total.wanted
        row |= {"precision": total.precision} if total.found else {}
        return row | ({"recall": total.recall} if total.wanted else {})


def shuffled(events: list[Any]) -> list[Any]:
    """Those of the next clip: what chance would give."""
    return [*events[1:], *events[:1]]


def measured_sound(
    job: Job, drawing: SoundDrawing, made: Drawn, texts: list[str]
) -> dict[str, dict[str, float]]:
    """Sounds against bounces, of real clips, of each part made of the other, of both made together,
    and of both made apart; beside each the same of pairs that do not belong together."""
    source, config = job.clips.test, job.command.config
    assert isinstance(source, MovingDigits) and made.mels is not None
    ears = Ears(config)
    clips = [source.clip(i % len(source)) for i in range(len(texts))]
    frames = np.stack([clip.frames for clip in clips])
    waves: list[Any] = [source.wave(clip) for clip in clips]
    mels = np.stack([ears.mel(wave) for wave in waves])
    struck = [[(f / ears.fps, int(clip.digits[k])) for f, k in clip.bounces] for clip in clips]
    truth: list[Any] = [[time for time, _ in events] for events in struck]
    key = stream_key(job.command.seed, "sound/drawn")
    draw = lambda what, **given: drawing.draw(texts, key, what=what, name=what, **given)
    sounds, videos, apart = (
        draw("sound", frames=frames),
        draw("video", mels=mels),
        draw("apart"),
    )
    sound: Any = drawing.trained.sound
    again = jax.jit(jax.vmap(lambda mel: sound.decode(sound.encode(mel.T)).T))(mels)
    heard = lambda mels: ears.waves(np.asarray(mels))
    of_clips, of_both, of_apart = heard(sounds.mels), heard(made.mels), heard(apart.mels)
    listen = lambda waves: [ears.onsets(wave) for wave in waves]
    look = lambda frames: [ears.bounces(clip) for clip in frames]
    rows: dict[str, dict[str, float]] = {}

    def compare(name: str, events: list[Any], seen: list[Any]) -> None:
        rows[name] = ears.score(events, seen)
        rows[f"{name}, shuffled"] = ears.score(events, shuffled(seen))

    compare("real", listen(waves), truth)
    compare("real, bounces tracked", listen(waves), look(frames))
    compare("encoded and decoded", listen(heard(again)), truth)
    compare("sounds of clips", listen(of_clips), truth)
    compare("clips of sounds", truth, look(videos.frames))
    compare("both", listen(of_both), look(made.frames))
    compare("each alone", listen(of_apart), look(apart.frames))
    for name, kind in (("real", waves), ("sounds of clips", of_clips)):
        counts = [ears.tones(wave, events) for wave, events in zip(kind, struck, strict=True)]
        right, judged = np.sum(counts, 0)
        rows[name] |= {"right_tone": float(right / judged)} if judged else {}
    leave(job.run.file, "sample", made, of_both, ears)
    leave(job.run.file, "sound-of-clip", sounds, of_clips, ears, truth)
    leave(job.run.file, "clip-of-sound", videos, waves, ears)
    return rows


def leave(
    file: Any, name: str, made: Drawn, waves: list[Any], ears: Ears, truth: list[Any] | None = None
) -> None:
    """Of the first clips a picture, an animation, sounds, and MP4 files where these can be written.

    `file` makes a path of a name. `truth`: when digits bounce; otherwise it is what is tracked.
    """
    frames, mels = made.frames[:SHOWN], made.mels
    assert mels is not None
    seen = truth or [ears.bounces(clip) for clip in frames]
    parts = [
        sound_strip(clip, mel, ears, onsets_of, bounces or [])
        for clip, mel, onsets_of, bounces in zip(
            frames, mels, map(ears.onsets, waves[:SHOWN]), seen, strict=False
        )
    ]
    save_png(file(f"{name}-sound.png"), np.concatenate(parts))
    playing = [sounding(clip, mel) for clip, mel in zip(frames, mels, strict=False)]
    save_animation(file(f"{name}-sounding.png"), np.concatenate(playing, 2), ears.fps)
    for k, clip in enumerate(frames):
        with replacing(file(f"{name}-{k}.wav")) as temporary:
            temporary.write_bytes(wav_bytes(waves[k], ears.mel.rate))
        if can_write_mp4():
            large = clip.repeat(4, 1).repeat(4, 2)
            save_animation(file(f"{name}-{k}.mp4"), large, ears.fps, (waves[k], ears.mel.rate))


def sound_strip(
    frames: UInt8[np.ndarray, "f h w c"],
    mel: Float[np.ndarray, "m bands"],
    ears: Ears,
    heard: Seconds,
    seen: Seconds,
) -> UInt8[np.ndarray, "H W 3"]:
    """All frames of a clip in a row, and below them its spectrogram on the same clock.

    Between them marks: above, orange, when digits bounce; below, blue, when tones begin.
    """
    f, h, w, _ = frames.shape
    row = coloured_frames(frames).transpose(1, 0, 2, 3).reshape(h, f * w, 3)
    row[:, w::w] = 70  # thin lines between the frames
    across = -(-f * w // len(mel))
    sound = coloured_sound(mel).repeat(across, 1)[:, : f * w]
    marks = np.full((16, f * w, 3), 24, np.uint8)
    for top, colour, times in ((0, MARK, seen), (8, INK, heard)):
        for time in times:
            # A frame is shown from its moment on, so a clip's clock begins at its left edge.
            x = int(time * ears.fps * w)
            marks[top : top + 8, max(x - 2, 0) : x + 3] = colour
    gap = np.full((10, f * w, 3), 96, np.uint8)
    return np.concatenate([row, marks, sound, gap])


def sounding(
    frames: UInt8[np.ndarray, "f h w c"], mel: Float[np.ndarray, "m bands"]
) -> UInt8[np.ndarray, "f H W 3"]:
    """A clip that plays, twice as large, above its spectrogram: what has sounded is bright."""
    f, _, w, _ = frames.shape
    clip, sound = coloured_frames(frames).repeat(2, 1).repeat(2, 2), coloured_sound(mel)
    width = max(2 * w, len(mel)) + 8
    # A grey frame: digits bounce off its inner edge.
    side = lambda x: ((width - x.shape[2]) // 2, (width - x.shape[2] + 1) // 2)
    centred = lambda x: np.pad(x, ((0, 0), (4, 4), side(x), (0, 0)), constant_values=70)
    heard = np.arange(len(mel)) < (1 + np.arange(f))[:, None] * (len(mel) / f)
    sounds = np.where(heard[:, None, :, None], sound, sound // 4)
    return np.concatenate([centred(clip), centred(sounds)], 1)


def coloured_frames(frames: UInt8[np.ndarray, "f h w c"]) -> UInt8[np.ndarray, "f h w 3"]:
    """Grey frames in three channels; those of colour as they are."""
    return np.repeat(frames, 3, 3) if frames.shape[3] == 1 else frames[..., :3].copy()


def coloured_sound(mel: Float[np.ndarray, "m bands"]) -> UInt8[np.ndarray, "H m 3"]:
    """A spectrogram as a picture, two rows a band, the highest above."""
    from matplotlib import colormaps

    coloured = colormaps["magma"](np.clip((mel.T[::-1] + 1) / 2, 0, 1))[..., :3]
    return (255 * coloured).astype(np.uint8).repeat(2, 0)


def check_sound(command: Sample, config: Config) -> None:
    """Refuses what cannot be drawn of a run with sound, or of one without."""
    if not config.clips.sound:
        for name in ("clip", "wav"):
            if getattr(command, name) is not None:
                raise UserError(f"--{name}: the run in {command.run_dir} knows no sounds.")
        return
    if command.clip is not None and command.wav is not None:
        raise UserError("--clip, --wav: one of the two is given and the other drawn.")
    if command.first is not None and command.clip is not None:
        raise UserError("--first: the frames of --clip are all given.")
    if command.frames not in (None, config.clips.frames):
        raise UserError(
            f"--frames {command.frames}: clips with sound have {config.clips.frames} frames; "
            "longer ones are of runs without."
        )


def sample_sound(
    command: Sample, drawing: SoundDrawing, texts: list[str], key: Any, first: Any, path: Path
) -> Frames:
    """Clips with sound beside `path`, both drawn or one of them; their frames come back."""
    ears, clips = Ears(drawing.trained.config), drawing.trained.config.clips
    given: dict[str, Any] = {}
    with user_errors(DataError, OSError, ValueError, what="--clip, --wav"):
        if command.clip is not None:
            check_is_file(command.clip)
            found = read_clips(command.clip, clips.wanted(clips.frames), most=1)[0]
            given = dict(what="sound", frames=np.repeat(found[None], command.n, 0))
        if command.wav is not None:
            check_is_file(command.wav)
            samples = clips.frames * MEL_FRAMES * ears.mel.hop
            wave = read_wav(command.wav, ears.mel.rate)[:samples]
            mel = ears.mel(np.pad(wave, (0, samples - len(wave))))
            given = dict(what="video", mels=np.repeat(mel[None], command.n, 0))
    made = drawing.draw(texts, key, first=first, **given)
    assert made.mels is not None
    file = lambda name: path.with_name(name)
    waves = ears.waves(made.mels[:SHOWN])
    leave(file, path.stem, made, waves, ears)
    say(f"sounds of the first {len(waves)} are in {path.stem}-0.wav and so on, and in the picture")
    return made.frames
