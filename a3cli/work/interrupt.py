"""Stopping between steps: after `--max-minutes`, or at SIGINT or SIGTERM.

A stage asks before each step (a layer, a weight file, a point) whether it may begin. So a step is never cut in two, and
what is on disk is what the same command goes on from. A second signal stops at once.
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
    """Whether to stop before the next step; never, unless there is a time limit or somebody asks."""

    def __init__(self, minutes: float | None = None) -> None:
        self.minutes = minutes
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.signal: signal.Signals | None = None

    def before(self, step: str, then: str) -> None:
        """Raise Interrupted if `step` is not to begin; `then` says how to go on."""
        if self.signal is not None:
            raise Interrupted(f"stopped by {self.signal.name} before {step}; {then}")
        if time.monotonic() >= self.deadline:
            raise Interrupted(f"stopped by --max-minutes {self.minutes:g} before {step}; {then}")


@contextmanager
def stopping(minutes: float | None = None) -> Iterator[Stop]:
    """A `Stop` that a time limit or the first signal sets off; the second signal raises KeyboardInterrupt."""
    stop = Stop(minutes)

    def first(number: int, _frame: FrameType | None) -> None:
        stop.signal = signal.Signals(number)
        _handle(at_once)
        # A launcher of ours ends the peers of a process that failed, and says itself why.
        if not (ended_by_launcher() and stop.signal is signal.SIGTERM):
            log.warning("%s: finishing the current step; a second signal stops at once", stop.signal.name)

    with _handling(first):
        yield stop


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM like SIGINT: what is open is closed, and what is unfinished removed, before the process ends."""
    with _handling(at_once):
        yield


def at_once(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _handle(handler: Handler) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


@contextmanager
def _handling(handler: Handler) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before = [signal.getsignal(number) for number in SIGNALS]
    _handle(handler)
    try:
        yield
    finally:
        for number, former in zip(SIGNALS, before, strict=True):
            signal.signal(number, former)
