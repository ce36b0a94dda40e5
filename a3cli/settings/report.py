"""Settings of the HTML page."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from a3cli.settings import Settings
from a3cli.settings.budgets import Memory
from a3cli.settings.options import OUTPUT


class ServingSettings(Settings):
    """What the page shows beside what is known of the folder."""

    memory: Memory = None


class ReportSettings(ServingSettings):
    """The page as recipes have it."""

    html: Annotated[Path, OUTPUT, Field(description="Write the page to this file.")]
