"""Format figures: shares, sizes before and after, byte counts. Nothing here needs torch or a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from a3cli.settings import COMPONENTS, Component
from a3cli.settings.budgets import given_budgets

if TYPE_CHECKING:
    from a3cli.settings import PlanSettings, SolveSettings
    from a3cli.work.manifests import Change, MeasuredLoss, Solution

Format = Callable[[float], str]
TITLES: dict[Component, str] = {"qk": "QK", "ov": "OV", "mlp": "MLP"}
UNITS = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True)
class Comparison:
    """A row of a before/after table: a size or cost as it is shown, and the remaining fraction, None of nothing."""

    label: str
    before: str
    after: str
    share: float | None


def compare(
    solution: "Solution", labels: Mapping[str, str], shown: Mapping[str, Format] = MappingProxyType({})
) -> list[Comparison]:
    """Return a row for each size or cost of `labels`, the short forms of which are made by `shown`."""
    return [compare_one(label, *before_after(solution, key), shown.get(key)) for key, label in labels.items()]


def before_after(solution: "Solution", key: str) -> tuple[int, list[int]]:
    """Return a size or cost before, and after: one value, or one per layer."""
    if key in COMPONENTS:
        return getattr(solution.full_size, key), [getattr(sizes, key) for sizes in solution.sizes]
    change: Change = getattr(solution, key)
    return change.before, [change.after]


def compare_one(label: str, before: int, after: Sequence[int], show: Format | None = None) -> Comparison:
    share = sum(after) / len(after) / before
    if show:
        return Comparison(label, show(before), show(after[0]), share)
    return Comparison(label, f"{before:,}", spread(after), share)


def spread(values: Sequence[int]) -> str:
    """Return one size, or its range and mean if it differs by layer."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}, mean {sum(values) / len(values):,.1f}"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def describe_loss(found: "MeasuredLoss") -> str:
    """Return in a sentence how much worse a solution predicts text."""
    which = "that were held out" if found.held_out else "of the calibration itself, where the loss is smallest"
    before, after = found.perplexity.before, found.perplexity.after
    return (
        f"on {found.tokens:,} tokens {which}, perplexity goes from {before:.4g} to {after:.4g} "
        f"({after / before - 1:+.1%}), and the most likely next token stays the same at {found.top1_agreement:.0%} of "
        "positions"
    )


def asked(budget: float) -> str:
    """Return the fraction of a budget as it was asked for."""
    return f"{100 * budget:g} %"


def describe_budgets(settings: "SolveSettings | PlanSettings") -> str:
    """Return what settings ask for, like `25 %`, `40 % of the KV cache` or `at most 10 GB`."""
    given = {name: getattr(settings, name) for name in given_budgets(settings)}
    whole = " of the weights" if len(given) > 1 else ""
    said: dict[str, Callable[[Any], str]] = {
        "budget": lambda share: f"{asked(share)}{whole}",
        "budget_bytes": lambda most: f"at most {human_bytes(most)}",
        "budget_params": lambda most: f"at most {human(most)} parameters",
        "kv_budget": lambda share: f"{asked(share)} of the KV cache",
        "attention_budget": lambda share: f"{asked(share)} of attention",
        "mlp_budget": lambda share: f"{asked(share)} of the MLP",
    }
    return " and ".join(said[name](value) for name, value in given.items())


def human_bytes(count: float) -> str:
    return human(count) + "B"


def human(count: float) -> str:
    """Format a count with three digits and a unit: `1.23 G`."""
    power = 0
    while count >= 999.5 and power < len(UNITS) - 1:
        count /= 1000
        power += 1
    return f"{count:.3g} {UNITS[power]}"
