"""Settings of `a3 report`."""

from a3cli.settings import Settings
from a3cli.settings.budgets import Memory


class ReportSettings(Settings):
    """What the page shows beside what is known of the folder."""

    memory: Memory = None
