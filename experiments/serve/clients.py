"""Clients over loopback: a server in a process of its own, and threads that ask it."""

import base64
import contextlib
import json
import os
import signal
import socket
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

    def cpu_seconds(self) -> float:
        """Of all cores, that the process has used."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        user, system = text.rsplit(")", 1)[1].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def metric(self, name: str) -> float:
        """A number of /metrics."""
        status, _, body = Client(self.address).get("/metrics")
        lines = body.decode().splitlines()
        found = [float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")]
        return found[0] if status == 200 and found else float("nan")


@contextlib.contextmanager
def started(
    module: str, arguments: Sequence[str], python: str = sys.executable
) -> Iterator[Server]:
    """`python -m module arguments` on a free port, until the end of the block."""
    begun = time.monotonic()
    command = [python, "-m", module, *arguments]
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
    """One client, whose connection stays open.

    It reads what these servers answer, a length and a body, and no more of HTTP: in a measurement
    on one machine the cores are for the server.
    """

    def __init__(self, address: str, timeout: float = 120.0):
        where = urlsplit(address)
        self._place, self._timeout = (where.hostname or "", where.port or 80), timeout
        self._socket: socket.socket | None = None

    def get(self, path: str) -> tuple[int, dict[str, str], bytes]:
        return self._answer(f"GET {path}", b"")

    def ask(self, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (their names in small letters) and body of a request for images."""
        return self._answer(f"POST {PATH}", json.dumps(body).encode())

    def _answer(self, what, body):
        host, port = self._place
        if self._socket is None:
            self._socket = socket.create_connection(self._place, self._timeout)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = (
            f"{what} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._socket.sendall(head.encode() + body)
        data = self._until(b"", lambda data: b"\r\n\r\n" in data)
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        length = int(headers.get("content-length", 0))
        data = self._until(data, lambda data: len(data) >= length)
        if headers.get("connection") == "close":
            self.close()
        return int(first.split()[1]), headers, data

    def _until(self, data, complete):
        assert self._socket is not None
        while not complete(data):
            more = self._socket.recv(1 << 16)
            if not more:
                self.close()
                raise ConnectionError("the server closed the connection.")
            data += more
        return data

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def picture(body: bytes) -> bytes:
    """The first picture of an answer, as PNG."""
    return base64.b64decode(json.loads(body)["data"][0]["b64_json"])


@dataclass
class Load:
    """What some clients saw: the seconds of each answer that was 200, and how many of each."""

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    wall: float = 0.0
    cpu_seconds: float = 0.0  # of the clients themselves

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
    cpu = time.process_time()
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
    found.wall, found.cpu_seconds = time.monotonic() - begun, time.process_time() - cpu
    return found
