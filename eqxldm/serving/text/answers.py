"""Answers about text: what a request for completions is answered with, at once or as a stream."""

import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from ..events import Failure
from ..exchange import BEAT_SECONDS, Gone, error_body, sse
from .canvas import Canvas, cut
from .engine import Progress, TextEngine, TextJob, Written
from .requests import TextAnswer, TextRequest, parse_text


class TextAnswers:
    """`POST /v1/completions` of an engine.

    A stream sends, as servers that write from left to right do, in `text` what is certain to
    follow what was sent before; and in `shown` the whole text as it stands, "_" being what is not
    written yet.
    """

    route = "/v1/completions"

    def __init__(self, engine: TextEngine):
        self.engine = engine
        self.page = {"/": "text.html", "/text.js": "text.js"}

    def add_routes(self, app: Any) -> None:
        """No more than the one."""

    def parse(self, body: Any) -> tuple[TextRequest, TextAnswer]:
        return parse_text(body, self.engine.generator, self.engine.limits)

    def describe(self) -> dict[str, Any]:
        """The model, with what a request may say: what the page is made from."""
        generator, limits, usual = (
            self.engine.generator,
            self.engine.limits,
            self.engine.generator.usual,
        )
        return {
            "id": generator.name, "object": "model", "owned_by": "eqxldm",
            "context": generator.length, "samplers": list(generator.sampler_names),
            "defaults": {
                "sampler": usual.sampler, "block_size": usual.block_size,
                "temperature": usual.temperature, "top_p": usual.top_p, "guidance": usual.guidance,
            },
            "limits": {
                "n": limits.images, "calls": generator.most_calls, "guidance": limits.guidance,
                "prompt": limits.body,
            },
        }  # fmt: skip

    async def collected(self, given: Any) -> dict[str, Any]:
        """The answer with all texts of a request, in order."""
        request, events, job, wanted, answer = given
        decode = self.engine.generator.decode
        choices = [
            Choice(i, job, answer, decode).finished(written)
            for i, written in enumerate(await events.collect(request, Written, wanted.texts))
        ]
        return {**self._about(wanted), "choices": choices, "usage": usage(job)}

    async def streamed(self, given: Any, finished: Callable[[int], None]) -> AsyncIterator[bytes]:
        """The texts as they come, as server-sent events, `[DONE]` at the end."""
        request, events, job, wanted, answer = given
        decode, about, status, left = (
            self.engine.generator.decode,
            self._about(wanted),
            499,
            wanted.texts,
        )
        choices = [Choice(i, job, answer, decode) for i in range(wanted.texts)]
        try:
            for choice in choices:
                yield sse({**about, "choices": [choice.begun()]})
            while left:
                event = await events.get(request, BEAT_SECONDS)
                if event is None:
                    yield b": still writing\n\n"
                elif isinstance(event, Failure):
                    status = event.status
                    yield sse({"type": "error", **error_body(event.status, event.message)})
                    return
                elif isinstance(event, Progress):
                    # A client that reads slowly sees fewer of them.
                    if events.size < 4 * wanted.texts:
                        yield sse({**about, "choices": [choices[event.index].shown(event)]})
                elif isinstance(event, Written):
                    left -= 1
                    yield sse({**about, "choices": [choices[event.index].finished(event)]})
            if answer.usage:
                yield sse({**about, "choices": [], "usage": usage(job)})
            status = 200
            yield b"data: [DONE]\n\n"
        except Gone:
            return
        finally:  # also where the client has gone
            job.cancel()
            finished(status)

    def _about(self, wanted: TextRequest) -> dict[str, Any]:
        """What is told of a request: what it left out has been filled in."""
        return {
            "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion",
            "created": int(time.time()), "model": self.engine.generator.name, "seed": wanted.seed,
            "sampler": wanted.sampler, "temperature": wanted.temperature, "top_p": wanted.top_p,
            "guidance": wanted.guidance,
        }  # fmt: skip


class Choice:
    """One text of a request, and how much of it was sent.

    >>> import numpy as np
    >>> class Asked:
    ...     request = TextRequest(("a",), "random", 0)
    ...     canvases = (Canvas(np.array([0, 2, 2]), 1, 3, 2),)
    >>> letters = lambda ids: "".join("ab_"[i] for i in ids)
    >>> choice = Choice(0, Asked(), TextAnswer(), letters)
    >>> shown = choice.shown(Progress(0, 1, 2, 1, np.array([0, 1, 2])))
    >>> shown["text"], shown["shown"], choice.finished(Written(0, 2, np.array([0, 1, 0])))["text"]
    ('b', 'b_', 'a')
    """

    def __init__(
        self, index: int, job: TextJob | Any, answer: TextAnswer, decode: Callable[[Any], str]
    ):
        request = job.request
        self._index, self._answer, self._decode, self._sent = index, answer, decode, ""
        self._stop, number = request.stop, index // request.n
        self._canvas: Canvas = job.canvases[number]
        echoed = answer.echo and not request.infill  # which has the prompt in it
        self._head = request.prompts[number] if echoed else ""

    def begun(self) -> dict[str, Any]:
        """As the text stands at first."""
        return self._choice("", None, self._shown(self._canvas.tokens))

    def shown(self, event: Progress) -> dict[str, Any]:
        """As it stands after a step."""
        first, is_cut = cut(self._canvas.first(event.tokens, self._decode), self._stop)
        if not is_cut and self._stop:  # the beginning of a stop may stand at the end
            first = first[: max(0, len(first) + 1 - max(map(len, self._stop)))]
        more = self._more(self._head + first)
        found = self._choice(more, None, self._shown(event.tokens))
        return found | {"step": event.step, "of": event.of, "calls": event.calls}

    def finished(self, event: Written) -> dict[str, Any]:
        """The text, or what of it was not sent."""
        text, is_cut = cut(self._canvas.shown(event.tokens, self._decode), self._stop)
        more = self._more(self._head + text)
        shown = self._head + text if self._answer.stream else None
        found = self._choice(more, "stop" if is_cut else "length", shown)
        return found | {"calls": event.calls}

    def _shown(self, tokens):
        return self._head + self._canvas.shown(tokens, self._decode)

    def _more(self, text):
        if not text.startswith(self._sent):  # a tokenizer that reads more tokens in another way
            return ""
        more = text[len(self._sent) :]
        self._sent = text
        return more

    def _choice(self, text, reason, shown):
        found = {"index": self._index, "text": text, "logprobs": None, "finish_reason": reason}
        return found if shown is None else found | {"shown": shown}


def usage(job: TextJob) -> dict[str, int]:
    """The tokens of a request: those that were there, and those that were written."""
    written = job.request.n * sum(canvas.blanks for canvas in job.canvases)
    prompts = sum(len(canvas.tokens) - canvas.blanks for canvas in job.canvases)
    return {
        "prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written,
    }  # fmt: skip
