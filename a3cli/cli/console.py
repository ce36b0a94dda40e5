"""Print lines, sentences, errors, log lines and JSON on a terminal or to a file. Results go to stdout, all else to
stderr.
"""

import json
import logging
import math
import os
import sys
from typing import Any, Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from a3cli.work.escape import printable
from a3cli.work.processes import is_main

Json = dict[str, Any]
log = logging.getLogger("a3cli")


class HasJson(Protocol):
    """A manifest or another result that has a form as JSON."""

    def plain(self) -> Json: ...


def set_up_output(*, quiet: bool) -> None:
    """Set up a3's log lines, and silence the libraries, whose output would be mixed into a3's."""
    silence_libraries()
    set_up_logging(quiet=quiet or not is_main())


def silence_libraries() -> None:
    """Silence libraries through the environment, which they read when imported; a3's errors report bad input."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the evaluation harness


def set_up_logging(*, quiet: bool = False) -> None:
    """Send a3's log lines to stderr: plain text unless it is a terminal, only warnings if `quiet`."""
    stderr = open_console(stderr=True, soft_wrap=False)
    handler = TerminalHandler(stderr) if stderr.is_terminal else logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.propagate = False


class TerminalHandler(logging.Handler):
    """Print log lines above the progress bar, if its console draws one."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        print_wrapped(self.console, self.format(record))


class PrintableFormatter(logging.Formatter):
    """Escape control characters, which names of files in a message may have."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, the library's name
        return printable(super().formatMessage(record))


def print_error(message: str) -> None:
    """Print an error as one line on stderr, with control characters of file names escaped."""
    line = printable(" ".join(message.split()))
    open_console(stderr=True).print(Text.assemble(("error:", "bold red"), " ", line))


def print_json(result: Json | HasJson) -> None:
    """Print a result as JSON on stdout; NaN and infinite figures become null, since JSON does not have them."""
    content = result if isinstance(result, dict) else result.plain()
    sys.stdout.write(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_line(line: str) -> None:
    """Print a line unwrapped: where the terminal breaks it, a name can still be copied whole."""
    open_console().print(line)


def print_sentence(sentence: str | Text) -> None:
    """Print a sentence: on a terminal wrapped between words, elsewhere as one line."""
    if sys.stdout.isatty():
        print_wrapped(open_console(soft_wrap=False), sentence)
    else:
        open_console().print(sentence)


def print_wrapped(console: Console, text: str | Text) -> None:
    """Print text that is wrapped between words; a word that is longer than a line stays whole."""
    whole = Text(text) if isinstance(text, str) else text
    console.print(Text(break_lines(whole.plain, console.width), spans=whole.spans), soft_wrap=True)


def break_lines(text: str, width: int) -> str:
    """Replace spaces by line ends so that lines of several words are at most `width` columns wide."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def log_console() -> Console:
    """Return the console of the log lines; the progress bar must be drawn on the same one."""
    handlers = (handler for handler in log.handlers if isinstance(handler, TerminalHandler))
    return next((handler.console for handler in handlers), open_console(stderr=True, soft_wrap=False))


def open_console(*, stderr: bool = False, soft_wrap: bool = True, width: int | None = None) -> Console:
    """Return a console that prints text without interpreting it: `[b]` is not markup, `:cat:` is not an emoji."""
    return Console(stderr=stderr, soft_wrap=soft_wrap, width=width, markup=False, emoji=False, highlight=False)
