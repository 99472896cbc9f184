"""A queue of requests, slots that they are worked on in, and the thread that does it."""

import abc
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from .events import Failure, Job, QueueFull
from .requests import Limits, RequestError


class AbstractEngine(abc.ABC):
    """What engines share: requests wait, are worked on in slots, and end by an answer, a deadline,
    or because the client has gone.

    A request is a `Job` of one or more pieces of work, each of which takes a slot: an image, a
    text. A piece has `job`, `slot` and `left`, the network calls that it still needs at most. To
    make an engine, write `warm_up`, `begin` and `advance`, and hand pieces in by `queue_up`.

    **Arguments**:

    - `slots`: pieces that can be worked on at once.
    - `queue`: pieces that may wait, at most; beyond it `queue_up` raises `QueueFull`.
    - `observe`: `(name, value)` is called with what is measured.
    """

    cost = "steps"  # what a request has fewer of that takes less time

    def __init__(
        self,
        slots: int,
        queue: int,
        limits: Limits | None,
        observe: Callable[[str, float], None] | None,
    ):
        self.limits = Limits() if limits is None else limits
        self.observe: Callable[[str, float], None] = observe or (lambda name, value: None)
        self.ready, self.failed = threading.Event(), None
        self.slots, self.room = slots, queue
        self._waiting: deque[Any] = deque()
        self._active: list[Any] = []
        self._wake, self._stopping = threading.Condition(), False
        self._threads: list[threading.Thread] = []
        self._step_seconds, self._last_step = 0.05, None

    # From outside, any thread.

    @property
    def waiting(self) -> int:
        """Pieces of work in the queue."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Pieces of work that have a slot."""
        return len(self._active)

    @property
    def together(self) -> int:
        """Pieces of work that share a network call, at most."""
        return self.slots

    def is_quick(self, request: Any) -> bool:
        """Whether `submit` takes microseconds: an event loop then leaves it to no thread."""
        return False

    @abc.abstractmethod
    def submit(self, request: Any, send: Callable[[Any], None]) -> Job:
        """Queues a request; what it leads to is given to `send`.

        **Raises** `QueueFull` where its pieces find no room, and `RequestError` if the engine is
        not ready or for what the model does not know.
        """

    def check_open(self, pieces: int) -> None:
        """`RequestError` unless requests are taken and this one has room: before any work is done
        for it."""
        if not self.ready.is_set() or self._stopping:
            state = "is stopping" if self._stopping else "is not ready yet"
            raise RequestError(503, f"the server {state}.")
        self._check_room(pieces)

    def queue_up(self, pieces: list[Any]) -> None:
        """Lets pieces of work wait for slots."""
        with self._wake:
            if self._stopping:
                raise RequestError(503, "the server is stopping.")
            self._check_room(len(pieces))
            self._waiting.extend(pieces)
            self._wake.notify()

    def _check_room(self, pieces):
        with self._wake:
            there = sum(not d.job.ended for d in [*self._active, *self._waiting])
            if there + pieces > self.room + self.slots:
                raise QueueFull(self.seconds_ahead())

    def seconds_ahead(self) -> int:
        """About how long what is queued takes, for Retry-After."""
        with self._wake:
            pieces = [d for d in [*self._active, *self._waiting] if not d.job.ended]
        calls = sum(piece.left for piece in pieces)
        return max(1, round(calls * self._step_seconds / self.together))

    def start(self, progress: Callable[[str], None] | None = None) -> None:
        """Compiles, then works, until `stop`; returns at once. `ready` is set when it may begin."""
        self._threads = [
            threading.Thread(target=self._work, args=(progress,), name="engine", daemon=True),
            *self.more_threads(),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends what is under way, with a `Failure` for each request, and the threads."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        for thread in self._threads:
            thread.join()

    # What an engine is made of, called by the thread that works.

    @abc.abstractmethod
    def warm_up(self, progress: Callable[[str], None]) -> None:
        """Compiles everything; `progress` is told what is next, and may end it."""

    @abc.abstractmethod
    def begin(self, pieces: list[Any]) -> None:
        """Starts pieces that have got slots."""

    @abc.abstractmethod
    def advance(self) -> None:
        """One network call of everything in `_active`, and what follows from it."""

    def gather(self) -> None:  # noqa: B027
        """Before waiting pieces get slots: may let more of them come."""

    def rest(self) -> None:
        """There is nothing to do for now."""
        self._last_step = None

    def finish(self) -> None:
        """The last thing that is called."""
        self._active = []

    def more_threads(self) -> list[threading.Thread]:
        """Threads beside the one that works, not started; `finish` ends them."""
        return []

    def keep_time(self) -> None:
        """Measures from one network call to the next."""
        now = time.monotonic()
        if self._last_step is not None:
            seconds = now - self._last_step
            self._step_seconds = 0.9 * self._step_seconds + 0.1 * seconds
            self.observe("step_seconds", seconds)
        self._last_step = now

    def release(self, done: list[Any]) -> None:
        """Frees the slots of finished pieces."""
        if done:
            with self._wake:
                self._active = [d for d in self._active if d not in done]

    def fail(self, job: Job, status: int, message: str) -> None:
        """Ends a job with one message."""
        if not job.ended:
            job.ended = True
            job.send(Failure(status, message))

    # The thread that works.

    def _work(self, progress):
        def tell(name):
            if self._stopping:
                raise _Stopped
            if progress is not None:
                progress(name)

        try:
            self.warm_up(tell)
            self.ready.set()
            while self._await_work():
                self.gather()
                self._drop_ended()
                self._admit()
                self.advance()
        except _Stopped:
            pass
        except BaseException as error:  # whatever it is, nobody waits for ever
            self.failed = error
            self.ready.clear()
            raise
        finally:
            with self._wake:
                self._stopping = True
                left = {id(d.job): d.job for d in [*self._active, *self._waiting]}
                self._waiting.clear()
            for job in left.values():
                self.fail(job, 503, "the server is stopping.")
            self.finish()

    def _await_work(self):
        with self._wake:
            while not (self._waiting or self._active or self._stopping):
                self.rest()
                self._wake.wait()
            return not self._stopping

    def _drop_ended(self):
        now = time.monotonic()
        with self._wake:
            pieces = [*self._active, *self._waiting]
        for piece in pieces:
            if not piece.job.ended and now > piece.job.deadline:
                seconds = f"{self.limits.seconds:g} s"
                self.fail(piece.job, 504, f"not done within {seconds}; ask for fewer {self.cost}.")
        with self._wake:
            before = len(self._active) + len(self._waiting)
            self._active = [d for d in self._active if not d.job.ended]
            self._waiting = deque(d for d in self._waiting if not d.job.ended)
            gone = before - len(self._active) - len(self._waiting)
        if gone:
            self.observe("cancelled", gone)

    def _admit(self):
        """Fills free slots with what has waited longest."""
        with self._wake:
            free = sorted(set(range(self.slots)) - {d.slot for d in self._active})
            new = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
            for piece, slot in zip(new, free, strict=False):
                piece.slot = slot
            self._active += new
        if new:
            self.begin(new)


class _Stopped(Exception):
    """Raised in the middle of warming up."""
