"""Show the progress of a stage on stderr: a bar on a terminal, log lines elsewhere."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from a3cli.cli.console import log, log_console
from a3cli.cli.display import duration
from a3cli.report.figures import human_bytes
from a3cli.work.escape import printable

SHOWN_AFTER = 3.0  # seconds that a step lasts before it is shown
LINE_EVERY = 10.0  # seconds between log lines, at least
SILENT_FOR = 30.0  # seconds between log lines, at most
TICK = 1.0  # seconds between looks at a step that reports nothing
SPEED_OVER = 3600.0  # seconds over which a bar averages, since one part of a step may take minutes


@dataclass(frozen=True)
class Step:
    """A named step under way, and the bar's task for it once it is shown."""

    name: str
    done: float  # a fraction within a layer
    total: int | None  # None if it is not known
    unit: str
    started: float
    task: Any = None
    has_line: bool = False

    @property
    def place(self) -> str:
        """Return how far the step is, such as `3 of 32 layers`."""
        if self.total is None:
            return f"{int(self.done):,} {self.unit}"
        if self.unit == "bytes":
            return f"{human_bytes(int(self.done))} of {human_bytes(self.total)}"
        return f"{int(self.done):,} of {self.total:,} {self.unit}" if self.unit else ""

    def line(self, now: float) -> str:
        spent = now - self.started
        left = spent * (self.total - self.done) / self.done if self.done and self.total is not None else None
        times = f"{duration(spent)} so far" if left is None else f"{duration(left)} left"
        return f"{self.name}: {', '.join(filter(None, (self.place, times)))}"


@dataclass(frozen=True)
class Swept:
    """How far a sweep is."""

    layer: int
    layers: int
    tokens: int
    total_tokens: int

    @property
    def done(self) -> int:
        return self.layer * self.total_tokens + self.tokens

    @property
    def total(self) -> int:
        return self.layers * self.total_tokens


class SweepProgress:
    """Show what is under way, how far it is and the time left: in a bar on a terminal, in log lines elsewhere.

    A sweep has a bar at once, or a line per layer; another step is shown once it has lasted some seconds. `tick` is
    called now and then, for steps that report nothing for long.
    """

    def __init__(self, bar: Progress | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.bar, self.clock = bar, clock
        self.task: Any = None  # of the sweep
        self.first: int | None = None  # tokens through layers that the sweep had done when it started here
        self.swept: Swept | None = None
        self.steps: dict[str, Step] = {}  # the innermost last
        self.started = self.last_line = clock()
        self._lock = threading.RLock()

    def __call__(
        self,
        *,
        step: str | None = None,
        done: float = 0,
        total: int | None = 1,
        unit: str = "",
        layer: int = 0,
        layers: int = 1,
        tokens: int = 0,
        total_tokens: int = 1,
    ) -> None:
        with self._lock:
            if step is None:
                self._sweep(Swept(layer, layers, tokens, total_tokens))
            else:
                self._report(step, done, total, unit)

    def tick(self) -> None:
        """Show the innermost step or the sweep, if nothing has been shown for long."""
        with self._lock:
            if self.steps:
                step = list(self.steps.values())[-1]
                self._show(step, SILENT_FOR if step.has_line else LINE_EVERY)
            elif self.swept and self.bar is None and self.clock() - self.last_line >= SILENT_FOR:
                self._log_sweep(self.swept)

    def _report(self, name: str, done: float, total: int | None, unit: str) -> None:
        known = self.steps.get(name)
        if total is not None and done >= total:
            if known is not None:
                self._end(known)
            return
        step = Step(name, done, total, unit, self.clock()) if known is None else replace(known, done=done)
        self.steps[name] = step
        self._show(step, LINE_EVERY)

    def _show(self, step: Step, every: float) -> None:
        """Draw a step that has lasted, or log a line about it if the last line was `every` seconds ago."""
        now = self.clock()
        if now - step.started < SHOWN_AFTER:
            return
        if self.bar is not None:
            self._draw_step(self.bar, step)
        elif now - self.last_line >= every:
            self.last_line = now
            self.steps[step.name] = replace(step, has_line=True)
            log.info("%s", step.line(now))

    def _draw_step(self, bar: Progress, step: Step) -> None:
        total = step.total if step.unit or step.done else None  # without parts the bar only moves
        if step.task is None:
            step = replace(step, task=bar.add_task(printable(step.name), total=total, speed=step.place))
            self.steps[step.name] = step
            bar.start()
        bar.update(step.task, total=total, completed=step.done, speed=step.place)

    def _end(self, step: Step) -> None:
        """Forget a step, and remove its bar: a stage may have many of them."""
        del self.steps[step.name]
        if self.bar is not None and step.task is not None:
            self.bar.remove_task(step.task)

    def _sweep(self, swept: Swept) -> None:
        if self.first is None or self.swept is None:
            self.first, self.started = swept.done - swept.tokens, self.clock()
        self.swept = None if swept.done == swept.total else swept
        if self.bar is not None:
            self._draw_sweep(self.bar, swept)
        elif swept.tokens == swept.total_tokens or self.clock() - self.last_line > LINE_EVERY:
            self._log_sweep(swept)

    def _rate(self, swept: Swept) -> float:
        """Return tokens per second. The clock starts with the first report, before which nothing is counted."""
        assert self.first is not None
        return (swept.done - self.first) / max(self.clock() - self.started, 1e-3)

    def _draw_sweep(self, bar: Progress, swept: Swept) -> None:
        """Update the bar. The first call starts it, so that a sweep without work draws nothing."""
        layer, speed = f"layer {swept.layer + 1} of {swept.layers}", f"{self._rate(swept):,.0f} tokens/s"
        if self.task is None:
            self.task = bar.add_task(layer, total=swept.total, speed=speed)
            bar.start()
        bar.update(self.task, total=swept.total, completed=swept.done, description=layer, speed=speed)

    def _log_sweep(self, swept: Swept) -> None:
        self.last_line, rate = self.clock(), self._rate(swept)
        spent = f"{duration(self.clock() - self.started)} so far"
        left = f"{duration((swept.total - swept.done) / rate)} left" if rate else spent
        place = f"layer {swept.layer + 1} of {swept.layers}: {swept.tokens}/{swept.total_tokens} tokens"
        log.info("%s, %s", place, left)


@contextmanager
def sweep_progress(*, quiet: bool) -> Iterator[SweepProgress]:
    """Yield the progress of one stage, shown on stderr unless `quiet`."""
    console = log_console()
    if quiet:
        yield SweepProgress(None)
        return
    if not console.is_terminal or console.is_dumb_terminal:
        with ticking(SweepProgress(None)) as progress:
            yield progress
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[speed]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, speed_estimate_period=SPEED_OVER)
    try:
        with ticking(SweepProgress(bar)) as progress:
            yield progress
    finally:
        bar.stop()


@contextmanager
def ticking(progress: SweepProgress) -> Iterator[SweepProgress]:
    """Call `tick` regularly, in a thread that ends with the block."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(TICK):
            progress.tick()

    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        ended.set()
        thread.join()
