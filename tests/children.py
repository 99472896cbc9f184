"""Processes over loopback, each with some of the devices."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TIMEOUT = 150  # seconds


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_together(*commands, devices: int) -> list[Ended]:
    """Runs Python with each of the arguments at once; all are killed if one takes too long."""
    count = f"--xla_force_host_platform_device_count={devices}"  # of two, the last one counts
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}"}
    env = os.environ | flags | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    ended, begin = [], time.monotonic()
    with contextlib.ExitStack() as stack:
        started = []
        for command in commands:
            # Files, because a pipe that nobody reads yet can be full.
            out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], env=env, stdout=out, stderr=err
            )
            stack.callback(process.kill)
            started.append((process, out, err))
        for process, out, err in started:
            code = process.wait(timeout=TIMEOUT - (time.monotonic() - begin))
            texts = [file.seek(0) or file.read() for file in (out, err)]
            ended.append(Ended(code, *texts))
    return ended
