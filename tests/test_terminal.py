"""What a program prints, its exit codes, and output that nobody reads."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eqxldm.checkpoints import CheckpointError
from eqxldm.data import DataError
from experiments.train.terminal import Interrupted, UserError, run_main, say


def test_what_is_printed_is_never_markup(capsys):
    say("a[/b].png [red] :smile: [bold]x[/bold]")
    assert capsys.readouterr().out == "a[/b].png [red] :smile: [bold]x[/bold]\n"


def test_errors_become_one_message_and_an_exit_code(capsys):
    def raising(error):
        def main():
            raise error

        return main

    full = OSError(28, "No space left on device", "metrics.json")
    assert run_main(raising(full)) == 2
    assert capsys.readouterr().err == "error: metrics.json: No space left on device.\n"
    for error, code in (
        (UserError("no"), 2), (DataError("no"), 2), (CheckpointError("no"), 2),
        (Interrupted(signal.SIGINT), 130), (Interrupted(signal.SIGTERM), 143),
        (Interrupted(signal.SIGHUP), 129),
    ):  # fmt: skip
        assert run_main(raising(error)) == code
    with pytest.raises(FileNotFoundError):
        run_main(raising(FileNotFoundError(2, "No such file or directory", "x")))


GONE = """
import signal, sys
from experiments.train.terminal import Interrupted, Signals, run_main, say

def main():
    signals = Signals()
    with signals.deferred():
        for _ in range(10**5):
            say("some line")
            if signals.pending:
                raise Interrupted(signals.pending)

sys.exit(run_main(main))
"""


def test_a_reader_of_the_output_that_goes_away_is_like_sigterm():
    with subprocess.Popen(
        [sys.executable, "-c", GONE], cwd=Path(__file__).parents[1], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()  # as `head -1` does
        said = process.stderr.read()
    assert process.returncode == 143
    assert said == "stopped by SIGTERM; the same command goes on from here.\n"


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "C.UTF-8"}])
def test_names_that_are_not_text_of_the_locale_are_printed(locale):
    code = """
import sys
from eqxldm.data import DataError
from experiments.train.terminal import run_main, say

def main():
    say("skipped: c\\udce9t/\\xe4.png")
    raise DataError("c\\udce9t/\\xe4.png: cannot be decoded.")

sys.exit(run_main(main))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True,
        env={**os.environ, "PYTHONCOERCECLOCALE": "0", **locale},
    )  # fmt: skip
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert done.stdout.startswith(b"skipped: c") and b"t/" in done.stdout
    assert done.stderr.startswith(b"error: c") and done.stderr.count(b"\n") == 1
