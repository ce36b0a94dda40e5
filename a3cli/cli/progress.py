"""Show the progress of a sweep on stderr: a bar on a terminal, log lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from a3cli.cli.console import log, log_console

LINE_EVERY = 10.0  # seconds between log lines within a layer


class SweepProgress:
    """Show layer, tokens per second and time left: in a bar on a terminal, in a log line per layer elsewhere."""

    def __init__(self, bar: Progress | None) -> None:
        self.bar = bar
        self.task: Any = None
        self.first: int | None = None
        self.started = self.last_line = time.monotonic()

    def __call__(self, *, layer: int, layers: int, tokens: int, total_tokens: int) -> None:
        if self.first is None:
            self.first = layer
            self.started = time.monotonic()
        done = layer * total_tokens + tokens
        # The clock starts at the end of the first batch, which is therefore not counted.
        rate = (done - self.first * total_tokens) / max(time.monotonic() - self.started, 1e-3)
        if self.bar is not None:
            self._draw(f"layer {layer + 1} of {layers}", f"{rate:,.0f} tokens/s", done, layers * total_tokens)
        elif tokens == total_tokens or time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            left = (layers * total_tokens - done) / rate
            log.info("layer %d of %d: %d/%d tokens, %s left", layer + 1, layers, tokens, total_tokens, f"{left:,.0f} s")

    def _draw(self, layer: str, speed: str, done: int, total: int) -> None:
        """Update the bar. The first call starts it, so that a sweep without work draws nothing."""
        assert self.bar is not None
        if self.task is None:
            self.task = self.bar.add_task(layer, total=total, speed=speed)
            self.bar.start()
        self.bar.update(self.task, completed=done, description=layer, speed=speed)


@contextmanager
def sweep_progress(*, quiet: bool) -> Iterator[SweepProgress]:
    """Yield the progress of one sweep, shown on stderr unless `quiet`."""
    console = log_console()
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield SweepProgress(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console)
    try:
        yield SweepProgress(bar)
    finally:
        bar.stop()
