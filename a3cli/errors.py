"""The errors that a user can fix. Any other exception is a bug in a3 and keeps its traceback.

A message is one line: what, where (layer, component, file), why, what to do.
"""

INTERNAL_ERROR = 70  # exit code of a bug in a3, EX_SOFTWARE of sysexits.h: 1 means that a gate failed


class A3Error(Exception):
    """Something that the user can fix: bad input, a missing file, contradicting settings. Exit code 2."""

    exit_code = 2


class CannotWrite(A3Error):
    """The disk is full or a file may not be written; finished work is kept, and the same command resumes."""


class CannotRead(A3Error):
    """A file that was complete could not be read; finished work is kept, and the same command resumes."""


class OutOfMemory(A3Error):
    """A device has too little memory; finished work is kept, and the same command resumes, possibly elsewhere."""


class CheckFailed(A3Error):
    """A check or a gate that failed. Exit code 1."""

    exit_code = 1


class Interrupted(A3Error):
    """Stopped between two steps, by a signal or a time limit; the same command resumes. Exit code 3."""

    exit_code = 3


KINDS: dict[type, str] = {
    type(None): "nothing (null)",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def kind_of(value: object) -> str:
    """Return what a value of JSON or YAML is, in words."""
    return KINDS.get(type(value), type(value).__name__)


def first_line(error: Exception) -> str:
    """Return the first line of another library's error, shortened for a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
