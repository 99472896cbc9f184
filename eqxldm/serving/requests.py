"""What a client may ask for: a request, its limits, and the way there from JSON."""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .generator import MAP, Generator

LARGEST_SEED = 2**64 - 1
# Of other servers of this form: taken and without meaning here.
IGNORED = {"user", "quality", "style", "background", "moderation", "output_compression"}


class RequestError(Exception):
    """What is wrong with a request, as an HTTP status, one message, and the field if it is one.

    >>> RequestError(400, "n must be a number.", "n").status
    400
    """

    def __init__(self, status: int, message: str, field: str | None = None):
        super().__init__(message)
        self.status, self.message, self.field = status, message, field


@dataclass(frozen=True)
class Limits:
    """The largest of each that a request may have; seconds from its arrival to its answer.

    >>> Limits().images
    16
    """

    images: int = 16
    prompt: int = 4000
    body: int = 65_536
    guidance: float = 50.0
    seconds: float = 120.0
    previews: int = 50


@dataclass(frozen=True)
class Request:
    """One request of `n` images, in what it asks for complete.

    `previews` is how often each image's estimate is shown on the way; with `trajectory` every state
    and estimate is, and at the end the forward process.

    >>> Request("ddim", 20, 1.0, (0.0, 1.0), 7).n
    1
    """

    solver: str
    steps: int
    guidance: float
    interval: tuple[float, float]
    seed: int
    n: int = 1
    prompt: str | None = None
    label: int | None = None
    previews: int = 0
    trajectory: bool = False


@dataclass(frozen=True)
class Answer:
    """How the client wants the answer.

    >>> Answer(True, "b64_json").stream
    True
    """

    stream: bool
    form: str


def parse(body: Any, generator: Generator, limits: Limits) -> tuple[Request, Answer]:
    """A request from its JSON, already read; `RequestError` says what is wrong in one message.

    >>> from eqxldm import DDIM, Diffusion, LinearFlow, predict_x0, uniform_times
    >>> from eqxldm.serving import Defaults
    >>> generator = Generator(
    ...     "m", None, Diffusion(LinearFlow(), predict_x0), (1,), None, (2, 2), {"ddim": DDIM()},
    ...     uniform_times, Defaults("ddim", steps=8))
    >>> request, answer = parse({"n": 2, "seed": 3}, generator, Limits())
    >>> request.n, request.steps, answer.form
    (2, 8, 'b64_json')
    """
    if not isinstance(body, dict):
        raise RequestError(400, "the body must be a JSON object, such as {}.")
    fields = Fields(body)
    check_model(fields, generator.name)
    _check_size(fields.text("size", 50), generator)
    prompt = fields.text("prompt", limits.prompt)
    label, prompt = _label(fields, prompt, generator)
    defaults = generator.defaults
    solver = fields.choice("solver", generator.solver_names) or defaults.solver
    steps = fields.whole("steps", 1, generator.most_steps) or _usual_steps(solver, generator)
    guidance = fields.number("guidance", 0.0, limits.guidance)
    if guidance is not None and guidance != 1 and (solver == MAP or not generator.guided):
        raise RequestError(
            400,
            f"guidance {guidance:g}: the solver map has the guidance in it that the network was "
            "trained with. Leave it at 1."
            if solver == MAP
            else f"guidance {guidance:g}: this model has no condition to guide by. Leave it at 1.",
            "guidance",
        )
    if guidance is None:
        guidance = defaults.guidance if generator.guided and solver != MAP else 1.0
    seed = fields.whole("seed", 0, LARGEST_SEED)
    request = Request(
        solver=solver,
        steps=steps,
        guidance=guidance,
        interval=fields.interval("guidance_interval") or defaults.interval,
        seed=secrets.randbelow(2**32) if seed is None else seed,
        n=fields.whole("n", 1, limits.images) or 1,
        prompt=prompt,
        label=label,
        previews=fields.whole("partial_images", 0, limits.previews) or 0,
        trajectory=fields.flag("trajectory"),
    )
    fields.choice("output_format", ("png",))
    form = fields.choice("response_format", ("b64_json", "url")) or "b64_json"
    answer = Answer(fields.flag("stream"), form)
    if not answer.stream and (request.previews or request.trajectory):
        name = "partial_images" if request.previews else "trajectory"
        raise RequestError(400, f'{name} needs "stream": true.', name)
    if request.trajectory and request.n != 1:
        raise RequestError(400, f"trajectory shows one image, and n is {request.n}.", "n")
    fields.finish()
    return request, answer


def check_model(fields: "Fields", name: str) -> None:
    """`RequestError` for a request that names another model."""
    model = fields.text("model", 200)
    if model is not None and model != name:
        raise RequestError(404, f"there is no model {model!r}; this server has {name!r}.", "model")


def _usual_steps(solver: str, generator: Generator) -> int:
    """The default; where that is a flow map's and the solver is another, or the other way."""
    defaults = generator.defaults
    if (solver == MAP) == (defaults.solver == MAP):
        return defaults.steps
    return 1 if solver == MAP else min(20, generator.most_steps)


def _label(fields: "Fields", prompt: str | None, generator: Generator):
    """The class and the prompt; of a model of classes the prompt may be a class's name."""
    names = list(generator.labels)
    given = fields.value("label")
    if not names:
        if given is not None:
            raise RequestError(400, "label: this model has no classes.", "label")
        if prompt and not generator.takes_text:
            raise RequestError(400, "prompt: this model takes none; leave it out.", "prompt")
        return None, (prompt or "") if generator.takes_text else None
    if given is not None and prompt:
        raise RequestError(400, "give label or prompt, which names a class, and not both.", "label")
    wanted = given if given is not None else prompt or None
    if wanted is None:
        raise RequestError(400, f"which class? label is one of {_some(names)}.", "label")
    if isinstance(wanted, str) and wanted.strip() in names:
        return names.index(wanted.strip()), None
    if isinstance(wanted, str) and wanted.strip().isdecimal() and len(wanted) < 10:
        wanted = int(wanted)
    if isinstance(wanted, int) and not isinstance(wanted, bool) and 0 <= wanted < len(names):
        return wanted, None
    shown = repr(wanted)[:50]
    raise RequestError(
        400, f"label {shown}: need 0 .. {len(names) - 1}, or one of {_some(names)}.", "label"
    )


def _some(names):
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _check_size(size: str | None, generator: Generator) -> None:
    height, width = generator.size
    if size not in (None, "auto", f"{width}x{height}"):
        raise RequestError(400, f"size {_shown(size)}: this model draws {width}x{height}.", "size")


class Fields:
    """The fields of a request, each read once and checked; what is left over is unknown."""

    def __init__(self, body: Mapping[str, Any]):
        self._body, self._left = body, set(body) - IGNORED

    def value(self, name: str) -> Any:
        self._left.discard(name)
        return self._body.get(name)

    def text(self, name: str, longest: int) -> str | None:
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            raise RequestError(400, f"{name} must be text, got {_shown(value)}.", name)
        if value is not None and len(value) > longest:
            raise RequestError(
                400, f"{name} has {len(value)} characters; at most {longest} are taken.", name
            )
        return value

    def choice(self, name: str, known: tuple[str, ...]) -> str | None:
        value = self.value(name)
        if value is not None and value not in known:
            raise RequestError(
                400, f"{name} must be one of {', '.join(known)}, got {_shown(value)}.", name
            )
        return value

    def flag(self, name: str) -> bool:
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            raise RequestError(400, f"{name} must be true or false, got {_shown(value)}.", name)
        return bool(value)

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise RequestError(
                400, f"{name} must be a whole number in {low} .. {high}, got {_shown(value)}.", name
            )
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.value(name)
        if value is None:
            return None
        return _number(name, value, low, high)

    def interval(self, name: str) -> tuple[float, float] | None:
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2:
            raise RequestError(400, f"{name} must be two numbers, got {_shown(value)}.", name)
        low, high = (_number(name, v, 0.0, 1.0) for v in value)
        if not low < high:
            raise RequestError(400, f"{name} must be [low, high] with low < high.", name)
        return low, high

    def finish(self) -> None:
        if self._left:
            name = sorted(map(str, self._left))[0][:50]
            name = name.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair
            raise RequestError(400, f"there is no option {name!r}.", name)


def _number(name, value, low, high):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN is outside of everything, and no float is beyond the ends that are given.
    if not number or not low <= value <= high or not math.isfinite(value):
        raise RequestError(
            400, f"{name} must be a number in {low:g} .. {high:g}, got {_shown(value)}.", name
        )
    return float(value)


def _shown(value):
    text = str(value) if isinstance(value, float) else repr(value)
    return text if len(text) <= 50 else text[:47] + "..."
