"""What a client may ask a server of text for, and the way there from JSON."""

import secrets
from dataclasses import dataclass
from typing import Any

from ..requests import LARGEST_SEED, Fields, Limits, RequestError, check_model
from .generator import TextGenerator

STOPS = 4  # at most, of a request
LARGEST_TEMPERATURE = 100.0
# Of servers that write one token after the other: without meaning here but for these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (),
    "presence_penalty": (0,),
}


@dataclass(frozen=True)
class TextRequest:
    """One request of `n` texts for each prompt, in what it asks for complete.

    `live`: every step is told. `calls` None is one for two tokens, `max_tokens` None is all that
    the window has. With `infill` each "_" in a prompt is one token that is to be written; `suffix`
    is what comes after the text. A text ends before the first `stop` in it.

    >>> TextRequest(("in the",), "random", seed=3).texts
    1
    """

    prompts: tuple[str, ...]
    sampler: str
    seed: int
    n: int = 1
    max_tokens: int | None = None
    suffix: str = ""
    infill: bool = False
    calls: int | None = None
    block_size: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    guidance: float = 1.0
    stop: tuple[str, ...] = ()
    live: bool = False

    @property
    def texts(self) -> int:
        """Of all prompts."""
        return self.n * len(self.prompts)


@dataclass(frozen=True)
class TextAnswer:
    """How the client wants the answer.

    >>> TextAnswer(echo=True).stream
    False
    """

    stream: bool = False
    echo: bool = False
    usage: bool = False


def parse_text(
    body: Any, generator: TextGenerator, limits: Limits
) -> tuple[TextRequest, TextAnswer]:
    """A request from its JSON, already read; `RequestError` says what is wrong in one message."""
    if not isinstance(body, dict):
        raise RequestError(400, "the body must be a JSON object, such as {}.")
    fields, usual = Fields(body), generator.usual
    check_model(fields, generator.name)
    prompts = _prompts(fields, limits)
    seed = fields.whole("seed", 0, LARGEST_SEED)
    stream = fields.flag("stream")
    top_p = fields.number("top_p", 0.0, 1.0)
    if top_p == 0:
        raise RequestError(
            400, "top_p must be above 0; temperature 0 takes the likeliest.", "top_p"
        )
    number = lambda name, most, default: _or(fields.number(name, 0.0, most), default)
    request = TextRequest(
        prompts=prompts,
        sampler=fields.choice("sampler", generator.sampler_names) or usual.sampler,
        seed=secrets.randbelow(2**32) if seed is None else seed,
        n=fields.whole("n", 1, limits.images) or 1,
        max_tokens=fields.whole("max_tokens", 1, generator.length),
        suffix=fields.text("suffix", limits.body) or "",
        infill=fields.flag("infill"),
        calls=fields.whole("calls", 1, generator.most_calls),
        block_size=fields.whole("block_size", 1, generator.length)
        or min(usual.block_size, generator.length),
        temperature=number("temperature", LARGEST_TEMPERATURE, usual.temperature),
        top_p=_or(top_p, usual.top_p),
        guidance=number("guidance", limits.guidance, usual.guidance),
        stop=_stops(fields),
        live=stream,
    )
    if request.texts > limits.images:
        raise RequestError(
            400,
            f"prompt has {len(prompts)} texts and n is {request.n}: {request.texts} texts, and at "
            f"most {limits.images} are written for a request.",
            "n",
        )
    if request.infill and request.suffix:
        raise RequestError(400, "give infill, or suffix, and not both.", "suffix")
    answer = TextAnswer(stream, fields.flag("echo"), _usage(fields, stream))
    for name, values in NEUTRAL.items():
        value = fields.value(name)
        if value is not None and (isinstance(value, bool) or value not in values):
            raise RequestError(
                400, f"{name}: tokens come in any order here, and this has no meaning.", name
            )
    fields.finish()
    return request, answer


def _or(value, default):
    return default if value is None else value


def _prompts(fields: Fields, limits: Limits) -> tuple[str, ...]:
    given = fields.value("prompt")
    given = [""] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(prompt, str) for prompt in given):
        raise RequestError(400, "prompt must be a text, or a list of texts.", "prompt")
    if not given:
        raise RequestError(400, 'prompt is an empty list; "" writes from nothing.', "prompt")
    if len(given) > limits.images:
        raise RequestError(
            400, f"prompt has {len(given)} texts; at most {limits.images} are taken.", "prompt"
        )
    return tuple(given)


def _stops(fields: Fields) -> tuple[str, ...]:
    given = fields.value("stop")
    given = [] if given is None else [given] if isinstance(given, str) else given
    fits = isinstance(given, list) and len(given) <= STOPS
    if not fits or not all(isinstance(stop, str) and 0 < len(stop) <= 200 for stop in given):
        raise RequestError(
            400, f"stop must be a text, or at most {STOPS}, of 1 to 200 characters each.", "stop"
        )
    return tuple(given)


def _usage(fields: Fields, stream: bool) -> bool:
    given = fields.value("stream_options")
    if given is None:
        return False
    if not isinstance(given, dict) or not stream:
        raise RequestError(
            400, 'stream_options is an object, and needs "stream": true.', "stream_options"
        )
    return given.get("include_usage") is True
