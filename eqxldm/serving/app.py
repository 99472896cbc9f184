"""The HTTP interface: images by JSON, previews as server-sent events, and the page."""

import asyncio
import contextlib
import hmac
import json
import time
from base64 import b64encode
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .engine import Engine
from .events import Failure, Forward, Picture, Preview, QueueFull
from .metrics import Metrics
from .pictures import Shelf
from .requests import Answer, Request as Wanted, RequestError, parse

BODY_SECONDS = 10.0  # in which a client must have sent its body
BEAT_SECONDS = 5.0  # between comments in a silent stream, which show that a client has gone
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
}
HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
        b"frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
    429: "rate_limit_error",
}  # fmt: skip


@dataclass(frozen=True)
class Access:
    """Who may ask: with a `token`, who sends it as `Authorization: Bearer`.

    `hosts` are the names that a request may call the server by, without the port; None is any. On a
    loopback address it keeps out pages of other sites that point a name of theirs at it.

    >>> Access(token="abc").hosts is None
    True
    """

    token: str | None = None
    hosts: tuple[str, ...] | None = None


def make_app(engine: Engine, metrics: Metrics | None = None, access: Access | None = None) -> Any:
    """The FastAPI application of an engine, which is started and stopped elsewhere.

    `POST /v1/images/generations`, `GET /v1/models`, `/v1/images/files/{name}`, `/healthz`,
    `/readyz`, `/metrics` and the page at `/`. What a request says never becomes a path of the file
    system: the page is read once, here, and pictures are kept in memory.

    **Raises** `ImportError` without the extra "serve".
    """
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

    metrics, access = metrics or Metrics(), access or Access()
    metrics.watch(engine)
    shelf, generator = Shelf(), engine.generator
    page = resources.files("eqxldm.serving") / "page"
    # Its pages of documentation load scripts from elsewhere.
    app = FastAPI(title="eqxldm", docs_url=None, redoc_url=None, openapi_url=None)

    app.add_middleware(Guard, access=access)

    def failed(status: int, message: str, field: str | None = None, after: int | None = None):
        headers = {} if after is None else {"Retry-After": str(after)}
        return JSONResponse(error_body(status, message, field), status, headers)

    async def unknown(request: Request, error: Exception):
        status = getattr(error, "status_code", 404)
        detail = getattr(error, "detail", "Not Found")
        return failed(status, f"{request.method} {request.url.path[:200]}: {detail}.")

    async def broken(request: Request, error: Exception):
        return failed(500, "the server failed; its log says why.")

    for status in (404, 405):
        app.add_exception_handler(status, unknown)
    app.add_exception_handler(500, broken)

    @app.get("/healthz")
    async def health():
        alive = engine.failed is None
        return PlainTextResponse("ok\n" if alive else "the engine ended\n", 200 if alive else 500)

    @app.get("/readyz")
    async def ready():
        if engine.ready.is_set():
            return PlainTextResponse("ready\n")
        return failed(503, "the programs are being compiled; come again.", after=2)

    @app.get("/metrics")
    async def show_metrics():
        return PlainTextResponse(metrics.text())

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [describe(engine)]}

    @app.get("/v1/images/files/{name}")
    async def file(name: str):
        data = shelf.get(name.removesuffix(".png"))
        if data is None:
            return failed(404, "there is no such picture, or it is no longer kept.")
        return Response(data, media_type="image/png", headers={"Cache-Control": "private"})

    def page_of(data, media):
        async def give():
            return Response(data, media_type=media, headers={"Cache-Control": "no-cache"})

        return give

    for path, (name, media) in PAGE.items():
        app.get(path)(page_of((page / name).read_bytes(), media))

    @app.post("/v1/images/generations")
    async def generate(request: Request):
        begun = time.monotonic()
        try:
            body = await read_json(request, engine.limits.body)
            wanted, answer = parse(body, generator, engine.limits)
            events = Events()
            job = await asyncio.to_thread(engine.submit, wanted, events.put)
        except RequestError as error:
            metrics.requests.labels(str(error.status)).inc()
            after = error.retry_after if isinstance(error, QueueFull) else None
            return failed(error.status, error.message, error.field, after)
        given = request, events, job, wanted, answer

        def finished(status: int) -> None:
            metrics.requests.labels(str(status)).inc()
            if status == 200:
                metrics.latency.observe(time.monotonic() - begun)

        if answer.stream:
            stream = streamed(given, shelf, generator.name, finished)
            return StreamingResponse(stream, media_type="text/event-stream", headers=NOT_STORED)
        try:
            pictures = await collected(given)
        except RequestError as error:
            finished(error.status)
            return failed(error.status, error.message)
        finally:
            job.cancel()
        finished(200)
        data = [entry(shelf, answer, picture, wanted) for picture in pictures]
        return JSONResponse({**about(generator.name, wanted), "data": data}, headers=NOT_STORED)

    return app


class Guard:
    """Lets those in who may ask, and puts `HEADERS` on every answer: an ASGI application."""

    def __init__(self, app: Any, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return

        async def with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        refusal = self._refusal(dict(scope["headers"]), scope["path"])
        if refusal is None:
            await self._app(scope, receive, with_headers)
            return
        status, message = refusal
        body = json.dumps(error_body(status, message)).encode()
        headers = [(b"content-type", b"application/json")]
        headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
        start = {"type": "http.response.start", "status": status, "headers": headers}
        await with_headers(start)
        await send({"type": "http.response.body", "body": body})

    def _refusal(self, headers, path):
        access = self._access
        host = headers.get(b"host", b"").decode("latin-1")
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if access.hosts is not None and name not in access.hosts:
            return 421, f"this server is not called {host[:100]!r}."
        # A picture's name cannot be guessed, and an <img> sends no token.
        open_to_all = path.startswith("/v1/images/files/") or not (
            path.startswith("/v1/") or path == "/metrics"
        )
        if access.token is None or open_to_all:
            return None
        given = headers.get(b"authorization", b"")
        if hmac.compare_digest(given, b"Bearer " + access.token.encode()):
            return None
        return 401, "this server needs its token: Authorization: Bearer TOKEN."


NOT_STORED = {"Cache-Control": "no-store"}


class Events:
    """What an engine sends, from its thread to the event loop that made this."""

    def __init__(self):
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()

    def put(self, event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def get(self, request: Any, seconds: float | None = None):
        """The next event; None after so many seconds. **Raises** `Gone` if the client has left."""
        waits = 0.0
        while True:
            step = 0.25 if seconds is None else min(seconds, 0.25)
            try:
                return await asyncio.wait_for(self._queue.get(), step)
            except TimeoutError:
                if await request.is_disconnected():
                    raise Gone from None
                waits += step
                if seconds is not None and waits >= seconds:
                    return None

    @property
    def size(self) -> int:
        return self._queue.qsize()


class Gone(RequestError):
    """The client has left."""

    def __init__(self):
        super().__init__(499, "the client has gone.")


async def read_json(request: Any, most: int):
    """The body of a request, read within limits of size and time."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # which pages of other sites cannot send without being asked
        raise RequestError(415, "send JSON, with Content-Type: application/json.")
    too_long = RequestError(413, f"the body is longer than {most} bytes.")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_long
    data = bytearray()

    async def read():
        async for chunk in request.stream():
            data.extend(chunk)
            if len(data) > most:
                raise too_long

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except TimeoutError:
        raise RequestError(408, f"the body did not come within {BODY_SECONDS:g} s.") from None
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError, too
        reason = str(error).split("\n")[0][:100]
        raise RequestError(400, f"the body is not JSON: {reason}") from None


async def collected(given: Any):
    """All pictures of a request, in order."""
    request, events, _, wanted, _ = given
    found: dict[int, Picture] = {}
    while len(found) < wanted.n:
        event = await events.get(request)
        if isinstance(event, Failure):
            raise RequestError(event.status, event.message)
        if isinstance(event, Picture):
            found[event.index] = event
    return [found[i] for i in range(wanted.n)]


async def streamed(given: Any, shelf: Shelf, model: str, finished: Any):
    """Previews, pictures and the forward process as server-sent events, `[DONE]` at the end."""
    request, events, job, wanted, answer = given
    pictures, ends, status = 0, False, 499
    try:
        yield sse({"type": "image_generation.started", **about(model, wanted)})
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
                yield sse({**kind, **entry(shelf, answer, event, wanted)})
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


def error_body(status: int, message: str, field: str | None = None) -> dict[str, Any]:
    """The form of every error.

    >>> error_body(400, "n is too large.", "n")["error"]["param"]
    'n'
    """
    kind = KINDS.get(status, "server_error" if status >= 500 else KINDS[400])
    return {"error": {"message": message, "type": kind, "param": field, "code": status}}


def sse(event: dict[str, Any]) -> bytes:
    """An event of a stream.

    >>> sse({"a": 1})
    b'data: {"a": 1}\\n\\n'
    """
    return f"data: {json.dumps(event)}\n\n".encode()
