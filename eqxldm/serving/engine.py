"""The engine of images: slots that they are drawn in, and what is shown of them."""

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Queue
from typing import Any

import jax
import numpy as np

from .events import (
    Draw,
    Forward,
    ImageJob,
    Picture,
    Preview,
    Send,
    seed_words,
    shown_calls,
)
from .generator import MAP, Generator
from .pictures import png
from .plans import Plan
from .programs import FRAMES, Programs, fitting
from .queueing import AbstractEngine
from .requests import Limits, Request, RequestError

# Network calls that are dispatched before the first of them must be done: as many as fill these
# seconds, for which a new request may wait, in the range.
AHEAD_SECONDS, AHEAD = 0.02, (2, 8)
BACKLOG = 16  # decoded batches that wait to be delivered, before drawing waits for them


class Engine(AbstractEngine):
    """Draws requests with a `Generator`: step by step, in network calls that many share.

    Where more images are on their way than the largest call has rows for, they take turns, so that
    calls are full: a guided image takes two rows, and one where it is not guided.

    `start` compiles and begins, in a thread of its own; `submit` hands in a request. What a request
    leads to is given to its `send`, from another thread: `Preview`s, a `Picture` for each of its
    images, in any order, or one `Failure` in their place.

    **Arguments**:

    - `slots`, `sizes`, `decodes`: see `Programs`.
    - `queue`: images that may wait, at most; beyond it `submit` raises `QueueFull`.
    - `observe`: `(name, value)` is called with what is measured: `rows` and `size` of a network
      call, `step_seconds`, `images` delivered, `cancelled`.

    >>> import jax.numpy as jnp
    >>> from eqxldm import DDIM, Diffusion, LinearFlow, predict_x0, uniform_times
    >>> from eqxldm.serving import Defaults
    >>> generator = Generator(
    ...     "grey", lambda x, t, cond, key=None: jnp.zeros_like(x),
    ...     Diffusion(LinearFlow(), predict_x0), (1, 2, 2), lambda z: z, (2, 2),
    ...     {"ddim": DDIM()}, uniform_times, Defaults("ddim"))
    >>> engine, found = Engine(generator, slots=1), Queue()
    >>> engine.start(); engine.ready.wait()
    True
    >>> job = engine.submit(Request("ddim", 4, 1.0, (0.0, 1.0), seed=7), found.put)
    >>> found.get().data[:4]
    b'\\x89PNG'
    >>> engine.stop()
    """

    def __init__(
        self,
        generator: Generator,
        *,
        slots: int = 16,
        queue: int = 64,
        sizes: tuple[int, ...] | None = None,
        decodes: tuple[int, ...] | None = None,
        limits: Limits | None = None,
        observe: Callable[[str, float], None] | None = None,
    ):
        super().__init__(slots, queue, limits, observe)
        self.generator = generator
        self.programs = Programs(generator, slots=slots, sizes=sizes, decodes=decodes)
        self._flights: deque[Any] = deque()
        self._outbox: Any = Queue(BACKLOG)
        self._numbers = np.zeros((slots, 1 + self.programs.plans.packing.width), np.float32)
        self._counts = np.zeros((slots, 4), np.int32)

    # From outside, any thread.

    def prepare(self, request: Request) -> tuple[Plan, Any]:
        """What a request needs to be drawn: its plan and its condition.

        **Raises** `RequestError` for what the model does not know.
        """
        most = self.generator.most_steps
        if not 1 <= request.steps <= most:
            raise RequestError(400, f"steps must be in 1 .. {most}, got {request.steps}.", "steps")
        try:
            plan = self.programs.plans(request.solver, request.steps)
            cond = self.generator.condition(request.prompt, request.label)
        except ValueError as error:
            raise RequestError(400, str(error)) from error
        return plan, jax.tree.map(np.asarray, cond)

    @property
    def together(self) -> int:
        return min(self.slots, self.programs.images)

    def is_quick(self, request: Request) -> bool:
        # No text to encode, and a plan that is made.
        known = self.programs.plans.has(request.solver, request.steps)
        return known and not self.generator.takes_text

    def submit(self, request: Request, send: Send) -> ImageJob:
        """Queues a request.

        **Raises** `QueueFull` where its images find no room, and `RequestError` if the engine is
        not ready or for what the model does not know.
        """
        self.check_open(request.n)
        plan, cond = self.prepare(request)
        deadline = time.monotonic() + self.limits.seconds
        job = ImageJob(request, send, deadline, plan=plan, cond=cond)
        shown = shown_calls(request, plan.calls)
        self.queue_up([Draw(job, i, shown=shown) for i in range(request.n)])
        return job

    # The thread that draws.

    def warm_up(self, progress: Callable[[str], None]) -> None:
        self.programs.warm_up(progress)
        self._warm_host()

    def advance(self) -> None:
        for follows in (False, True):
            draws = [d for d in self._active if (d.job.request.solver == MAP) == follows]
            if draws:
                self._show(self._step(draws, follows))

    def gather(self) -> None:
        # Nothing is under way that must go on: who begins now shares a call with all that come
        # until the device has done those before. It goes on with what is to be decoded meanwhile.
        # Half of the slots are enough: the others' answers are on their way then.
        while self._flights and not self._active and len(self._waiting) < self.slots // 2:
            self._flights.popleft().block_until_ready()

    def more_threads(self) -> list[threading.Thread]:
        return [threading.Thread(target=self._deliver, name="engine-delivery", daemon=True)]

    def finish(self) -> None:
        super().finish()
        self._outbox.put(None)

    def _warm_host(self):
        """What the first request would wait for beside the programs: text encoders, imports."""
        generator = self.generator
        label = 0 if generator.labels else None
        generator.condition("" if generator.takes_text else None, label)
        self.programs.plans(generator.defaults.solver, generator.defaults.steps)
        png(np.zeros((1, 1, generator.channels), np.uint8))

    def begin(self, pieces: list[Draw]) -> None:
        s = self.programs.slots
        mask, words = np.zeros(s, bool), np.zeros((s, 2), np.uint32)
        index, std = np.zeros(s, np.int32), np.ones(s, np.float32)
        conds = [pieces[0].job.cond] * s
        for draw in pieces:
            mask[draw.slot], words[draw.slot] = True, seed_words(draw.job.request.seed)
            index[draw.slot], std[draw.slot] = draw.index, draw.job.plan.start_std
            conds[draw.slot] = draw.job.cond
        cond = jax.tree.map(lambda *leaves: np.stack(leaves), *conds)
        self.programs.admit(mask, words, index, std, cond)
        # A trajectory begins with its noise.
        noises = [((d.slot, 0), (d, 0, "state")) for d in pieces if d.job.request.trajectory]
        self._decode(noises, finite=None)

    def _step(self, draws, follows):
        """A network call of as many of the images as it has rows for; returns these.

        The next one begins with those that had to wait.
        """
        most, rows, taken = self.programs.sizes[-1], [], []
        if follows:  # the answers of one half go out while the device has the other
            most = min(most, max(1, self.slots // 2))
        self._counts[:, 1] = -1
        for draw in draws:
            request, plan = draw.job.request, draw.job.plan
            t, (low, high) = plan.times[draw.done], request.interval
            guides = request.guidance != 1 and not follows
            guides = guides and np.float32(low) <= t <= np.float32(high)
            if len(rows) + 1 + guides > most:
                continue
            own = len(rows)
            rows.append((draw.slot, 0))
            if guides:
                rows.append((draw.slot, 1))
            self._numbers[draw.slot, 0] = request.guidance if guides else 1.0
            self._numbers[draw.slot, 1:] = plan.rows[draw.done]
            solver = 0 if follows else self.programs.solvers[request.solver]
            self._counts[draw.slot] = draw.done, solver, own, len(rows) - 1
            taken.append(draw)
        size = fitting(self.programs.sizes, len(rows))
        padded = np.zeros((size, 2), np.int32)
        padded[: len(rows)] = rows
        call = self.programs.follow if follows else self.programs.advance
        self._flights.append(call(self._numbers.copy(), self._counts.copy(), padded))
        self.observe("rows", len(rows))
        self.observe("size", size)
        self._keep_pace()
        for draw in taken:
            draw.done += 1
        if len(taken) < len(draws):
            with self._wake:
                self._active = [d for d in self._active if d not in taken] + taken
        return taken

    def _keep_pace(self):
        """Waits for a call that was dispatched before: a new request joins soon, and the device is
        busy, however late this thread wakes up."""
        low, high = AHEAD
        ahead = min(max(low, 1 + int(AHEAD_SECONDS / max(self._step_seconds, 1e-6))), high)
        while len(self._flights) >= ahead:
            self._flights.popleft().block_until_ready()
        self.keep_time()

    def _show(self, draws):
        """Decodes what is finished of these and what is to be seen on the way."""
        wanted = []
        for draw in draws:
            if draw.done in draw.shown:
                wanted.append(((draw.slot, 1), (draw, draw.done, "estimate")))
            if draw.done == draw.job.plan.calls:
                wanted.append(((draw.slot, 0), (draw, draw.done, "final")))
            elif draw.job.request.trajectory:
                wanted.append(((draw.slot, 0), (draw, draw.done, "state")))
        self._decode(wanted, self._flights[-1])
        finished = [d for d in draws if d.done == d.job.plan.calls]
        for draw in finished:
            if draw.job.request.trajectory:
                times = np.linspace(0.0, 1.0, FRAMES)
                at = self.generator.diffusion.path.coefficients(times)
                alpha, sigma = (np.asarray(a, np.float32) for a in (at.alpha, at.sigma))
                words = seed_words(draw.job.request.seed)
                given = np.int32(draw.slot), words, np.int32(draw.index), alpha, sigma
                self._outbox.put((self.programs.noise(*given), draw, times))
        self.release(finished)

    def _decode(self, wanted, finite):
        """Decodes rows, each with what it is for, and leaves them to the other thread."""
        most = self.programs.decodes[-1]
        for i in range(0, len(wanted), most):
            rows, meanings = zip(*wanted[i : i + most], strict=True)
            padded = np.zeros((fitting(self.programs.decodes, len(rows)), 2), np.int32)
            padded[: len(rows)] = rows
            self._outbox.put((self.programs.decode(padded), meanings, finite))

    # The thread that delivers: it waits for the device and makes PNGs.

    def _deliver(self):
        while (item := self._outbox.get()) is not None:
            pictures, meanings, more = item
            draws = [meanings] if isinstance(meanings, Draw) else [m[0] for m in meanings]
            try:
                pictures = np.asarray(pictures)
                if isinstance(meanings, Draw):
                    frames = tuple(png(picture) for picture in pictures)
                    self._send(meanings, Forward(tuple(more.tolist()), frames))
                    continue
                finite = None if more is None else np.asarray(more)
                for picture, (draw, done, kind) in zip(pictures, meanings, strict=False):
                    if finite is not None and not finite[draw.slot]:
                        self.fail(draw.job, 500, NOT_FINITE)
                    elif not draw.job.ended:
                        self._send_picture(draw, done, kind, png(picture))
            except Exception as error:  # of one answer; the others go on
                for draw in draws:
                    self.fail(draw.job, 500, f"the picture was lost: {type(error).__name__}.")

    def _send(self, draw, event):
        if not draw.job.ended:
            draw.job.send(event)

    def _send_picture(self, draw, done, kind, data):
        if kind == "final":
            self.observe("images", 1)
            self._send(draw, Picture(draw.index, data))
            return
        if kind == "state":
            draw.state = data  # the next call sees it, and its estimate comes later
            return
        plan, state = draw.job.plan, draw.state
        self._send(
            draw, Preview(draw.index, done, plan.calls, float(plan.times[done - 1]), data, state)
        )


NOT_FINITE = "the picture became NaN or infinite. Lower guidance, or take another solver."
