"""The terminal: messages, progress bars, signals, and errors as one line with an exit code."""

import _thread
import contextlib
import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from eqxldm.checkpoints import CheckpointError
from eqxldm.data import DataError

# Of the disk and not of the program: full, over a limit, read-only, not permitted, broken, gone;
# names that are too long or stand for something else; more files than may be open.
DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ESTALE, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EMFILE,
    errno.ENFILE,
)  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK = 0.4  # seconds between two looks at whether what a signal raised is still on its way
PLAIN_INTERVAL = 10.0  # seconds between lines where the output is no terminal


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads the output any more (`| head`): as at SIGTERM, what can be saved is, in
        place of an error in the middle of whatever is done; the output goes nowhere from here on.
        """
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os.kill(os.getpid(), signal.SIGTERM)


# Without markup and emoji: what is printed holds names that users chose.
console = _Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


class UserError(Exception):
    """Something the user can repair: shown as one message, exit code 2."""


@contextlib.contextmanager
def user_errors(*kinds: type[Exception], what: str = "") -> Iterator[None]:
    """What the block raises of these kinds is the user's to repair: `what`, and its message.

    >>> with user_errors(ValueError, what="--seed"):
    ...     int("a")
    Traceback (most recent call last):
    ...
    experiments.train.terminal.UserError: --seed: invalid literal for int() with base 10: 'a'
    """
    try:
        yield
    except kinds as error:
        raise UserError(f"{what}: {error}" if what else str(error)) from None


class Interrupted(BaseException):
    """A signal asked the program to stop."""

    def __init__(self, signum: int):
        self.signum = signum


class Signals:
    """SIGINT, SIGTERM and SIGHUP: raised at once, or noted while a training loop runs.

    Inside `deferred()` the first signal only sets `pending`, so that the loop can save and leave;
    a second one is raised. What is raised where Python drops exceptions, in a callback of its
    garbage collector say, or where somebody else catches it, is sent again. A hangup that was to be
    ignored, as below `nohup`, is.
    """

    def __init__(self):
        self.pending: int | None = None
        self._deferred = False
        for signum in SIGNALS:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._handle)
        _send_again_what_is_dropped()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if _is_dropped(frame):
            _send_later(signum)
            return
        again, self.pending = self.pending is not None, signum
        if not self._deferred or again:
            if _running:
                _thread.start_new_thread(self._watch, (signum, _running[-1]))
            raise Interrupted(signum)
        with contextlib.suppress(RuntimeError):  # it came in the middle of a line that is printed
            say(f"{signal.Signals(signum).name}: saving a checkpoint, then stopping ...")

    def _watch(self, signum: int, run: object) -> None:
        """Sends a signal again whose `Interrupted` is on its way to `run_main` no longer: some
        library has caught it. A training loop needs no second one, it stops at the first."""
        missed = 0
        while missed < 3:  # between two handlers it is nowhere, for an instant
            time.sleep(LOOK)
            missed = 0 if _is_on_its_way() else missed + 1
            if run not in _running or (self._deferred and self.pending):
                return
        os.kill(os.getpid(), signum)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False


def _send_again_what_is_dropped() -> None:
    before = sys.unraisablehook
    if getattr(before, "__code__", None) is _DROPPED:
        return

    def hook(dropped: Any) -> None:
        if isinstance(dropped.exc_value, Interrupted):
            _send_later(dropped.exc_value.signum)
        else:
            before(dropped)

    sys.unraisablehook = hook


_DROPPED = next(c for c in _send_again_what_is_dropped.__code__.co_consts if hasattr(c, "co_code"))


def _is_dropped(frame: FrameType | None) -> bool:
    """Whether what is raised in a frame is lost: below `hook`, which nobody calls again for it."""
    while frame is not None and frame.f_code is not _DROPPED:
        frame = frame.f_back
    return frame is not None


def _send_later(signum: int) -> None:
    """Sends it once more, from a thread, when this one may be where exceptions are raised again."""

    def send() -> None:
        time.sleep(0.02)
        os.kill(os.getpid(), signum)

    _thread.start_new_thread(send, ())


def _is_on_its_way() -> bool:
    """Whether the main thread is at something that `Interrupted` has come by, such as saving."""
    found: Any = sys._current_exceptions().get(threading.main_thread().ident or 0)
    error = found[1] if isinstance(found, tuple) else found  # before Python 3.12 a tuple
    while error is not None and not isinstance(error, Interrupted):
        error = error.__context__
    return error is not None


_running: list[object] = []  # the calls of `run_main` that have not ended


def say(text: str) -> None:
    """Prints a line, on process 0. That it cannot be written (a full disk) stops nothing."""
    with contextlib.suppress(OSError):
        console.print(text)


def run_main(main: Callable[[], None]) -> int:
    """Calls `main`; what it raises becomes a message and an exit code: 2, 129, 130 or 143."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be text of this locale
            stream.reconfigure(errors="backslashreplace")
    try:
        return _exit_code(main)
    finally:
        _settle()


def _exit_code(main: Callable[[], None]) -> int:
    _running.append(call := object())
    try:
        try:
            main()
        finally:
            _running.remove(call)
    except (UserError, DataError, CheckpointError) as error:
        return _failed(str(error))
    except OSError as error:
        if error.errno not in DISK:
            raise
        return _failed(f"{error.filename or 'a file'}: {error.strerror}.")
    except (Interrupted, KeyboardInterrupt) as stop:  # the latter before there are `Signals`
        signum = stop.signum if isinstance(stop, Interrupted) else signal.SIGINT
        name = signal.Signals(signum).name
        _complain(f"stopped by {name}; the same command goes on from here.")
        return 128 + signum
    return 0


def _failed(message: str) -> int:
    with contextlib.suppress(OSError):
        console.file.flush()
    _complain(f"error: {message}")
    return 2


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it, as after `2>&1 | head`
        print(text, file=sys.stderr, flush=True)


def _settle() -> None:
    """Drops what could not be written: Python would try again at its end, and exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # closed, as by `>&-`
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class StageBar:
    """Progress of one stage: a bar in a terminal, a line every ten seconds elsewhere."""

    def __init__(self, name: str, total: int, unit: str = "step"):
        self.name, self.total, self.unit = name, total, unit
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._start = self._printed = time.monotonic()
        self._printed_all = False
        self._first: int | None = None

    def __enter__(self) -> "StageBar":
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description:<11}"),  # fits a line of 80 characters
                BarColumn(bar_width=18),
                TextColumn("{task.completed:>5.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total, text="")
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, text: str = "") -> None:
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif console.quiet or self._printed_all:
            return
        elif done == self.total or now - self._printed >= PLAIN_INTERVAL:
            self._printed, self._printed_all = now, done == self.total
            rate = (done - self._first) / max(now - self._start, 1e-9)
            left = f"{(self.total - done) / rate:.0f} s left" if rate > 0 else ""
            say(f"{self.name}: {done}/{self.total} {self.unit}s  {text}  {left}")
