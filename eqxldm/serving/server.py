"""`serve`: one process with an engine and its HTTP server, from the port to SIGTERM."""

import contextlib
import ipaddress
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from .access import Access
from .app import make_app
from .connections import bounded_protocol
from .metrics import Metrics
from .queueing import AbstractEngine

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
GRACE = 5  # seconds that requests have to end after SIGTERM


def bind(host: str, port: int) -> socket.socket:
    """A socket on this address; `OSError` with what to do where that is not possible.

    >>> with bind("127.0.0.1", 0) as found:
    ...     found.getsockname()[1] > 0
    True
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY on its connections: without it the body
    # of an answer waits 40 ms for the client to acknowledge the headers.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(128)  # so that a second server on this port is refused at once
    except OSError as error:
        found.close()
        reason = error.strerror or str(error)
        raise OSError(
            error.errno, f"{host}:{port} cannot be served: {reason}. Take another PORT or HOST."
        ) from None
    return found


def access_for(host: str, token: str | None) -> Access:
    """On a loopback address only its own names are answered to."""
    if host == "localhost":
        return Access(token, LOOPBACK)
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return Access(token, (*LOOPBACK, host))
    return Access(token)


def settings(app: Any) -> Any:
    """How uvicorn is to serve an application."""
    import uvicorn

    return uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=30, server_header=False, lifespan="off", ws="none",
        http=bounded_protocol(),
    )  # fmt: skip


def serve(
    engine: AbstractEngine,
    listener: socket.socket,
    *,
    metrics: Metrics,
    access: Access | None = None,
    say: Callable[[str], Any] = print,
) -> int:
    """Serves an engine on a bound socket until SIGTERM, SIGINT or SIGHUP; returns 0, or 1 if it
    failed.

    It answers at once: `/readyz` says when the programs are compiled. At the end requests have a
    few seconds to finish; what is left is told that the server stops.
    """
    import uvicorn

    host, port = listener.getsockname()[:2]
    app = make_app(engine, metrics, access)
    config = settings(app)
    server, begun = uvicorn.Server(config), time.monotonic()
    engine.start()

    def watch():
        while not engine.ready.wait(0.2):
            if engine.failed is not None or server.should_exit:
                server.should_exit = True
                return
        shown = f"[{host}]" if ":" in host else host
        say(f"ready after {time.monotonic() - begun:.1f} s: http://{shown}:{port}")
        while not server.should_exit:
            if engine.failed is not None:
                server.should_exit = True
            time.sleep(0.2)
        # The end of a stream waits for its images: those have a little time, too.
        time.sleep(min(GRACE - 1, 2))
        engine.stop()

    main = threading.current_thread() is threading.main_thread()
    # uvicorn raises the signal again when it is done, for whoever had handled it before: us.
    before = {s: signal.signal(s, lambda *_: None) for s in STOPS} if main else {}
    if main:  # of which uvicorn knows nothing

        def hang_up(*_):
            server.should_exit = True

        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as below `nohup`
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, hang_up)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        server.run(sockets=[listener])
    finally:
        engine.stop()
        metrics.close()
        for s, handler in before.items():
            signal.signal(s, handler)
    return 0 if engine.failed is None else 1


STOPS = (signal.SIGTERM, signal.SIGINT)
