"""Run the command line in processes forked from one that has done the imports; they may be killed or limited.

This module imports only the standard library, since each fork imports it again.
"""

import multiprocessing
import os
import resource
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = [
    "a3cli.stages.calibrate", "a3cli.stages.solve", "a3cli.stages.export", "a3cli.stages.evaluate",
    "a3cli.stages.verify",
    "a3cli.cli.display", "a3cli.cli.app",
    "a3cli.models.shipped.modeling_a3_llama", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama", "transformers.generation", "datasets",
]  # fmt: skip
OUTPUTS = (".stdout", ".stderr", ".peak")
# Shared by all tests: the modules to preload can be set only once, before the first fork.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Ended:
    """How a process ended: `code` is negative after a signal, None after a timeout; `memory` is the peak in bytes."""

    code: int | None
    stdout: str
    stderr: str
    memory: int


def start(arguments: tuple[object, ...], folder: Path, *, memory: int | None = None) -> BaseProcess:
    """Start `a3 …` in `folder`, where its output is written; return when it is about to run."""
    ready, begun = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run, args=([str(a) for a in arguments], str(folder), memory, begun), daemon=True)
    process.start()
    begun.close()
    ready.recv()
    return process


def run(arguments: tuple[object, ...], folder: Path, *, seconds: float = 120, memory: int | None = None) -> Ended:
    """Run `a3 …` to its end. `memory` limits the bytes that it may map in addition to those of the imports."""
    process = start(arguments, folder, memory=memory)
    process.join(seconds)
    code = process.exitcode
    process.kill()
    process.join()
    peak = folder / ".peak"
    found = int(peak.read_text()) if peak.exists() else 0
    peak.unlink(missing_ok=True)
    texts = [(folder / name).read_text("utf-8", errors="replace") for name in (".stdout", ".stderr")]
    return Ended(code, *texts, found)


def kill_after(delay: float, arguments: tuple[object, ...], folder: Path) -> int:
    """Send SIGKILL `delay` seconds after the command began; return its exit code (0 if it had finished)."""
    process = start(arguments, folder)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(arguments: list[str], folder: str, memory: int | None, begun) -> None:
    import torch

    from a3cli.cli.app import main
    from a3cli.stages import verify
    from tests.helpers.checkers import forked_here
    from tests.helpers.hasty import make_hasty_for_good

    make_hasty_for_good()
    verify.running = forked_here
    torch.set_num_threads(1)
    os.chdir(folder)
    for name, number in ((".stdout", 1), (".stderr", 2)):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
    if memory is not None:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
    sys.argv = ["a3", *arguments]
    begun.send(None)
    begun.close()
    try:
        main()
    finally:
        sys.stdout.flush()
        Path(folder, ".peak").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
