"""Run the README's five commands on a terminal of 80 columns, and write what they show to docs/transcript.md.

    python scripts/transcript.py

The model and the text are those of `demo/`. The terminal is a pseudo-terminal, and its content is read as a person sees
it: bars that were erased are gone, and lines are broken where the terminal breaks them.
"""

import argparse
import os
import pty
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyte

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "transcript.md"
COLUMNS, ROWS = 80, 1000  # rows of the screen that is read; more than all commands print
COMMANDS = (
    "a3 calibrate demo/model --dataset demo/text/calibration.txt --samples 64",
    "a3 solve --budget 0.25",
    "a3 export out/",
    "a3 verify out/",
    "a3 eval out/ --against demo/model --dataset demo/text/evaluation.txt",
)
HEADING = """# What the commands show

The five commands of the [README](../README.md) on a terminal of 80 columns, with the small model and the text of
`demo/`. `python scripts/transcript.py` makes this page.

```
"""


def transcript() -> str:
    """Return the commands and what the terminal shows after each of them. Raises SystemExit if one fails."""
    with tempfile.TemporaryDirectory(prefix="a3-transcript-") as temporary:
        shutil.copytree(ROOT / "demo", Path(temporary) / "demo")
        shown = [f"$ {command}\n{show(command, Path(temporary))}" for command in COMMANDS]
    return HEADING + "\n\n".join(shown) + "\n```\n"


def show(command: str, folder: Path) -> str:
    """Run one command in `folder` and return the terminal's content at its end."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    for printed in run(command, folder):
        stream.feed(printed)
    return "\n".join(line.rstrip() for line in screen.display).rstrip()


def run(command: str, folder: Path) -> Iterator[bytes]:
    """Yield what a command prints on a pseudo-terminal."""
    words = [sys.executable, "-m", "a3cli", *shlex.split(command)[1:]]
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execve(words[0], words, environment())
    while printed := read(terminal):
        yield printed
    os.close(terminal)
    if code := os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        raise SystemExit(f"exit code {code}: {command}")


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux's way to say that the other side is closed
        return b""


def environment() -> dict[str, str]:
    sized = {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": "24"}
    return {**os.environ, **sized, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=TARGET, help="file to write (default: docs/transcript.md)")
    parser.parse_args().output.write_text(transcript(), "utf-8")


if __name__ == "__main__":
    main()
