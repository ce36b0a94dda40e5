"""Run commands on a pseudo-terminal, one after another, in one process forked from a clean one.

This module imports only the standard library, since each fork imports it again.
"""

import fcntl
import os
import re
import struct
import sys
import termios
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.helpers.forks import CONTEXT

END = "\x1e"  # the child prints it after each command, with the exit code between two of them
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[=>78]")


@dataclass(frozen=True)
class Terminal:
    """`TERM` and the reported size; rich takes a dumb terminal for 80 columns wide, whatever the size."""

    name: str
    columns: int
    rows: int


@dataclass(frozen=True)
class Shown:
    """The output of one command on the terminal, and its exit code."""

    code: int
    raw: str

    @property
    def text(self) -> str:
        """Return the output without colours and cursor movements."""
        return ESCAPES.sub("", self.raw)

    @property
    def lines(self) -> list[str]:
        """Return the lines as printed, before the terminal wraps them; each state of a bar is one line."""
        return [line for line in re.split(r"[\r\n]+", self.text) if line]


def run_all(commands: Sequence[Sequence[object]], folder: Path, terminal: Terminal | None) -> list[Shown]:
    """Run each `a3 …` in `folder` and return its terminal output; without a terminal, its output to a file."""
    words = [[str(word) for word in command] for command in commands]
    printed = on_terminal(words, folder, terminal) if terminal else to_file(words, folder)
    pieces = printed.decode().split(END)
    return [Shown(int(code), raw) for raw, code in zip(pieces[::2], pieces[1::2], strict=False)]


def on_terminal(commands: list[list[str]], folder: Path, terminal: Terminal) -> bytes:
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", terminal.rows, terminal.columns, 0, 0))
    process = start(commands, folder, terminal.name, os.ttyname(slave))
    printed = b""
    while master in wait([master, process.sentinel]):  # until the process has ended and everything is read
        printed += os.read(master, 1 << 16)
    process.join()
    os.close(slave)
    os.close(master)
    return printed


def to_file(commands: list[list[str]], folder: Path) -> bytes:
    output = folder / ".printed"
    output.touch()
    start(commands, folder, "xterm-256color", str(output)).join()
    return output.read_bytes()


def start(commands: list[list[str]], folder: Path, term: str, output: str) -> BaseProcess:
    process = CONTEXT.Process(target=_run_all, args=(commands, str(folder), term, output), daemon=True)
    process.start()
    return process


def _run_all(commands: list[list[str]], folder: str, term: str, output: str) -> None:
    import torch
    import typer
    from transformers import dynamic_module_utils

    from a3cli.cli import app as cli
    from a3cli.stages import verify
    from tests.helpers.checkers import forked_here
    from tests.helpers.hasty import make_hasty_for_good

    make_hasty_for_good()
    verify.running = forked_here
    torch.set_num_threads(1)
    os.chdir(folder)
    # Python otherwise looks for this code in the folder of the tests' own process.
    dynamic_module_utils.HF_MODULES_CACHE = f"{folder}/.modules"
    sys.path.insert(0, dynamic_module_utils.HF_MODULES_CACHE)
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        os.environ.pop(name, None)
    os.environ["TERM"] = term
    opened = os.open(output, os.O_RDWR | os.O_NOCTTY)
    for number in (0, 1, 2):
        os.dup2(opened, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", buffering=1, closefd=False) for number in (1, 2))
    cli.app = typer.main.get_command(cli.app)  # the parser, built once
    for words in commands:
        sys.argv = ["a3", *words]
        code: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        sys.stdout.write(f"{END}{code}{END}")
        sys.stdout.flush()
