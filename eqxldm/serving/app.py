"""The HTTP interface: what all servers have in common, and a route for images or for text."""

import asyncio
import time
from importlib import resources
from typing import Any

from .access import Access as Access, Guard
from .engine import Engine
from .events import QueueFull
from .exchange import NOT_STORED, Events, error_body, read_json
from .image_answers import ImageAnswers
from .metrics import Metrics
from .queueing import AbstractEngine
from .requests import RequestError
from .text import TextAnswers, TextEngine

SHARED = {"/common.js": "common.js", "/style.css": "style.css"}  # of both pages
MEDIA = {"html": "text/html", "js": "text/javascript", "css": "text/css"}


def make_app(
    engine: AbstractEngine, metrics: Metrics | None = None, access: Access | None = None
) -> Any:
    """The FastAPI application of an engine, which is started and stopped elsewhere.

    `POST /v1/images/generations` or `/v1/completions`, by what the engine makes; `GET /v1/models`,
    `/healthz`, `/readyz`, `/metrics` and the page at `/`. What a request says never becomes a path
    of the file system: the page is read once, here, and pictures are kept in memory.

    **Raises** `ImportError` without the extra "serve".
    """
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

    metrics, access = metrics or Metrics(), access or Access()
    metrics.watch(engine)
    answers = answers_of(engine)
    page = resources.files("eqxldm.serving") / "page"
    # Its pages of documentation load scripts from elsewhere.
    app = FastAPI(title="eqxldm", docs_url=None, redoc_url=None, openapi_url=None)

    app.add_middleware(Guard, access=access)

    def failed(status: int, message: str, field: str | None = None, after: int | None = None):
        headers = {} if after is None else {"Retry-After": str(after)}
        if status in (408, 413):  # the rest of the body is not waited for
            headers["Connection"] = "close"
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
        return {"object": "list", "data": [answers.describe()]}

    def page_of(data, media):
        async def give():
            return Response(data, media_type=media, headers={"Cache-Control": "no-cache"})

        return give

    for path, name in (answers.page | SHARED).items():
        media = f"{MEDIA[name.split('.')[-1]]}; charset=utf-8"
        app.get(path)(page_of((page / name).read_bytes(), media))
    answers.add_routes(app)

    async def generate(request: Request):
        begun = time.monotonic()
        try:
            body = await read_json(request, engine.limits.body)
            wanted, answer = answers.parse(body)
            events = Events()
            if engine.is_quick(wanted):  # quicker than a thread is woken
                job = engine.submit(wanted, events.put)
            else:
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
            stream = answers.streamed(given, finished)
            return StreamingResponse(stream, media_type="text/event-stream", headers=NOT_STORED)
        try:
            found = await answers.collected(given)
        except RequestError as error:
            finished(error.status)
            return failed(error.status, error.message)
        finally:
            job.cancel()
        finished(200)
        return JSONResponse(found, headers=NOT_STORED)

    # Without FastAPI's reading of parameters, of which there are none.
    app.add_route(answers.route, generate, methods=["POST"])
    return app


def answers_of(engine: AbstractEngine) -> ImageAnswers | TextAnswers:
    """What answers the requests of an engine."""
    if isinstance(engine, TextEngine):
        return TextAnswers(engine)
    assert isinstance(engine, Engine)
    return ImageAnswers(engine)
