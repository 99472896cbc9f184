"""The clips of a run: made of MNIST or read from a folder, and what the networks are told."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from eqxldm.audio import MelSpectrogram, Tones
from eqxldm.data import (
    DIRECTIONS,
    ImageArrays,
    ImageRecord,
    ImageSource,
    MovingDigits,
    clips_digest,
    no_condition,
    open_mnist,
    read_caption,
    write_clips,
)

from ..train.conditions import Captions
from ..train.run import RunFolder
from ..train.terminal import UserError, say
from .config import ClipOptions, Config, Train
from .images import open_captioned

Frames = UInt8[np.ndarray, "n f h w c"]
LEAST = 10  # clips to measure against
NAMED = 10 + 4 + 10 * 4  # digits, directions, and both together
MEL_RATE = 8000  # samples a second
MEL_FRAMES = 8  # frames of a spectrogram that go with a frame of a clip
FOLD = 4  # of which so many are one step of the sound's latent


@dataclass(frozen=True)
class Clips:
    """The clips to learn from and those to measure against; `digits` where they are MNIST's;
    `images` that are learned beside them."""

    train: ImageSource
    test: ImageSource
    digits: ImageArrays | None = None
    images: ImageSource | None = None

    @property
    def captioned(self) -> bool:
        return self.train.has_captions


@dataclass(frozen=True)
class Part:
    """Some of the clips of a source, by number."""

    source: ImageSource
    chosen: tuple[int, ...]
    class_names: tuple[str, ...] = ()

    @property
    def has_captions(self) -> bool:
        return self.source.has_captions

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> ImageRecord:
        return self.source[self.chosen[index]]

    def digest(self) -> str:
        return f"{self.source.digest()}, {len(self.chosen)} from {self.chosen[:3]}"


def identity(command: Train) -> str:
    """What the clips are, known before any is decoded."""
    if command.videos is None:
        return moving_digits(command).train.digest()
    found = clips_digest(command.videos)
    return found if command.images is None else f"{found} {open_captioned(command.images).digest()}"


def open_clips_of(command: Train, run: RunFolder) -> Clips:
    """The clips of a run. Those of a folder are decoded once, into the run folder."""
    clips, seed = command.clips, command.seed
    if command.videos is None:
        return moving_digits(command)
    if clips.sound:
        raise UserError("--sound: is of moving digits, whose bounces are known; not of --videos.")
    say(f"clips: those of {command.videos} are decoded once")
    wanted, out = clips.wanted(clips.frames), run.file("clips")
    found = write_clips(command.videos, out, wanted, strict=command.strict)
    if found.skipped:
        say(
            f"clips: {len(found.skipped)} files are left out, listed in clips/clips.json; the "
            f"first: {next(iter(found.skipped.values()))}"
        )
    if len(found) < 2 * LEAST:
        raise UserError(
            f"--videos {command.videos}: {len(found)} clips of {clips.frames} frames; needed are "
            f"{2 * LEAST}, of which {LEAST} measure. Give more or longer files, or fewer --frames."
        )
    n = min(clips.test, max(len(found) // 10, LEAST))
    rng, ids = np.random.default_rng(seed % 2**32), found.about["ids"]
    by_clip = clips.test_by == "clips"
    order = rng.permutation(len(ids)).tolist() if by_clip else by_file(ids, rng)
    train, test = (Part(found, tuple(sorted(part))) for part in (order[n:], order[:n]))
    images = None if command.images is None else open_captioned(command.images)
    return Clips(train, test, images=images)


def by_file(ids: list[str], rng: np.random.Generator) -> list[int]:
    """The clips' numbers, files in a random order and the clips of one together.

    Cut in two, the parts have at most one file in common, which they divide at one moment: the
    clips of a file follow each other at once, and what measures must not be next to what teaches.

    >>> by_file(["a.mp4#0", "a.mp4#1", "b.mp4", "c.mp4#0", "c.mp4#1"], np.random.default_rng(0))
    [3, 4, 0, 1, 2]
    """
    files: dict[str, list[int]] = {}
    for k, name in enumerate(ids):
        files.setdefault(re.sub(r"#\d+$", "", name), []).append(k)
    together = list(files.values())
    return [k for i in rng.permutation(len(together)) for k in together[i]]


def moving_digits(command: Train) -> Clips:
    """Digits of MNIST's training set to learn from, of its test set to measure against."""
    clips, seed = command.clips, command.seed
    if clips.size[0] != clips.size[1] or clips.channels != 1:
        raise UserError("moving digits are grey squares: --size 64 64 --channels 1.")

    def made(split: str, count: int) -> tuple[MovingDigits, ImageArrays]:
        digits = open_mnist("mnist", command.mnist, split=split, log=say)
        assert digits.labels is not None
        options: dict[str, Any] = dict(frames=clips.frames, size=clips.size[0], seed=seed % 2**32)
        options |= dict(count=clips.digits, fps=clips.rate)
        options |= dict(tones=Tones(MEL_RATE)) if clips.sound else {}
        return MovingDigits(digits.images[..., 0], digits.labels, count, **options), digits

    train, digits = made("train", clips.count)
    return Clips(train, made("test", clips.test)[0], digits)


def choose_condition(config: Config, clips: Clips) -> Any:
    """What the network is told of a record: the tokens of its caption, or nothing."""
    kind = config.clips.condition
    if kind == "text" and not clips.captioned:
        raise UserError(
            "--condition text: the clips have no captions. Put captions.json ({file: caption}) "
            "beside them, or the clips into a folder for each class."
        )
    if clips.images is not None and not clips.captioned:
        say("captions: the clips have none, so those of --images are not read either.")
    if kind == "none" or not clips.captioned:
        return no_condition
    if config.diffusion.tokens == "digits" and clips.digits is None:
        raise UserError(
            "--diffusion.tokens digits: is of moving digits; captions of --videos are read as clip "
            "or bytes."
        )
    return captions_of(config).read


def say_long_captions(config: Config, clips: Clips) -> None:
    """Says how many captions are longer than what is read of them, of the clips that measure."""
    cut = captions_of(config).read.cut
    texts = [clips.test[i].caption or "" for i in range(len(clips.test))]
    long = [text for text in texts if cut(text)]
    if long:
        say(
            f"captions: {len(long)} of {len(texts)} are longer than --diffusion.max-length "
            f"{config.diffusion.max_length}, and their ends are not read; the first: {long[0]}"
        )


@dataclass(frozen=True)
class Named:
    """A condition: how often a caption names each digit, each direction, and each of both together,
    `(54,)`; nothing for a caption that names none."""

    def __call__(self, record: ImageRecord) -> Float[np.ndarray, " 54"]:
        return self.tokens(record.caption or "")

    def tokens(self, text: str) -> Float[np.ndarray, " 54"]:
        """
        >>> Named().tokens("a 3 moving up and a 3 moving right")[[3, 10, 13]]
        array([2., 1., 1.], dtype=float32)
        """
        found = np.zeros(NAMED, np.float32)
        for digit, name in read_caption(text):
            direction = DIRECTIONS.index(name)
            found[[digit, 10 + direction, 14 + 4 * digit + direction]] += 1
        return found

    def cut(self, text: str) -> str:
        """What finds no room: nothing."""
        return ""


@dataclass(frozen=True)
class NamedDigits:
    """What captions of so many moving digits name; read as `Captions` are."""

    digits: int

    @property
    def read(self) -> Named:
        return Named()

    @property
    def null(self) -> Float[np.ndarray, " 54"]:
        return self.read.tokens("")

    def say_cut(self, prompt: str) -> None:
        """Refuses a prompt that does not say what so many digits do."""
        if len(read_caption(prompt)) != self.digits:
            several = ("a 3 moving up", "a 7 moving left") * self.digits
            example = " and ".join(several[: self.digits])
            digits = "1 digit" if self.digits == 1 else f"{self.digits} digits"
            raise UserError(
                f"--prompt {prompt!r}: this run knows {digits} and directions "
                f"({', '.join(DIRECTIONS)}), such as: {example}"
            )


def captions_of(config: Config) -> Captions | NamedDigits:
    """How captions are read."""
    options = config.diffusion
    if options.tokens == "digits":
        return NamedDigits(config.clips.digits)
    merges = options.merges if options.tokens == "clip" else None
    return Captions(options.max_length, merges)


@dataclass(frozen=True)
class WithSound:
    """A condition: the spectrogram of a record's sound, and beside it another condition."""

    text: Any
    mel: MelSpectrogram

    def __call__(self, record: ImageRecord) -> dict[str, Any]:
        assert record.sound is not None
        told = self.text(record)
        return {"mel": self.mel(record.sound)} | ({} if told is None else {"text": told})


def spectrogram_of(clips: ClipOptions) -> MelSpectrogram:
    """Of the sounds of a run: eight frames go with each frame of a clip."""
    return MelSpectrogram(MEL_RATE, hop=round(MEL_RATE / clips.rate / MEL_FRAMES))


def strip_size(clips: ClipOptions) -> tuple[int, int]:
    """Height and width of a clip's frames one below another, which is how records hold it."""
    return clips.frames * clips.size[0], clips.size[1]


def frames_of(strips: Any, clips: ClipOptions) -> Any:
    """Strips `(n, frames * h, w, c)` as `(n, frames, h, w, c)`."""
    return strips.reshape(len(strips), -1, *clips.size, clips.channels)


def some_clips(source: ImageSource, count: int, clips: ClipOptions) -> tuple[Frames, list[str]]:
    """The first clips of a source and their captions, "" where they have none."""
    records = [source[i] for i in range(min(count, len(source)))]
    strips = np.stack([np.asarray(record.image) for record in records])
    return frames_of(strips, clips), [record.caption or "" for record in records]


@dataclass(frozen=True)
class Said:
    """A condition: which digits and which directions a caption names, `(14,)`."""

    def __call__(self, record: ImageRecord) -> Float[np.ndarray, " 14"]:
        return said_by(record.caption or "")


def said_by(caption: str) -> Float[np.ndarray, " 14"]:
    """1 at each digit that is in the caption, and at `10 +` each direction.

    >>> np.flatnonzero(said_by("a 3 moving up and a 7 moving right"))
    array([ 3,  7, 10, 13])
    """
    found = np.zeros(14, np.float32)
    for digit, direction in read_caption(caption):
        found[digit] = found[10 + DIRECTIONS.index(direction)] = 1
    return found
