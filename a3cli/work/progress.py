"""Say how far the steps of a stage are, to whoever shows it: the protocol that every stage reports through."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, overload


class Progress(Protocol):
    """Called with the progress of a step, from any thread.

    A sweep reports after each batch: its tokens through the current layer. Any other step has a name, and is `done` of
    `total` in `unit`, from 0 when it starts to `total` when it ends, and without a unit only starts and ends. Where it
    is not known before, as for a text that is read whole, `total` is None until the end.
    """

    @overload
    def __call__(self, *, layer: int, layers: int, tokens: int, total_tokens: int) -> None: ...
    @overload
    def __call__(self, *, step: str, done: int, total: int | None, unit: str) -> None: ...


def silent(**_at: object) -> None:
    """Show no progress."""


@contextmanager
def reporting(progress: Progress, step: str, total: int | None = 1, unit: str = "") -> Iterator[Callable[..., None]]:
    """Report the start and the end of a step; yield a function to call as parts finish: one, or as many as given.

    Threads may call it.
    """
    lock, done = threading.Lock(), 0

    def finished(parts: int = 1) -> None:
        nonlocal done
        with lock:
            done += parts
            at = done if total is None else min(done, total - 1)  # it ends with the block
            progress(step=step, done=at, total=total, unit=unit)

    progress(step=step, done=0, total=total, unit=unit)
    try:
        yield finished
    finally:
        end = done if total is None else total
        progress(step=step, done=end, total=end, unit=unit)
