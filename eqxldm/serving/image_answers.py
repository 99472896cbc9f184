"""Answers about images: what a request for some is answered with, at once or as a stream."""

import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from typing import Any

from .engine import Engine
from .events import Failure, Forward, Picture, Preview
from .exchange import BEAT_SECONDS, Gone, error_body, sse
from .pictures import Shelf
from .requests import Answer, Request as Wanted, parse


class ImageAnswers:
    """`POST /v1/images/generations` of an engine."""

    route = "/v1/images/generations"

    def __init__(self, engine: Engine):
        self.engine, self.shelf = engine, Shelf()
        self.page = {"/": "index.html", "/app.js": "app.js"}

    def add_routes(self, app: Any) -> None:
        """`/v1/images/files/{name}`: pictures that are kept in memory."""
        from fastapi import Response
        from fastapi.responses import JSONResponse

        @app.get("/v1/images/files/{name}")
        async def file(name: str):
            data = self.shelf.get(name.removesuffix(".png"))
            if data is None:
                gone = "there is no such picture, or it is no longer kept."
                return JSONResponse(error_body(404, gone), 404)
            return Response(data, media_type="image/png", headers={"Cache-Control": "private"})

    def parse(self, body: Any) -> tuple[Wanted, Answer]:
        return parse(body, self.engine.generator, self.engine.limits)

    def describe(self) -> dict[str, Any]:
        return describe(self.engine)

    async def collected(self, given: Any) -> dict[str, Any]:
        """The answer with all pictures of a request, in order."""
        request, events, _, wanted, answer = given
        pictures = await events.collect(request, Picture, wanted.n)
        data = [entry(self.shelf, answer, picture, wanted) for picture in pictures]
        return {**about(self.engine.generator.name, wanted), "data": data}

    async def streamed(self, given: Any, finished: Callable[[int], None]) -> AsyncIterator[bytes]:
        """Previews, pictures and the forward process as server-sent events, `[DONE]` at the end."""
        request, events, job, wanted, answer = given
        pictures, ends, status = 0, False, 499
        try:
            yield sse(
                {"type": "image_generation.started", **about(self.engine.generator.name, wanted)}
            )
            while not ends:
                event = await events.get(request, BEAT_SECONDS)
                if event is None:
                    yield b": still drawing\n\n"
                elif isinstance(event, Failure):
                    status = event.status
                    yield sse({"type": "error", **error_body(event.status, event.message)})
                    return
                elif isinstance(event, Preview):
                    # A client that reads slowly sees fewer of them.
                    if events.size < 4 * wanted.n or wanted.trajectory:
                        yield sse(preview(event))
                elif isinstance(event, Picture):
                    pictures += 1
                    kind = {"type": "image_generation.completed"}
                    yield sse({**kind, **entry(self.shelf, answer, event, wanted)})
                elif isinstance(event, Forward):
                    frames = [b64encode(frame).decode() for frame in event.frames]
                    yield sse({"type": "forward", "times": event.times, "frames": frames})
                ends = isinstance(event, Forward) if wanted.trajectory else pictures == wanted.n
            status = 200
            yield b"data: [DONE]\n\n"
        except Gone:
            return
        finally:  # also where the client has gone
            job.cancel()
            finished(status)


def preview(event: Preview) -> dict[str, Any]:
    """A preview as an event."""
    found: dict[str, Any] = {
        "type": "image_generation.partial_image", "index": event.index, "step": event.step,
        "of": event.of, "time": round(event.time, 6),
        "b64_json": b64encode(event.estimate).decode(),
    }  # fmt: skip
    if event.state is not None:
        found["state_b64_json"] = b64encode(event.state).decode()
    return found


def entry(shelf: Shelf, answer: Answer, picture: Picture, wanted: Wanted) -> dict[str, Any]:
    """A finished picture, in the form that was asked for."""
    found: dict[str, Any] = {"index": picture.index, "seed": wanted.seed}
    if answer.form == "url":
        return found | {"url": f"/v1/images/files/{shelf.put(picture.data)}.png"}
    return found | {"b64_json": b64encode(picture.data).decode()}


def about(model: str, wanted: Wanted) -> dict[str, Any]:
    """What is told of a request: what it left out has been filled in."""
    return {
        "created": int(time.time()), "model": model, "seed": wanted.seed, "steps": wanted.steps,
        "guidance": wanted.guidance, "solver": wanted.solver, "label": wanted.label,
    }  # fmt: skip


def describe(engine: Engine) -> dict[str, Any]:
    """The model, with what a request may say: what the page is made from."""
    generator, limits, defaults = engine.generator, engine.limits, engine.generator.defaults
    height, width = generator.size
    return {
        "id": generator.name, "object": "model", "owned_by": "eqxldm", "size": f"{width}x{height}",
        "takes_text": generator.takes_text, "labels": list(generator.labels),
        "guided": generator.guided, "solvers": list(generator.solver_names),
        "defaults": {
            "solver": defaults.solver, "steps": defaults.steps, "guidance": defaults.guidance,
            "guidance_interval": list(defaults.interval),
        },
        "limits": {
            "n": limits.images, "steps": generator.most_steps, "guidance": limits.guidance,
            "prompt": limits.prompt,
        },
    }  # fmt: skip
