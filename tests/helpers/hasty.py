"""Few steps of refinement of query and key maps, for tests of properties that hold after any number."""

from typing import Any

from a3cli.methods import maps
from a3cli.methods.attention import Effort

FEW = {"QUICK": Effort(iterations=2, few=True), "THOROUGH": Effort(iterations=4)}


def make_hasty(patch: Any) -> None:
    """Limit the steps with pytest's `patch`, which restores them."""
    for name, effort in FEW.items():
        patch.setattr(maps, name, effort)


def make_hasty_for_good() -> None:
    """Limit the steps in a process of its own."""
    for name, effort in FEW.items():
        setattr(maps, name, effort)
