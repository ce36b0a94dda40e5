"""Set the environment of all tests before any library reads it at import: no network, no progress output."""

import os

from a3cli.cli.console import silence_libraries

os.environ["HF_HUB_OFFLINE"] = "1"
silence_libraries()
