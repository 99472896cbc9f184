"""Clients over loopback: a server in a process of its own, and threads that ask it."""

import base64
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ..train.terminal import UserError

PATH = "/v1/images/generations"
READY_SECONDS = 300.0


@dataclass
class Server:
    """A server that was started: its address, its process, and how long it took to be ready."""

    address: str
    process: subprocess.Popen
    ready_seconds: float

    def memory(self) -> int:
        """Bytes that the process holds in memory."""
        text = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def metric(self, name: str) -> float:
        """A number of /metrics."""
        status, _, body = Client(self.address).get("/metrics")
        lines = body.decode().splitlines()
        found = [float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")]
        return found[0] if status == 200 and found else float("nan")


@contextlib.contextmanager
def started(module: str, arguments: Sequence[str]) -> Iterator[Server]:
    """`python -m module arguments` on a free port, until the end of the block."""
    begun = time.monotonic()
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield Server(_address(process), process, time.monotonic() - begun)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _address(process):
    """What the server says when it is ready; its other lines go to our own output."""
    for line in process.stdout:
        if line.startswith("ready after"):
            threading.Thread(target=_drain, args=(process.stdout,), daemon=True).start()
            return line.split()[-1]
    raise UserError(f"the server ended with code {process.wait()}.")


def _drain(stream):
    with contextlib.suppress(ValueError):
        for _ in stream:
            pass


class Client:
    """One client, whose connection stays open."""

    def __init__(self, address: str, timeout: float = 120.0):
        where = urlsplit(address)
        self._connection = http.client.HTTPConnection(
            where.hostname or "", where.port, timeout=timeout
        )

    def get(self, path: str) -> tuple[int, Any, bytes]:
        self._connection.request("GET", path)
        return self._read()

    def ask(self, body: dict[str, Any]) -> tuple[int, Any, bytes]:
        """Status, headers and body of a request for images."""
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", PATH, json.dumps(body), headers)
        return self._read()

    def _read(self):
        answer = self._connection.getresponse()
        return answer.status, answer.headers, answer.read()

    def close(self) -> None:
        self._connection.close()


def picture(body: bytes) -> bytes:
    """The first picture of an answer, as PNG."""
    return base64.b64decode(json.loads(body)["data"][0]["b64_json"])


@dataclass
class Load:
    """What some clients saw: the seconds of each answer that was 200, and how many of each."""

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    wall: float = 0.0

    def percentile(self, share: float) -> float:
        """In milliseconds."""
        return 1000 * float(np.percentile(self.seconds, share)) if self.seconds else float("nan")

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.seconds) / self.wall


def load(
    address: str, clients: int, body: Any, *, seconds: float, most: int = 100_000, seen: Any = None
) -> Load:
    """Clients that ask again as soon as they have an answer, for some seconds.

    `body(i)` is request `i`, at most `most` of them; `seen(i, answer)` gets what came for it.
    """
    found, lock, begun = Load(), threading.Lock(), time.monotonic()
    numbers = iter(range(most))

    def client():
        connection = Client(address)
        while time.monotonic() - begun < seconds:
            with lock:
                number = next(numbers, None)
            if number is None:
                break
            start = time.monotonic()
            try:
                status, _, answer = connection.ask(body(number))
            except OSError:
                status, answer = 0, b""
                connection.close()
            taken = time.monotonic() - start
            with lock:
                found.statuses[status] = found.statuses.get(status, 0) + 1
                if status == 200:
                    found.seconds.append(taken)
            if status == 200 and seen is not None:
                seen(number, answer)
            if status == 429:
                time.sleep(0.02)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.wall = time.monotonic() - begun
    return found
