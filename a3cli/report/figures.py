"""Format figures: shares, sizes before and after, byte counts. Nothing here needs torch or a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from a3cli.settings import COMPONENTS, Component

if TYPE_CHECKING:
    from a3cli.work.manifests import Solution

TITLES: dict[Component, str] = {"qk": "QK", "ov": "OV", "mlp": "MLP"}
UNITS = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True)
class Comparison:
    """A size or cost before and after: one row of a table. `after` has one value, or one per layer."""

    key: str
    label: str
    before: int
    after: Sequence[int]

    @property
    def share(self) -> float:
        """Return the remaining fraction of the size."""
        return sum(self.after) / len(self.after) / self.before


def compare(solution: "Solution", labels: Mapping[str, str]) -> list[Comparison]:
    """Return the rows of a before/after table: the sizes of components and the costs that `labels` names."""
    rows = []
    for key, label in labels.items():
        if key in COMPONENTS:
            before, after = getattr(solution.full_size, key), [getattr(sizes, key) for sizes in solution.sizes]
        else:
            change = getattr(solution, key)
            before, after = change.before, [change.after]
        rows.append(Comparison(key, label, before, after))
    return rows


def spread(values: Sequence[int]) -> str:
    """Return one size, or its range and mean if it differs by layer."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}, mean {sum(values) / len(values):,.1f}"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def asked(budget: float | None) -> str:
    """Return a budget as it was asked for, empty if budgets were given per component."""
    return "" if budget is None else f"{100 * budget:g} %"


def human_bytes(count: float) -> str:
    return human(count) + "B"


def human(count: float) -> str:
    """Format a count with three digits and a unit: `1.23 G`."""
    power = 0
    while count >= 999.5 and power < len(UNITS) - 1:
        count /= 1000
        power += 1
    return f"{count:.3g} {UNITS[power]}"
