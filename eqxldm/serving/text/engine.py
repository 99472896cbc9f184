"""The engine of texts: slots that they are written in, call by call."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ...discrete import TokenPlan
from ..events import Job, Send, seed_words
from ..programs import fitting
from ..queueing import AbstractEngine
from ..requests import Limits, RequestError
from .canvas import Canvas, cut, lay_out
from .generator import TextGenerator
from .programs import TextPrograms, blank_plan
from .requests import TextRequest


@dataclass(frozen=True, eq=False)
class Progress:
    """The tokens of text `index` after step `step` of `of`, and the network's calls until then."""

    index: int
    step: int
    of: int
    calls: int
    tokens: np.ndarray


@dataclass(frozen=True, eq=False)
class Written:
    """A finished text: its tokens, and the network's calls. After a stop some may be [MASK]."""

    index: int
    calls: int
    tokens: np.ndarray


@dataclass(eq=False, kw_only=True)
class TextJob(Job):
    """A request for texts; `canvases` are those of its prompts."""

    canvases: tuple[Canvas, ...]


@dataclass(eq=False)
class Text:
    """One text of a job: its plan, its tokens, and how far it is.

    `number` is which of the texts of its prompt it is: together with the seed it is what is drawn.
    `known`: what the network said of it is still true, as nothing has changed since.
    """

    job: TextJob
    index: int
    number: int
    canvas: Canvas
    plan: TokenPlan
    tokens: np.ndarray
    slot: int = -1
    done: int = 0
    calls: int = 0
    known: bool = False

    @property
    def steps(self) -> int:
        """Of its plan."""
        return len(self.plan.t)

    @property
    def left(self) -> int:
        """The network calls that it needs still, at most."""
        return self.steps - self.done

    def row(self) -> Any:
        """The plan's entry for the step at hand."""
        return jax.tree.map(lambda column: column[self.done], self.plan)

    def skip(self) -> None:
        """Passes over steps for which nothing is masked."""
        masked = self.tokens == self.canvas.mask_id
        if not masked.any():
            self.done = self.steps
        while (
            self.left and not masked[self.plan.start[self.done] : self.plan.stop[self.done]].any()
        ):
            self.done += 1


class TextEngine(AbstractEngine):
    """Writes requests with a `TextGenerator`: as many texts together as there are slots.

    As `Engine`, which is for images. What a request leads to is given to its `send`, from another
    thread: a `Written` for each of its texts, in any order, before them `Progress` where it is
    `live`, or one `Failure` in their place. Each text is that of `discrete.sample_tokens` with the
    key of its seed, whoever else is there. Text `i` of prompt `k` has the index `k n + i`.

    **Arguments**: as of `Engine`; `sizes` as in `TextPrograms`. It observes `texts`.

    >>> from queue import Queue
    >>> import jax.numpy as jnp
    >>> from eqxldm.discrete import Masking, Ordered
    >>> generator = TextGenerator(
    ...     "ab", lambda ids, t, cond, key=None, mask=None: jnp.zeros((len(ids), 3)), Masking(2), 3,
    ...     4, lambda text: np.array(["ab".index(c) for c in text], np.int32),
    ...     lambda ids: "".join("ab_"[i] for i in ids), ("confidence",),
    ...     lambda name, block_size=16, start=0: Ordered())
    >>> engine, found = TextEngine(generator, slots=1), Queue()
    >>> engine.start(); engine.ready.wait()
    True
    >>> job = engine.submit(TextRequest(("ba",), "confidence", 7, temperature=0.0), found.put)
    >>> generator.decode(found.get().tokens)
    'baaa'
    >>> engine.stop()
    """

    cost = "calls"

    def __init__(
        self,
        generator: TextGenerator,
        *,
        slots: int = 8,
        queue: int = 64,
        sizes: tuple[int, ...] | None = None,
        limits: Limits | None = None,
        observe: Callable[[str, float], None] | None = None,
    ):
        super().__init__(slots, queue, limits, observe)
        self.generator = generator
        self.programs = TextPrograms(generator, slots=slots, sizes=sizes)
        shape = slots, generator.length
        self._x, self._prompt = np.zeros(shape, np.int32), np.zeros(shape, bool)
        self._lengths, self._scale = np.zeros(slots, np.int32), np.ones(slots, np.float32)
        self._words = np.zeros((slots, 2), np.uint32)
        self._drawing = np.ones((slots, 2), np.float32)

    def prepare(self, request: TextRequest, prompt: str) -> tuple[Canvas, TokenPlan]:
        """The window of a prompt, and the plan of its calls.

        **Raises** `RequestError` for what the model does not know.
        """
        generator = self.generator
        canvas = lay_out(request, prompt, generator)
        start = int(np.argmax(canvas.tokens == generator.mask_id))
        calls = request.calls or max(1, canvas.blanks // 2)
        try:
            sampler = generator.sampler(request.sampler, block_size=request.block_size, start=start)
            return canvas, sampler.plan(generator.path, calls, len(canvas.tokens))
        except ValueError as error:  # fewer calls than blocks
            raise RequestError(400, str(error), "calls") from error

    def submit(self, request: TextRequest, send: Send) -> TextJob:
        self.check_open(request.texts)
        ready = [self.prepare(request, prompt) for prompt in request.prompts]
        canvases = tuple(canvas for canvas, _ in ready)
        job = TextJob(request, send, time.monotonic() + self.limits.seconds, canvases=canvases)
        self.queue_up([
            Text(job, k * request.n + i, i, canvas, plan, canvas.tokens)
            for k, (canvas, plan) in enumerate(ready)
            for i in range(request.n)
        ])  # fmt: skip
        return job

    # The thread that writes.

    def warm_up(self, progress: Callable[[str], None]) -> None:
        self.programs.warm_up(progress)
        self.generator.decode(self.generator.encode(""))

    def begin(self, pieces: list[Text]) -> None:
        for text in pieces:
            request, tokens, i = text.job.request, text.tokens, text.slot
            self._x[i], self._x[i, : len(tokens)] = 0, tokens
            self._prompt[i] = False
            self._prompt[i, : len(tokens)] = tokens != self.generator.mask_id
            self._lengths[i], self._scale[i] = len(tokens), request.guidance
            self._words[i] = seed_words(request.seed)
            self._drawing[i] = request.temperature, request.top_p
            text.skip()

    def advance(self) -> None:
        texts = list(self._active)
        if not texts:
            return
        self._ask([text for text in texts if not text.known])
        size = fitting(self.programs.steps, len(texts))
        slots = np.zeros(size, np.int32)
        slots[: len(texts)] = [text.slot for text in texts]
        counts, plan = np.full((size, 3), -1, np.int32), blank_plan(size)
        for i, text in enumerate(texts):
            sampler = self.programs.numbers[text.job.request.sampler]
            counts[i] = sampler, text.done, text.number
            entries = jax.tree.leaves(text.row())
            for column, value in zip(jax.tree.leaves(plan), entries, strict=True):
                column[i] = value
        given = self._x[slots], plan, counts, self._words[slots], self._drawing[slots]
        x, are_numbers = self.programs.step(slots, *given)
        self.keep_time()
        for text, tokens, is_number in zip(texts, x, are_numbers, strict=False):
            self._follow(text, tokens[: len(text.tokens)].copy(), is_number)
        self.release([text for text in texts if not text.left])

    def _ask(self, texts):
        """Calls the network for texts that have changed, in as few calls as the largest size
        allows."""
        most, none = self.programs.sizes[-1], self.slots
        while texts:
            rows, targets, taken = [], [], []
            for text in texts:
                guided = text.job.request.guidance != 1
                if len(rows) + 1 + guided > most:
                    break
                targets += [(text.slot, len(rows) + guided), (none, 0)][: 1 + guided]
                rows += [(text.slot, 0), (text.slot, 1)][: 1 + guided]
                taken.append(text)
                text.calls += 1
            size = fitting(self.programs.sizes, len(rows))
            padding = size - len(rows)
            rows = np.array(rows + [(0, 0)] * padding, np.int32)
            targets = np.array(targets + [(none, 0)] * padding, np.int32)
            given = self._x.copy(), self._prompt.copy(), self._lengths.copy()
            self.programs.ask(*given, rows, targets, self._scale[rows[:, 0]])
            self.observe("rows", size - padding)
            self.observe("size", size)
            texts = texts[len(taken) :]

    def _follow(self, text, tokens, is_number):
        """What comes of a step."""
        job = text.job
        if not is_number:
            self.fail(job, 500, "the network's answer is not a number. Lower guidance.")
        text.known = bool((tokens == text.tokens).all())
        text.tokens = tokens
        self._x[text.slot, : len(tokens)] = tokens
        text.done += 1
        step = text.done
        text.skip()
        if job.request.stop and not text.known and text.left:
            # What comes after a stop is not needed.
            first = text.canvas.first(tokens, self.generator.decode)
            if cut(first, job.request.stop)[1]:
                text.done = text.steps
        if job.ended:
            return
        if not text.left:
            self.observe("texts", 1)
            job.send(Written(text.index, text.calls, tokens))
        elif job.request.live and not text.known:
            job.send(Progress(text.index, step, text.steps, text.calls, tokens))
