"""Names of solutions."""

import re

SOLUTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str) -> str:
    """Check that a name can be a folder's name, and never that of an unfinished solution, which begins with a dot."""
    if not SOLUTION_NAME.fullmatch(name):
        raise ValueError("use up to 100 letters, digits, '.', '_' and '-', with a letter or digit first")
    return name
