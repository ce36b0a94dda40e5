"""Choose sizes for a budget from error curves."""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from a3cli.errors import A3Error
from a3cli.methods import Curves
from a3cli.models import costs
from a3cli.models.families import Family, LayerSizes, ModelShape
from a3cli.settings import COMPONENTS, Component, PlanSettings, SolveSettings
from a3cli.solvers.allocate import Choice, allocate

Items = list[list[Choice]]


def choose_sizes(
    settings: SolveSettings, shape: ModelShape, curves: list[Curves], family: Family | None = None
) -> list[LayerSizes]:
    """Return each layer's sizes for the budget. Raises A3Error if rounding or components do not allow it.

    The error says why the family keeps heads whole, if it does.
    """
    attention, mlp = per_layer_items(shape, curves) if settings.shape == "per-layer" else stock_items(shape, curves)
    weights = costs.attention_weights(shape, shape.sizes), costs.mlp_weights(shape, shape.sizes)
    why = family.why_whole(settings.shape) if family else None
    attention = keep_to_budget(attention, settings.attention_budget, weights[0], "attention", settings, why)
    mlp = keep_to_budget(mlp, settings.mlp_budget, weights[1], "MLP", settings)
    total = sum(weights)
    try:
        chosen = allocate([*attention, *mlp], weights_to_remove(settings.budget or 0.0, total))
    except ValueError:
        most = sum(max(choice.removed for choice in item) for item in [*attention, *mlp])
        raise A3Error(
            f"budget {settings.budget} cannot be reached: {','.join(settings.cut)} with "
            f"{multiples_of(settings, settings.cut)} remove at most {most / total:.4f}{in_brackets(why)}; "
            f"lower the budget, the multiples or the least sizes ({', '.join(least_sizes(settings.cut))})"
            + (", or use --shape per-layer" if why and settings.shape == "stock" else "")
        ) from None
    heads, widths = [c.size for c in chosen[: len(attention)]], [c.size for c in chosen[len(attention) :]]
    if settings.shape == "stock":
        return [LayerSizes(heads[0], heads[0], widths[0])] * shape.layers
    return [LayerSizes(*sizes) for sizes in zip(heads[0::2], heads[1::2], widths, strict=True)]


def stock_items(shape: ModelShape, curves: list[Curves]) -> tuple[Items, Items]:
    """Return two items to choose: one head size for QK and OV of all layers, and one MLP width."""
    total = {c: {size: sum(curve[c][size] for curve in curves) for size in curves[0][c]} for c in curves[0]}
    heads = sorted(total["qk"].keys() & total["ov"].keys())
    attention = [
        Choice(r, shape.layers * removed_weights(shape, qk=r, ov=r), total["qk"][r] + total["ov"][r]) for r in heads
    ]
    mlp = [Choice(m, shape.layers * removed_weights(shape, mlp=m), loss) for m, loss in total["mlp"].items()]
    return [attention], [mlp]


def per_layer_items(shape: ModelShape, curves: list[Curves]) -> tuple[Items, Items]:
    """Return the items to choose: QK and OV of each layer in turn, and the MLP of each layer."""
    items: dict[Component, Items] = {
        component: [
            [Choice(size, removed_weights(shape, **{component: size}), loss) for size, loss in curve[component].items()]
            for curve in curves
        ]
        for component in COMPONENTS
    }
    return [item for pair in zip(items["qk"], items["ov"], strict=True) for item in pair], items["mlp"]


def removed_weights(shape: ModelShape, **sizes: int) -> int:
    """Return the weights removed from one layer if its components `qk`, `ov` or `mlp` have these sizes."""
    full = shape.sizes[0]
    return costs.linear_weights(shape, [full]) - costs.linear_weights(shape, [replace(full, **sizes)])


def keep_to_budget(
    items: Items, budget: float | None, weights: int, name: str, settings: SolveSettings, why: str | None = None
) -> Items:
    """Restrict the choices of attention or the MLP to those that its own budget selects.

    `why` says in an error why these are fewer than for other models.
    """
    if budget is None:
        return items
    try:
        return [[choice] for choice in allocate(items, weights_to_remove(budget, weights))]
    except ValueError:
        multiple = settings.head_multiple if name == "attention" else settings.mlp_multiple
        most = sum(max(choice.removed for choice in item) for item in items) / weights
        raise A3Error(
            f"{name} budget {budget} cannot be reached: multiples of {multiple} remove at most "
            f"{most:.4f}{in_brackets(why)}; lower the budget, the multiple or the least size"
        ) from None


def weights_to_remove(budget: float, weights: int) -> int:
    """Return the budget's share of the weights, rounded up; exact for the decimal number as typed."""
    return math.ceil(Fraction(str(budget)) * weights)


def multiples_of(settings: SolveSettings | PlanSettings, cut: Sequence[Component]) -> str:
    """Return the multiples to which the sizes of these components are rounded, for a message."""
    heads = [f"head multiple {settings.head_multiple}"] if {"qk", "ov"} & {*cut} else []
    mlp = [f"MLP multiple {settings.mlp_multiple}"] if "mlp" in cut else []
    return " and ".join(heads + mlp)


def least_sizes(cut: Sequence[Component]) -> list[str]:
    """Return the options of the least sizes of these components."""
    return ["--min-head"] * bool({"qk", "ov"} & {*cut}) + ["--min-mlp"] * ("mlp" in cut)


def in_brackets(why: str | None) -> str:
    return f" ({why})" if why else ""
