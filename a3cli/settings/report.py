"""Settings of the HTML page, as recipes have them."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from a3cli.settings import Settings
from a3cli.settings.options import OUTPUT


class ReportSettings(Settings):
    html: Annotated[Path, OUTPUT, Field(description="Write the page to this file.")]
