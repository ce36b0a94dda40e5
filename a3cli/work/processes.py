"""The processes of one run: each one's share of the work, and their collective operations.

Several processes come from `accelerate launch -m a3cli …`, on one node or several, or from `--num-processes N`, which
starts them on this machine. An error in one process is raised in all of them at the next collective operation. Only the
main process prints; errors are printed by the first process of each machine. Importing this module is cheap, so that
the command line can find out its rank.
"""

import logging
import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from a3cli.errors import INTERNAL_ERROR, A3Error, Interrupted, first_line

if TYPE_CHECKING:
    import torch

S = TypeVar("S")
T = TypeVar("T")
# Our launcher reads the messages of its processes from here and prints one of them.
ERROR_FOLDER = "A3_ERROR_FOLDER"
NAMES = "surrogateescape"  # for bytes that are not UTF-8
# Processes wait this long for the main one while it downloads text or writes a large layer. On one machine, a dead
# process is detected at once.
LONGEST_WAIT = timedelta(hours=6)
# Signals for which torch's launcher sets handlers without restoring them.
ELASTIC_HANDLES = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
GRACE = 1.0  # seconds that threads get to finish after an interrupt
PIECE = 1 << 24  # numbers reduced at a time: a reduction needs as much memory again


class StillRunning(KeyboardInterrupt):
    """Interrupted while threads compute, which nothing can stop: the process must end without waiting for them.

    They may be writing, so unfinished files are left as a kill leaves them.
    """


def launched() -> bool:
    """Return whether this is one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_main() -> bool:
    return not launched() or os.environ["RANK"] == "0"


def ended_by_launcher() -> bool:
    """Return whether SIGTERM comes from our launcher."""
    return launched() and ERROR_FOLDER in os.environ


def hand_over(message: str) -> bool:
    """Hand an error's line to the process that prints for this one; return False if that is this process.

    The first process of each machine prints, since the cause may exist on one machine only.
    """
    if launched() and (folder := os.environ.get(ERROR_FOLDER)):
        (Path(folder) / os.environ["RANK"]).write_text(message, "utf-8", NAMES)
        return True
    return launched() and os.environ.get("LOCAL_RANK", os.environ["RANK"]) != "0"


class Processes:
    """One process and its peers. A single process has no peers, and every method returns at once."""

    def __init__(self, device: str = "auto") -> None:
        self.rank, self.count = 0, 1
        if launched():
            self._join(device)

    def _join(self, device: str) -> None:
        import torch
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        on_cpu = not torch.cuda.is_available() or torch.device("cuda" if device == "auto" else device).type == "cpu"
        peers = [InitProcessGroupKwargs(timeout=LONGEST_WAIT)]
        if torch.device("cpu" if device == "auto" else device).index is not None:
            raise A3Error(f"--device {device} names one GPU for several processes; use --device cuda")
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if not on_cpu and here > torch.cuda.device_count():
            raise A3Error(
                f"{here} processes on this machine, which has {torch.cuda.device_count()} CUDA devices; start one per "
                "GPU, or use --device cpu"
            )
        self._accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=peers)
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes

    def leave(self) -> None:
        """Leave the process group; a plain exit would look like a crash to the peers."""
        if self.count > 1:
            self._accelerator.end_training()

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, items: int) -> range:
        """Return this process's range of `items`: consecutive, as even as possible, larger ones first."""
        size, larger = divmod(items, self.count)
        start = self.rank * size + min(self.rank, larger)
        return range(start, start + size + (self.rank < larger))

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank. Raises Interrupted if one of them died."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        with self._in_touch():
            values: list[T] = gather_object([value])
        return values

    @contextmanager
    def _in_touch(self) -> Iterator[None]:
        import torch

        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what gloo and nccl raise if a peer died
            raise Interrupted(
                f"process {self.rank} of {self.count} lost another process ({first_line(error)}); "
                "rerun the same command to resume"
            ) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for all processes at the end of the block; raise an error of one of them in all."""
        if self.count == 1:
            yield
            return
        from torch import OutOfMemoryError

        problem: Exception | None = None
        try:
            yield
        except (A3Error, OSError, OutOfMemoryError) as error:
            problem = error
        first = next((each for each in self.gather(problem) if each is not None), None)
        if first is not None:
            raise first

    def from_main(self, task: Callable[[], T]) -> T:
        """Run `task` in the main process and return its result in all processes. The others wait."""
        result: T | None = None
        with self.together():
            if self.main:
                result = task()
        return self.gather(result)[0]  # type: ignore[return-value]

    def main_first(self, task: Callable[[], T]) -> T:
        """Run `task` in every process and return its result; the main one runs first and fills the download cache."""
        result: list[T] = []
        for turn in (True, False):
            with self.together():
                if self.main is turn:
                    result.append(task())
        return result[0]

    def add_up(self, sums: "dict[str, torch.Tensor]", device: "torch.device") -> "dict[str, torch.Tensor]":
        """Sum over all processes, in place. A process that lacks a sum contributes zeros."""
        if self.count == 1:
            return sums
        import torch

        own = {name: (value.shape, value.dtype) for name, value in sums.items()}
        layout = {name: form for each in self.gather(own) for name, form in each.items()}
        summed = {}
        with self._in_touch():
            for name, (shape, dtype) in sorted(layout.items()):
                value = sums.pop(name) if name in sums else torch.zeros(shape, dtype=dtype, device=device)
                for piece in value.view(-1).split(PIECE):
                    there = piece.to(self._accelerator.device)  # with --devices this may differ from the layer's device
                    piece.copy_(self._accelerator.reduce(there, reduction="sum"))
                summed[name] = value
        return summed


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the process group of this run until the block ends or an error is raised in all processes."""
    processes = Processes(device)
    try:
        yield processes
    except Interrupted:
        raise
    except A3Error:
        processes.leave()
        raise
    processes.leave()


def spread(work: Callable[[S], T], items: Iterable[S], count: int) -> Iterator[T]:
    """Yield `work` of each item, in order, computed by `count` threads of one core each.

    The bytes do not depend on `count`. On several cores linear algebra sums in another order, and small matrices gain
    nothing from them.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from results(one_core_each(count), [partial(work, item) for item in items])
    finally:
        torch.set_num_threads(before)


def results(threads: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield the result of each job, in order, from threads that end with the iteration.

    Raises StillRunning if it is interrupted and a job does not finish soon.
    """
    futures = [threads.submit(job) for job in jobs]
    ends = True
    try:
        for future in futures:
            yield future.result()
    except KeyboardInterrupt as interrupt:
        threads.shutdown(wait=False, cancel_futures=True)
        ends = not wait([each for each in futures if not each.cancelled()], GRACE).not_done
        if not ends:
            raise StillRunning from interrupt
        raise
    finally:
        threads.shutdown(wait=ends, cancel_futures=True)


def in_thread(job: Callable[[], T]) -> T:
    """Run a long operation in a thread: signals are handled between the operations of the main thread.

    Raises StillRunning if it is interrupted and does not finish soon.
    """
    [result] = results(ThreadPoolExecutor(1), [job])
    return result


def one_core_each(count: int) -> ThreadPoolExecutor:
    """Return a pool of threads in which torch uses one core."""
    import torch

    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def ahead(threads: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]], count: int) -> Iterator[T]:
    """Yield the result of each job, in order, while up to `count` more run. An error is raised in its job's place."""
    under_way: deque[Future[T]] = deque()
    for job in jobs:
        under_way.append(threads.submit(job))
        if len(under_way) > count:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def launch(count: int, arguments: list[str]) -> None:
    """Run a command in `count` processes on this machine. Raises A3Error for the first that fails."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logging.disable()  # torch's launcher would print a page for an error
    with tempfile.TemporaryDirectory(prefix="a3-") as folder:
        os.environ[ERROR_FOLDER] = folder
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id="a3",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        handlers = {number: signal.getsignal(number) for number in ELASTIC_HANDLES}
        try:
            elastic_launch(config, sys.executable)("-m", "a3cli", *arguments)
        except ChildFailedError as error:
            raise_first({rank: failure.exitcode for rank, failure in error.failures.items()}, Path(folder))
        except SignalException as error:
            raise KeyboardInterrupt from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            del os.environ[ERROR_FOLDER]
            logging.disable(logging.NOTSET)


@contextmanager
def without_output() -> Iterator[None]:
    """Discard stdout of processes that start in the block."""
    before = os.dup(1)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(before, 1)
            os.close(before)


def raise_first(codes: dict[int, int], folder: Path) -> None:
    """Raise the first failure: an error, a bug, or a killed process, which takes its peers with it."""
    files = {rank: folder / str(rank) for rank in sorted(codes)}
    said = {rank: file.read_text("utf-8", NAMES) for rank, file in files.items() if file.exists()}
    killed = [rank for rank, code in sorted(codes.items()) if code < 0 and -code != signal.SIGTERM]  # SIGTERM is ours
    causes = [rank for rank in said if codes[rank] not in (Interrupted.exit_code, -signal.SIGTERM)]
    bugs = [rank for rank, code in codes.items() if code > 0 and rank not in said]
    if bugs and not causes:
        sys.exit(INTERNAL_ERROR)  # its traceback has been printed; the others only lost a peer
    if killed and not causes:
        # Includes processes that the launcher killed since they did not end in time: it does not say which came first.
        deaths = " and ".join(f"process {rank} was killed ({signal.Signals(-codes[rank]).name})" for rank in killed)
        raise Interrupted(f"{deaths}; rerun the same command to resume")
    for rank in (*causes, *said):  # the first of them
        problem = A3Error(said[rank])
        problem.exit_code = codes[rank] if codes[rank] > 0 else Interrupted.exit_code
        raise problem
    raise Interrupted("all processes were terminated (SIGTERM); rerun the same command to resume")
