"""Who may ask a server, and by which name: a token, and the names of the host."""

import hmac
import json
from dataclasses import dataclass
from typing import Any

from .exchange import error_body

HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
        b"frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


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
