"""Run one function at a time in a process of its own, and measure its seconds and peak memory."""

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
STATUS = Path("/proc/self/status")


class Cost(NamedTuple):
    """Seconds and CPU seconds of all threads, and the peak of the process's resident set in bytes, imports included.

    The start of the process does not count. CPU seconds depend less on what else the machine does.
    """

    seconds: float
    cpu_seconds: float
    peak: int


def in_child(function: Callable[..., T], *arguments: Any) -> tuple[T, Cost]:
    """Call a function in a new process, which ends with it; return its result and cost, or raise what it raised."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=send_measured, args=(sender, function, arguments))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        child.join()  # then its exit code is known
        raise RuntimeError(f"{function.__name__}: its process ended with exit code {child.exitcode}") from None
    except BaseException:  # an interrupt: nothing goes on behind the caller's back
        child.terminate()
        raise
    finally:
        receiver.close()
        child.join()
    if isinstance(result, BaseException):
        raise result
    return result


def send_measured(sender: Connection, function: Callable[..., T], arguments: tuple[Any, ...]) -> None:
    """Send the result and cost of a call, or its exception; a child whose parent is gone ends here."""
    try:
        result: Any = measured(function, *arguments)
    except Exception as error:
        result = error
    sender.send(result)


def measured(function: Callable[..., T], *arguments: Any) -> tuple[T, Cost]:
    started, cpu_started = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return result, cost_since(started, cpu_started)


def cost_since(started: float, cpu_started: float) -> Cost:
    """Return what this process needed since these times of `perf_counter` and `process_time`."""
    return Cost(time.perf_counter() - started, time.process_time() - cpu_started, peak_memory())


def peak_memory() -> int:
    """Return the peak resident bytes of this process; its parent's do not count where the system tells them apart."""
    if STATUS.exists():
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
