"""Connections to slow clients: requests must arrive, and answers be taken, within a time."""

import asyncio
from typing import Any

HEAD_SECONDS = 10.0  # in which the head of a request must have come
TAKE_SECONDS = 30.0  # in which a client must take what waits to be sent
LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def bounded_protocol() -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, which has a bound for idle connections alone, with two more.

    A connection on which no request has begun is closed, with a 408, when the head of one has not
    come `HEAD_SECONDS` after its first byte, or after the connection was made. (The body has
    `exchange.BODY_SECONDS`.) One whose answers pile up here for `TAKE_SECONDS`, as the client does
    not read them, is cut off: its request then counts as given up.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol

    class Bounded(base):
        _head: asyncio.TimerHandle | None = None
        _take: asyncio.TimerHandle | None = None

        def connection_made(self, transport):
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data):
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._await_head()
            else:
                self._head = _cancelled(self._head)

        def pause_writing(self):
            super().pause_writing()
            if self._take is None:
                loop = asyncio.get_running_loop()
                self._take = loop.call_later(TAKE_SECONDS, self.transport.abort)

        def resume_writing(self):
            super().resume_writing()
            self._take = _cancelled(self._take)

        def connection_lost(self, exc):
            self._head, self._take = _cancelled(self._head), _cancelled(self._take)
            super().connection_lost(exc)

        def _await_head(self):
            if self._head is None:
                loop = asyncio.get_running_loop()
                self._head = loop.call_later(HEAD_SECONDS, self._late)

        def _late(self):
            if not self.transport.is_closing():
                self.transport.write(LATE)
                self.transport.close()

    return Bounded


def _cancelled(timer):
    if timer is not None:
        timer.cancel()
