"""a3: smaller language models in closed form (A³, arXiv 2505.12942).

    import a3cli
    a3cli.compress("meta-llama/Llama-3.1-8B", "out", budget=0.25)

The functions are those of `a3cli.stages.api`, which is imported, with torch, when the first of them is used.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from a3cli.errors import A3Error

if TYPE_CHECKING:
    from a3cli.stages.api import calibrate, compress, evaluate, export, plan, solve, verify

__version__ = "0.1.0"
__all__ = ["A3Error", "__version__", "calibrate", "compress", "evaluate", "export", "plan", "solve", "verify"]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a program without logging prints nothing of a3's


def __getattr__(name: str) -> Any:
    """Return a function of `a3cli.stages.api`."""
    if name in __all__:
        return getattr(importlib.import_module("a3cli.stages.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
