"""Names of solutions and of Hub repositories."""

import re
from decimal import Decimal
from typing import Annotated

from pydantic import AfterValidator, Field

from a3cli.settings.options import OUTPUT

SOLUTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# As the Hub has them; the owner may be left out.
REPOSITORY = re.compile(
    r"([A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?/)?[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
)


def check_name(name: str) -> str:
    """Check that a name can be a folder's name, and never that of an unfinished solution, which begins with a dot."""
    if not SOLUTION_NAME.fullmatch(name):
        raise ValueError("use up to 100 letters, digits, '.', '_' and '-', with a letter or digit first")
    return name


def name_of_budget(budget: float) -> str:
    """Return the name of a solution among those of several budgets: q25 for 0.25, q12.5 for 0.125."""
    return f"q{(100 * Decimal(str(budget))).normalize():f}"


def check_repository(name: str) -> str:
    """Check that the Hub can have a repository of this name, with or without its owner."""
    if not REPOSITORY.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
        raise ValueError(
            "must have the form OWNER/NAME, of letters, digits, '.', '_' and '-', up to 96 each, "
            "without '--', '..' and '.git'"
        )
    return name


SolutionName = Annotated[
    Annotated[str, AfterValidator(check_name)] | None,
    OUTPUT,
    Field(description="Name of the solution, to keep several (default: none)."),
]
PushToHub = Annotated[
    Annotated[str, AfterValidator(check_repository)] | None,
    OUTPUT,
    Field(description="Upload to this Hub repository, OWNER/NAME."),
]
Public = Annotated[bool, OUTPUT, Field(description="Create that repository public (default: private).")]
