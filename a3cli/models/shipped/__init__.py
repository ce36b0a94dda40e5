"""Code that is copied into per-layer exports and runs there: it imports torch and transformers, nothing of a3.

An export gets two files: the shared base, and the family's own, which imports the base from beside it.
"""

from importlib import import_module
from pathlib import Path
from typing import Any


def module_name(model_type: str) -> str:
    """Return the name of the module that holds a family's per-layer classes, without that of the package."""
    return f"modeling_a3_{model_type}"


def shipped_files(model_type: str) -> tuple[Path, ...]:
    """Return the files that a per-layer export of this family needs."""
    folder = Path(__file__).parent
    return tuple(folder / f"{module_name(kind)}.py" for kind in ("base", model_type))


def per_layer_class(model_type: str, name: str) -> Any:
    """Return a family's per-layer class."""
    return getattr(import_module(f"{__name__}.{module_name(model_type)}"), name)
