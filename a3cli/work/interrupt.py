"""Stop between steps: after `--max-minutes`, or at SIGINT or SIGTERM.

A stage checks before each step (a layer, a weight file, a point) whether it must stop. So every step is complete, and
the same command resumes from the files on disk. A second signal stops at once.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from a3cli.errors import Interrupted
from a3cli.work.processes import ended_by_launcher

log = logging.getLogger(__name__)

Handler = Callable[[int, FrameType | None], None]
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """The decision to stop before the next step: at a time limit or a signal, otherwise never."""

    def __init__(self, minutes: float | None = None) -> None:
        self.minutes = minutes
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.signal: signal.Signals | None = None
        self.step = ""  # the last one that started

    def before(self, step: str, then: str) -> None:
        """Raise Interrupted if `step` must not start; `then` says how to resume."""
        if self.signal is not None:
            raise Interrupted(f"stopped by {self.signal.name} before {step}; {then}")
        if time.monotonic() >= self.deadline:
            raise Interrupted(f"stopped by --max-minutes {self.minutes:g} before {step}; {then}")
        self.step = step

    def describe(self) -> str:
        """Return the one line that says what happens after the first signal."""
        assert self.signal is not None
        again = "press Ctrl-C again to stop now" if self.signal is signal.SIGINT else "a second signal stops at once"
        step = f"the current step ({self.step})" if self.step else "the current step"
        return f"{self.signal.name}: finishing {step}; {again}"


@contextmanager
def stopping(minutes: float | None = None) -> Iterator[Stop]:
    """Yield a `Stop` for a time limit and the first signal; the second signal raises KeyboardInterrupt."""
    stop = Stop(minutes)

    def first(number: int, _frame: FrameType | None) -> None:
        stop.signal = signal.Signals(number)
        _handle(at_once)
        # Our launcher ends the peers of a failed process and reports the reason itself.
        if not (ended_by_launcher() and stop.signal is signal.SIGTERM):
            log.warning("%s", stop.describe())

    with _handling(first):
        yield stop


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Handle SIGTERM like SIGINT: close open files and remove unfinished ones before the process ends."""
    with _handling(at_once):
        yield


def at_once(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _handle(handler: Handler) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


@contextmanager
def _handling(handler: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = [signal.getsignal(number) for number in SIGNALS]
    _handle(handler)
    try:
        yield
    finally:
        for number, former in zip(SIGNALS, before, strict=True):
            signal.signal(number, former)
