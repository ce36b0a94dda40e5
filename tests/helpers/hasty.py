"""Few steps of refinement and few tokens to measure, for tests of properties that hold with any number."""

from typing import Any

from a3cli.methods import maps
from a3cli.methods.attention import Effort
from a3cli.models import costs

FEW = [
    (maps, "QUICK", Effort(iterations=2, few=True)),
    (maps, "THOROUGH", Effort(iterations=4)),
    (costs, "MEASURED_TOKENS", 64),
    (costs, "GRADIENT_TOKENS", 64),
]


def make_hasty(patch: Any) -> None:
    """Limit the steps with pytest's `patch`, which restores them."""
    for module, name, value in FEW:
        patch.setattr(module, name, value)


def make_hasty_for_good() -> None:
    """Limit the steps in a process of its own."""
    for module, name, value in FEW:
        setattr(module, name, value)
