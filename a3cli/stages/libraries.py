"""Keep the libraries' own output out of that of whoever calls a3 from Python."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars  # type: ignore[attr-defined]
from transformers.utils import logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Turn off bars and advice of transformers and the Hub's client; restore their settings afterwards."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    bars_of_hub = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # the client's too
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the client warns if the environment forbids its bars
            if bars:
                logging.enable_progress_bar()
            if bars and not bars_of_hub:
                disable_progress_bars()
