"""Turn errors into one line and an exit code; a bug keeps its traceback and has an exit code of its own."""

import errno
import os
import platform
import sys
import traceback
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from a3cli import __version__
from a3cli.cli.console import print_error
from a3cli.cli.options import UsageError
from a3cli.errors import INTERNAL_ERROR, A3Error
from a3cli.work.processes import StillRunning, hand_over

# Disk full, quota, file too large, no permission, read-only file system.
FIXABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)


class ErrorsToExitCodes(TyperGroup):
    """Turn errors into one line and an exit code; a bug keeps its traceback."""

    def main(  # type: ignore[override]
        self, args: Any = None, prog_name: str | None = None, **options: Any
    ) -> Any:
        """Run the command line under the name `a3`, which completion scripts need, also as `python -m a3cli`."""
        return super().main(args, prog_name or "a3", **options)

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse what stands before the command's name."""
        try:
            return super().make_context(*arguments, **options)
        except UsageError as error:
            fail_usage(error)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        from a3cli.work.interrupt import terminated_as_interrupted

        try:
            with terminated_as_interrupted():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except A3Error as error:
            fail(str(error), error.exit_code)
        except UsageError as error:
            fail_usage(error)
        except StillRunning:
            fail_at_once("interrupted; rerun the same command to resume", 3)
        except KeyboardInterrupt:
            fail("interrupted; no half-written file was left; rerun the same command to resume", 3)
        except BrokenPipeError:  # the parser ends the process silently
            raise
        except Exception as error:
            if problem := fixable(error):
                fail(str(problem), problem.exit_code)
            report_bug()


def fail_usage(error: Any) -> NoReturn:
    """Exit with the parser's error in one line: the nearest known option, and where all options are."""
    if type(error).__name__ == "NoArgsIsHelpError":  # only the help was asked for, and is printed
        raise error
    message = error.format_message()
    if near := getattr(error, "possibilities", None):
        message = f"{error.message.partition('(')[0].rstrip(' .')}. Did you mean {near[0]}?"
    fail(f"{message} (see {error.ctx.command_path if error.ctx else 'a3'} --help)", 2)


def fixable(error: Exception) -> A3Error | None:
    """Return an error that the user can fix as an A3Error; None if it is a bug."""
    if isinstance(error, OSError) and error.errno in FIXABLE:
        where = f" ({error.filename})" if error.filename else ""
        return A3Error(f"{error.strerror}{where}; no half-written file was left; fix this and rerun the same command")
    if isinstance(error, RuntimeError):
        from a3cli.work.machine import out_of_memory

        return out_of_memory(error)
    return None


def fail(message: str, code: int) -> NoReturn:
    if not hand_over(message):
        print_error(message)
    sys.exit(code)


def fail_at_once(message: str, code: int) -> NoReturn:
    """End the process without waiting for its threads."""
    if not hand_over(message):
        print_error(message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def report_bug() -> NoReturn:
    """Exit after a bug: print its traceback, and a last line that asks to report it."""
    traceback.print_exc()
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    sys.stderr.write(
        f"error: this is a bug in a3 (exit code {INTERNAL_ERROR}); please report it with the traceback above and these "
        f"versions: {versions}\n"
    )
    sys.exit(INTERNAL_ERROR)


def installed_versions() -> dict[str, str]:
    """Return the versions for a bug report, without other modules of a3, one of which may be broken."""
    import importlib.metadata

    versions = {"a3": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
