"""Fork the checking process of `a3 verify` from one that has done the imports: the same code, seconds faster.

This module imports only the standard library, since each fork imports it again.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.helpers.forks import CONTEXT


@contextmanager
def forked(command: list[str], environment: dict[str, str], stderr: int) -> Iterator[Any]:
    """Run `python SCRIPT REQUEST` like `a3cli.stages.verify.running`, but yield all of its output at once."""
    process = CONTEXT.Process(target=_check, args=(command, environment), daemon=True)
    process.start()
    process.join()
    yield _ended(command, process.exitcode, stderr)


@contextmanager
def forked_here(command: list[str], environment: dict[str, str], stderr: int) -> Iterator[Any]:
    """Do the same in a fork of this process, which must compute on one thread."""
    child = os.fork()
    if child == 0:
        try:
            _check(command, environment)
        except BaseException:
            os._exit(1)
        os._exit(0)
    yield _ended(command, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stderr)


def _ended(command: list[str], code: int | None, stderr: int) -> Any:
    folder = Path(command[1]).parent
    os.write(stderr, (folder / "forked.err").read_bytes())
    return SimpleNamespace(stdout=StringIO((folder / "forked.out").read_text("utf-8")), returncode=code)


def _check(command: list[str], environment: dict[str, str]) -> None:
    import runpy

    import torch
    import transformers.dynamic_module_utils

    _, script, request = command
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
    torch.set_num_threads(1)
    modules = str(Path(script).parent / "modules")
    transformers.dynamic_module_utils.HF_MODULES_CACHE = modules
    sys.path[:0] = [modules]
    for name, number in (("forked.out", 1), ("forked.err", 2)):
        os.dup2(os.open(Path(script).parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = [script, request]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
