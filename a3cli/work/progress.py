"""Say how far the steps of a stage are, to whoever shows it: the protocol that every stage reports through."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, overload


class Progress(Protocol):
    """Called with the progress of a step, from any thread.

    A sweep reports after each batch: its tokens through the current layer. Any other step has a name, and is `done` of
    `total` in `unit`, from 0 when it starts to `total` when it ends; within a layer `done` is a fraction. Without a
    unit the step is one thing. If it is not known before, as for a text that is read whole, `total` is None until then.
    """

    @overload
    def __call__(self, *, layer: int, layers: int, tokens: int, total_tokens: int) -> None: ...
    @overload
    def __call__(self, *, step: str, done: float, total: int | None, unit: str) -> None: ...


# What reports a share of the part that is under way in this thread.
_advance: ContextVar[Callable[[float], None]] = ContextVar("advance", default=lambda _share: None)
ROUNDING = 1e-6  # of the sum of a part's shares


def silent(**_at: object) -> None:
    """Show no progress."""


@contextmanager
def reporting(progress: Progress, step: str, total: int | None = 1, unit: str = "") -> Iterator[Callable[..., None]]:
    """Report the start and the end of a step; yield a function to call as parts finish: one, or as many as given.

    Threads may call it.
    """
    lock, done, at = threading.Lock(), 0.0, 0.0

    def finished(parts: float = 1) -> None:
        nonlocal done, at
        with lock:
            done += parts
            if abs(done - round(done)) < ROUNDING:
                done = round(done)
            at = done if total is None or done < total else max(at, total - 1)  # it ends with the block
            progress(step=step, done=at, total=total, unit=unit)

    progress(step=step, done=0, total=total, unit=unit)
    try:
        yield finished
    finally:
        end = done if total is None else total
        progress(step=step, done=end, total=int(end), unit=unit)


def advance(share: float) -> None:
    """Report that a share of the part that is under way in this thread is done. Without one it does nothing."""
    _advance.get()(share)


@contextmanager
def portion(share: float = 1.0, of: Callable[[float], None] | None = None) -> Iterator[None]:
    """Call `advance` with `share` little by little: as parts of the block advance, and with the rest at its end.

    `of` is what to call instead, such as the function that `reporting` yields.
    """
    outer, done = of or _advance.get(), 0.0

    def inner(more: float) -> None:
        nonlocal done
        more = min(more, 1 - done)
        done += more
        if more > 0:
            outer(share * more)

    token = _advance.set(inner)
    try:
        yield
    finally:
        _advance.reset(token)
    inner(1 - done)
