"""The environment of all tests, set before any library reads it at import: no network, no chatter."""

import os

from a3cli.cli.console import silence_libraries

os.environ["HF_HUB_OFFLINE"] = "1"
silence_libraries()
