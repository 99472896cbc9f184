"""What goes over the line: bodies read within limits, events as they come, errors in one form."""

import asyncio
import contextlib
import json
from typing import Any

from .events import Failure
from .requests import RequestError

BODY_SECONDS = 10.0  # in which a client must have sent its body
BEAT_SECONDS = 5.0  # between comments in a silent stream, which show that a client has gone
NOT_STORED = {"Cache-Control": "no-store"}
KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
    429: "rate_limit_error",
}  # fmt: skip


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
                async with asyncio.timeout(step):  # in Python 3.11 wait_for makes a task
                    return await self._queue.get()
            except TimeoutError:
                if await request.is_disconnected():
                    raise Gone from None
                waits += step
                if seconds is not None and waits >= seconds:
                    return None

    async def collect(self, request: Any, kind: type, count: int) -> list[Any]:
        """The event of this kind of each index below `count`, in order.

        **Raises** `RequestError` for a `Failure` in their place.
        """
        found: dict[int, Any] = {}
        while len(found) < count:
            event = await self.get(request)
            if isinstance(event, Failure):
                raise RequestError(event.status, event.message)
            if isinstance(event, kind):
                found[event.index] = event  # type: ignore[union-attr]
        return [found[i] for i in range(count)]

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
        async with asyncio.timeout(BODY_SECONDS):
            await read()
    except TimeoutError:
        raise RequestError(408, f"the body did not come within {BODY_SECONDS:g} s.") from None
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError, too
        reason = str(error).split("\n")[0][:100]
        raise RequestError(400, f"the body is not JSON: {reason}") from None


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
