"""FastAPI with a lock: what both servers that are compared with have in common. It needs no JAX."""

import asyncio
import base64
import signal
import socket
import time
from collections.abc import Callable
from typing import Any


def serve_one_at_a_time(make: Callable[[dict[str, Any]], bytes], begun: float) -> None:
    """Serves `make(body) -> PNG` on a free port of 127.0.0.1, and says which.

    It is called once before, so that whatever that compiles or loads is there; `begun` is the time
    from which the start is counted.
    """
    import uvicorn
    from fastapi import FastAPI, Request

    app, lock = FastAPI(), asyncio.Lock()

    async def generate(request: Request):
        body = await request.json()
        async with lock:
            data = await asyncio.to_thread(make, body)
        return {"data": [{"b64_json": base64.b64encode(data).decode()}]}

    app.post("/v1/images/generations")(generate)
    make({"label": 0, "seed": 0})
    # With the protocol named, asyncio sets TCP_NODELAY on its connections.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    seconds, port = time.monotonic() - begun, listener.getsockname()[1]
    print(f"ready after {seconds:.1f} s: http://127.0.0.1:{port}", flush=True)
    # uvicorn raises the signal that ended it again, for whoever had handled it before.
    signal.signal(signal.SIGTERM, lambda *_: None)
    config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none")
    uvicorn.Server(config).run(sockets=[listener])
