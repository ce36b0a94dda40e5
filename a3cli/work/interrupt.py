"""Stop between steps: after `--max-minutes`, or at SIGINT or SIGTERM.

A stage checks before each step (a layer, a weight file, a point) whether it must stop. So every step is complete, and
the same command resumes from the files on disk. A second signal stops at once, and so does the first one if the step
does not end soon: what sends a signal often kills a process that does not obey it. Then the step's work is lost.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from a3cli.errors import Interrupted
from a3cli.work.processes import ended_by_launcher

log = logging.getLogger(__name__)

Handler = Callable[[int, FrameType | None], None]
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ALARM = (signal.SIGALRM,) if hasattr(signal, "SIGALRM") else ()  # Windows has none
PATIENCE = 7.0  # seconds that a step may still take after the first signal; supervisors often kill after ten


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
        soon = f" if that takes at most {PATIENCE:g} s" if ALARM else ""
        return f"{self.signal.name}: finishing {step}{soon}; {again}"


@contextmanager
def stopping(minutes: float | None = None) -> Iterator[Stop]:
    """Yield a `Stop` for a time limit and the first signal.

    A second signal raises KeyboardInterrupt, and so does the first one if the step has not ended after `PATIENCE`.
    """
    stop = Stop(minutes)

    def first(number: int, _frame: FrameType | None) -> None:
        stop.signal = signal.Signals(number)
        _handle(SIGNALS, at_once)
        # Our launcher ends the peers of a failed process and reports the reason itself.
        if not (ended_by_launcher() and stop.signal is signal.SIGTERM):
            log.warning("%s", stop.describe())
        if ALARM:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    with _handling(ALARM, at_once), _handling(SIGNALS, first):
        try:
            yield stop
        finally:
            if ALARM and stop.signal is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Handle SIGTERM like SIGINT: close open files and remove unfinished ones before the process ends."""
    with _handling(SIGNALS, at_once):
        yield


def at_once(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _handle(numbers: Sequence[signal.Signals], handler: Handler) -> None:
    for number in numbers:
        signal.signal(number, handler)


@contextmanager
def _handling(numbers: Sequence[signal.Signals], handler: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = [signal.getsignal(number) for number in numbers]
    _handle(numbers, handler)
    try:
        yield
    finally:
        for number, former in zip(numbers, before, strict=True):
            signal.signal(number, former)
