"""A signal is one line and an exit code, wherever in the program it comes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from experiments.train import terminal
from experiments.train.terminal import SIGNALS, Signals, run_main

from children import ROOT, run_together


@pytest.fixture
def handlers():
    before = [signal.getsignal(s) for s in SIGNALS]
    yield
    for signum, handler in zip(SIGNALS, before, strict=True):
        signal.signal(signum, handler)


class Last:
    """Its process gets a signal while Python calls `__del__`, where exceptions are dropped."""

    def __init__(self, signum):
        self.signum = signum

    def __del__(self):
        os.kill(os.getpid(), self.signum)
        time.sleep(0.001)  # the handler runs in here


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost(signum, handlers, capsys):
    def main():
        Signals()
        left = Last(signum)
        del left
        time.sleep(5)

    begin = time.monotonic()
    assert run_main(main) == 128 + signum
    assert time.monotonic() - begin < 4
    name = signal.Signals(signum).name
    assert capsys.readouterr().err == f"stopped by {name}; the same command goes on from here.\n"


def test_nor_one_that_comes_while_python_says_what_it_dropped(handlers, capsys):
    def main():
        Signals()
        before, first = terminal._send_later, iter([0.2])

        def slow(signum):  # the hook calls it
            before(signum)
            time.sleep(next(first, 0))

        with mock.patch.object(terminal, "_send_later", slow):
            left = Last(signal.SIGTERM)
            del left
            time.sleep(5)

    begin = time.monotonic()
    assert run_main(main) == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 4
    assert capsys.readouterr().err.startswith("stopped by SIGTERM;")


@pytest.mark.parametrize("signum", SIGNALS)
def test_what_somebody_else_catches_is_sent_again(signum, handlers, capsys, monkeypatch):
    """Where no training loop follows, as while samples are drawn."""
    monkeypatch.setattr(terminal, "LOOK", 0.05)

    def main():
        Signals()
        try:
            os.kill(os.getpid(), signum)
            time.sleep(0.01)
        except BaseException:  # as some library may
            pass
        Signals()  # a command's own, which knows nothing of it
        time.sleep(5)

    begin = time.monotonic()
    assert run_main(main) == 128 + signum
    assert time.monotonic() - begin < 4
    assert capsys.readouterr().err.count("stopped by") == 1


def test_what_is_saved_meanwhile_is_not_disturbed(handlers, monkeypatch):
    """Nor what comes after it in this process."""
    monkeypatch.setattr(terminal, "LOOK", 0.05)
    saved = []

    def main():
        Signals()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        finally:
            try:
                raise ValueError  # of which nobody hears
            except ValueError:
                time.sleep(0.4)
            saved.append("all")

    assert run_main(main) == 143 and saved == ["all"]
    assert run_main(lambda: time.sleep(0.4)) == 0


def test_a_hangup_that_is_to_be_ignored_is(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = Signals()
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.001)
    assert signals.pending is None


IMPORTED = """
import os, runpy, signal, sys

class Sends:
    def find_spec(self, name, *_):
        if name == "tyro":
            os.kill(os.getpid(), int(sys.argv[1]))

sys.meta_path.insert(0, Sends())
given, sys.argv = sys.argv, ["-m", *sys.argv[1:]]  # as Python has it then
runpy.run_module("experiments.words", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_while_a_program_is_imported_is_one_line(signum):
    (ended,) = run_together(["-c", IMPORTED, int(signum)], devices=1)
    name = signal.Signals(signum).name
    line = f"stopped by {name}; the same command goes on from here.\n"
    assert (ended.code, ended.err) == (128 + signum, line)


def test_what_somebody_else_catches_stops_the_next_training_loop(handlers):
    signals = Signals()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    except BaseException:  # as some library may
        pass
    assert signals.pending == signal.SIGTERM


def test_a_signal_in_the_middle_of_a_line_that_is_printed_is_noted(handlers, monkeypatch):
    """Python refuses to write from a handler into what is being written to."""

    def reentrant(*_):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    signals = Signals()
    monkeypatch.setattr(terminal.console, "print", reentrant)
    with signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.001)
        assert signals.pending == signal.SIGTERM


LEAVES = """
import atexit, os, signal, sys, threading, time
from experiments.train import processes
from experiments.train.terminal import UserError, run_main

class Torn:
    def __del__(self):
        print("torn down", flush=True)

torn = Torn()

def late():
    time.sleep(0.3)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(os.getpid(), signum)
    print("a thread that ends", flush=True)

def main():
    if "early" in sys.argv:
        os.kill(os.getpid(), signal.SIGHUP)  # before the command has begun
        time.sleep(1)
    threading.Thread(target=late).start()
    atexit.register(print, "registered for the end")
    raise UserError("the end")

processes.exit_with(lambda: run_main(main))
"""


def test_what_ends_keeps_its_exit_code_and_is_not_taken_apart():
    """As XLA's threads may still compute; what was registered for the end is done."""
    late, early = run_together(["-c", LEAVES], ["-c", LEAVES, "early"], devices=1)
    assert (late.code, late.err) == (2, "error: the end\n")
    assert late.out.splitlines() == ["a thread that ends", "registered for the end"]
    assert early.code == 129 and early.err.startswith("stopped by SIGHUP;")


LEFT = """
from experiments.train import processes

def main():
    from multiprocessing import shared_memory
    print(shared_memory.SharedMemory(create=True, size=9).name)
    return 2

processes.exit_with(main)
"""


def test_what_is_left_in_shared_memory_is_removed_without_a_word():
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LEFT]
    # A pipe ends when all who could write have ended, Python's tracker of shared memory too.
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (2, "")
    assert not Path("/dev/shm", ended.stdout.strip().lstrip("/")).exists()
