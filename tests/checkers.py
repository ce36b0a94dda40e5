"""The checking process of `a3 verify`, forked from one that has done the imports: the same code, seconds faster.

Only the standard library is imported here: each fork reads this file again.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.faults.forks import CONTEXT


@contextmanager
def forked(command: list[str], environment: dict[str, str], stderr: int) -> Iterator[Any]:
    """Run `python SCRIPT REQUEST`, as `a3cli.stages.verify.running` does; all of its output is there at once."""
    _, script, request = command
    folder = Path(script).parent
    changed = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    process = CONTEXT.Process(target=_check, args=(script, request, changed), daemon=True)
    process.start()
    process.join()
    os.write(stderr, (folder / "forked.err").read_bytes())
    yield SimpleNamespace(stdout=StringIO((folder / "forked.out").read_text("utf-8")), returncode=process.exitcode)


def _check(script: str, request: str, environment: dict[str, str]) -> None:
    import runpy

    import torch
    import transformers.dynamic_module_utils

    os.environ.update(environment)
    torch.set_num_threads(1)
    modules = str(Path(script).parent / "modules")
    transformers.dynamic_module_utils.HF_MODULES_CACHE = modules
    sys.path[:0] = [modules]
    for name, number in (("forked.out", 1), ("forked.err", 2)):
        os.dup2(os.open(Path(script).parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.argv = [script, request]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
