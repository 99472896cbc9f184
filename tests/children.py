"""Processes over loopback, each with some of the devices."""

import os
import socket
import subprocess
import sys
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
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for command in commands
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(p.returncode, *text) for p, text in zip(processes, said, strict=True)]
