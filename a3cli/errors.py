"""The errors that a user meets. Everything else that is raised is a bug of ours and keeps its traceback.

A message is one line: what, where (layer, component, file), why, what to do.
"""

INTERNAL_ERROR = 70  # exit code of a bug of ours, EX_SOFTWARE of sysexits.h: 1 would say that a gate failed


class A3Error(Exception):
    """Something that the user can mend: bad input, a missing file, settings that do not fit. Exit code 2."""

    exit_code = 2


class CannotWrite(A3Error):
    """The disk is full or a file may not be written; what was finished before stays, and the same command goes on."""


class CannotRead(A3Error):
    """A file could not be read, though it was whole before; what was finished stays, and the same command resumes."""


class OutOfMemory(A3Error):
    """A device is too small; what was finished before stays, and the same command goes on, perhaps elsewhere."""


class CheckFailed(A3Error):
    """A check that ran to its end and found its subject wanting. Exit code 1."""

    exit_code = 1


class Interrupted(A3Error):
    """Stopped between two steps, by a signal or a time limit; the same command goes on. Exit code 3."""

    exit_code = 3


def first_line(error: Exception) -> str:
    """What another library's error says, short enough for a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
