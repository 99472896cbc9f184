"""What an engine works on, and what it sends: jobs, previews, pictures, failures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .plans import Plan
from .requests import Request, RequestError


class QueueFull(RequestError):
    """There is no room: come again in `retry_after` seconds.

    >>> QueueFull(3).retry_after, QueueFull(3).status
    (3, 429)
    """

    def __init__(self, retry_after: int):
        super().__init__(429, f"the queue is full; try again in {retry_after} s.")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Preview:
    """The estimate of an image that call `step` of `of` made at `time`; with a trajectory the state
    that it was made from.

    >>> Preview(0, 1, 20, 0.95, b"").state is None
    True
    """

    index: int
    step: int
    of: int
    time: float
    estimate: bytes
    state: bytes | None = None


@dataclass(frozen=True)
class Picture:
    """A finished image, as PNG.

    >>> Picture(0, b"").index
    0
    """

    index: int
    data: bytes


@dataclass(frozen=True)
class Forward:
    """The forward process from a finished image to the noise that it came from, as PNGs.

    >>> Forward((0.0,), (b"",)).times
    (0.0,)
    """

    times: tuple[float, ...]
    frames: tuple[bytes, ...]


@dataclass(frozen=True)
class Failure:
    """No more images come; why, as an HTTP status and a message.

    >>> Failure(504, "too late").status
    504
    """

    status: int
    message: str


Send = Callable[[Any], None]


@dataclass(eq=False)
class Job:
    """A request on its way; `cancel` ends it."""

    request: Any
    send: Send
    deadline: float
    ended: bool = False

    def cancel(self) -> None:
        """It is worked on no further, and nothing more is sent."""
        self.ended = True


@dataclass(eq=False, kw_only=True)
class ImageJob(Job):
    """A request for images, with its plan and its condition."""

    plan: Plan
    cond: Any


@dataclass(eq=False)
class Draw:
    """One image of a job: its slot and the number of calls that are done."""

    job: ImageJob
    index: int
    slot: int = -1
    done: int = 0
    shown: frozenset[int] = frozenset()
    state: bytes | None = None

    @property
    def left(self) -> int:
        """The network calls that it needs still."""
        return self.job.plan.calls - self.done


def seed_words(seed: int) -> np.ndarray:
    """The two words of a seed below 2^64, upper word first: those of its key.

    >>> seed_words(2**32 + 7)
    array([1, 7], dtype=uint32)
    """
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def shown_calls(request: Request, calls: int) -> frozenset[int]:
    """After which calls an image is shown: every one of a trajectory, or some, evenly.

    >>> sorted(shown_calls(Request("ddim", 9, 1.0, (0.0, 1.0), 0, previews=2), 9))
    [1, 8]
    """
    if request.trajectory:
        return frozenset(range(1, calls + 1))
    if not request.previews or calls < 2:
        return frozenset()
    count = min(request.previews, calls - 1)
    return frozenset(np.linspace(1, calls - 1, count).round().astype(int).tolist())
