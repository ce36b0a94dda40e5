"""The `a3` command, and `python -m a3cli` for `accelerate launch -m a3cli` and where there is no console script."""

import os
import sys


def main() -> None:
    """Run the command line in a process whose file names are UTF-8."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":  # ignored by python -E
        restart_in_utf8_mode()
    from a3cli.cli.app import main as command_line

    command_line()


def restart_in_utf8_mode() -> None:
    """Replace this process by one with `PYTHONUTF8=1`, which all that it starts inherit.

    In another locale, like C, Python hands file names on in a form that the tokenizers' and other libraries refuse.
    """
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606, the same command again


if __name__ == "__main__":
    main()
