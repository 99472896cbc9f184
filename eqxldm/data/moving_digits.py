"""Moving MNIST: digits that fly through a square and bounce off its walls, with captions."""

import hashlib
import operator
import re
from dataclasses import dataclass
from typing import NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Float, Int, UInt8

from ..audio.tones import Tones
from .errors import DataError
from .image_source import ImageRecord, checked_index

DIRECTIONS = ("right", "down", "left", "up")
_SAID = re.compile(r"a (\d) moving (right|down|left|up)")


class MovingClip(NamedTuple):
    """A clip and the truth about it: what each digit is, where its patch is, where it flies.

    `places` are the rows and columns of the patches' upper left corners before they are rounded,
    `velocities` those in the first frame, in pixels a frame. `bounces` are `(frame, k)`: when digit
    `k` of the clip meets a wall, between two frames most often, ascending.
    """

    frames: UInt8[np.ndarray, "f h w 1"]
    digits: Int[np.ndarray, " n"]
    places: Float[np.ndarray, "f n 2"]
    velocities: Float[np.ndarray, "n 2"]
    bounces: tuple[tuple[float, int], ...] = ()

    @property
    def caption(self) -> str:
        """As `caption_of` says it."""
        return caption_of(self.digits, self.velocities)


def direction_of(velocity: Float[np.ndarray, " 2"]) -> str:
    """Which of the four a velocity (rows, columns) is nearest to.

    >>> direction_of(np.array([-3.0, 1.0]))
    'up'
    """
    angle = np.arctan2(velocity[0], velocity[1])  # rows grow downwards
    return DIRECTIONS[int(np.round(angle / (np.pi / 2))) % 4]


def caption_of(digits: Int[np.ndarray, " n"], velocities: Float[np.ndarray, "n 2"]) -> str:
    """What a clip shows, in words.

    >>> caption_of(np.array([3, 7]), np.array([[-2.0, 0.0], [0.5, -3.0]]))
    'a 3 moving up and a 7 moving left'
    """
    parts = zip(digits.tolist(), velocities, strict=True)
    return " and ".join(f"a {digit} moving {direction_of(v)}" for digit, v in parts)


def read_caption(caption: str) -> list[tuple[int, str]]:
    """Digits and directions that a caption names, in its order.

    >>> read_caption("a 3 moving up and a 7 moving left")
    [(3, 'up'), (7, 'left')]
    """
    return [(int(digit), direction) for digit, direction in _SAID.findall(caption)]


@dataclass(frozen=True)
class MovingDigits:
    """Clips of moving digits, an `ImageSource` of strips: a clip's frames one below another.

    By the recipe of Srivastava et al. 2015 ("Unsupervised learning of video representations using
    LSTMs", section 4.1): digits of MNIST at random places of a square, each with a direction
    uniform on the circle and a speed uniform in a range, bounce off the walls; where they overlap
    the brighter pixel counts. The authors' program puts a digit that would leave the square onto
    the wall; here it is reflected, so that its speed is the same in every frame.

    A clip depends on `(seed, index)` and the images alone. `clip(i)` has the truth about it, and
    `source[i]` is a record `(frames * size, size, 1)` with the caption. With `tones` it has a
    sound, too: at each bounce the tone of the digit is struck.

    **Arguments**:

    - `images`, `labels`: the digits, uint8 `(n, h, w)`, smaller than the square, and 0 to 9.
    - `length`: how many clips there are.
    - `frames`: 17 by default: 4 k + 1, as autoencoders that keep the first frame apart need.
    - `size`: the square's side; `count`: digits in a clip; `speeds`: pixels a frame, `(low, high)`.
    - `tones`: of the sound, such as `audio.Tones()`; `fps`: the frames a second that it goes with.

    **Raises** `DataError` for sizes that do not fit.

    >>> square = np.full((1, 4, 4), 255, np.uint8)
    >>> source = MovingDigits(square, np.array([7]), 10, frames=5, size=16, count=1)
    >>> source[3].image.shape, source.clip(3).caption == source[3].caption
    ((80, 16, 1), True)
    """

    images: UInt8[np.ndarray, "n h w"]
    labels: Int[np.ndarray, " n"]
    length: int
    frames: int = 17
    size: int = 64
    count: int = 2
    speeds: tuple[float, float] = (2.0, 4.0)
    seed: int = 0
    tones: Tones | None = None
    fps: float = 8.0

    def __post_init__(self):
        low, high = self.speeds
        if len(self.images) == 0 or max(self.images.shape[1:]) >= self.size:
            raise DataError(
                f"moving digits: images of shape {self.images.shape} do not fit a square of side "
                f"{self.size}; it must be larger than they are."
            )
        if min(self.length, self.frames, self.count) < 1 or not 0 <= low <= high:
            raise DataError(
                f"moving digits: length {self.length}, frames {self.frames} and count {self.count} "
                f"must be at least 1, and speeds {self.speeds} must rise from 0 or more."
            )

    def clip(self, index: SupportsIndex) -> MovingClip:
        """The clip of this number and what is known of it."""
        from ..metrics.tracking import wall_times  # and with it parts of SciPy

        rng = np.random.default_rng([self.seed, operator.index(index)])
        chosen = rng.integers(len(self.images), size=self.count)
        room = self.size - np.array(self.images.shape[1:], np.float64)
        start = rng.uniform(0, 1, (self.count, 2)) * room
        angle = rng.uniform(0, 2 * np.pi, self.count)
        speed = rng.uniform(*self.speeds, self.count)
        velocity = speed[:, None] * np.stack([np.sin(angle), np.cos(angle)], 1)
        # Walls at 0 and `room` throw back what would be beyond them: a triangle wave.
        straight = start + np.arange(self.frames)[:, None, None] * velocity
        places = room - np.abs(np.mod(straight, 2 * room) - room)
        frames = np.zeros((self.frames, self.size, self.size, 1), np.uint8)
        h, w = self.images.shape[1:]
        for f, corners in enumerate(np.round(places).astype(int)):
            for k, (i, j) in enumerate(corners):
                part = frames[f, i : i + h, j : j + w, 0]
                np.maximum(part, self.images[chosen[k]], out=part)
        hits = [
            (time, k)
            for k in range(self.count)
            for axis in (0, 1)
            for time in wall_times(
                float(start[k, axis]), float(velocity[k, axis]), room[axis], self.frames - 1.0
            )
        ]
        return MovingClip(frames, self.labels[chosen], places, velocity, tuple(sorted(hits)))

    def wave(self, clip: MovingClip) -> Float[np.ndarray, " samples"] | None:
        """The sound of a clip, as long as its frames last; None without `tones`."""
        if self.tones is None:
            return None
        struck = [(frame / self.fps, int(clip.digits[k])) for frame, k in clip.bounces]
        return self.tones.wave(struck, self.frames / self.fps)

    @property
    def class_names(self) -> tuple[str, ...]:
        return ()

    @property
    def has_captions(self) -> bool:
        return True

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: SupportsIndex) -> ImageRecord:
        i = checked_index(index, self.length)
        clip = self.clip(i)
        strip = clip.frames.reshape(-1, self.size, 1)
        return ImageRecord(strip, f"moving digits/{i}", None, clip.caption, self.wave(clip))

    def digest(self) -> str:
        """Over the digits' pixels and all that the clips depend on."""
        about = (self.length, self.frames, self.size, self.count, self.speeds, self.seed)
        sha = hashlib.sha256(repr(about).encode())
        if self.tones is not None:
            sha.update(repr((self.tones, self.fps)).encode())
        sha.update(np.ascontiguousarray(self.images).data)
        sha.update(np.ascontiguousarray(self.labels.astype(np.int32)).data)
        return sha.hexdigest()
