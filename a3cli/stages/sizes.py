"""Choose sizes for budgets from error curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from a3cli.errors import A3Error
from a3cli.methods import Curves
from a3cli.models import costs, uniform
from a3cli.models.families import Family, LayerSizes, ModelShape
from a3cli.report.figures import human_bytes
from a3cli.settings import COMPONENTS, Component, PlanSettings, SolveSettings
from a3cli.solvers.allocate import Choice, allocate, allocate_jointly
from a3cli.work.progress import advance

Items = list[list[Choice]]
HEADS: set[Component] = {"qk", "ov"}


def default_components(settings: SolveSettings | PlanSettings, family: Family) -> tuple[Component, ...]:
    """Return the components that are cut without --components: those that need no norm of another size.

    A budget of attention or of the KV cache that these cannot meet cuts all that the method can.
    """
    default = family.compressible(settings.shape)
    asked = settings.kv_budget or getattr(settings, "attention_budget", None)
    return possible_components(settings, family) if asked and not HEADS & {*default} else default


def possible_components(settings: SolveSettings | PlanSettings, family: Family) -> tuple[Component, ...]:
    """Return the components that may be named; a plan does not say the method, which is `best` by default."""
    return family.possible(settings.shape, getattr(settings, "method", "best"))


def why_whole(settings: SolveSettings | PlanSettings, cut: Sequence[Component], family: Family) -> str | None:
    """Return why query and key heads stay whole; None if they are among the components that are cut."""
    return None if "qk" in cut else family.why_whole(settings.shape)


@dataclass(frozen=True)
class Stored:
    """All weights of the source: how many, their bytes, and the bytes of one."""

    parameters: int
    bytes: int
    item: int


@dataclass(frozen=True)
class Need:
    """What must be removed at least: so much of what `count` counts, and so many values of the KV cache for one token.

    The budget of the whole is None if there is none.
    """

    whole: int | None
    count: uniform.Count
    cached: int | None


def find_need(settings: SolveSettings | PlanSettings, shape: ModelShape, stored: Stored) -> Need:
    """Return what the budgets demand. Raises A3Error if the source is smaller than the result may be."""
    cached = None
    if settings.kv_budget is not None:
        cached = costs.share_of(settings.kv_budget, costs.kv_bytes_per_token(shape, shape.sizes, 1))
    if settings.budget is not None:
        weights = costs.linear_weights(shape, shape.sizes)
        return Need(costs.share_of(settings.budget, weights), costs.linear_weights, cached)
    above = parameters_above(settings, stored)
    if above is not None and above < 0:
        size = describe_size(settings, 0, stored)
        raise A3Error(f"{describe_target(settings)}: the source is already smaller, with {size}; give a lower one")
    return Need(above, costs.shrinking_parameters, cached)


def parameters_above(settings: SolveSettings | PlanSettings, stored: Stored) -> int | None:
    """Return how many parameters are above the largest size of the result, or None if that is not limited."""
    if settings.budget_params is not None:
        return stored.parameters - settings.budget_params
    if settings.budget_bytes is not None:
        return -((settings.budget_bytes - stored.bytes) // stored.item)
    return None


def describe_target(settings: SolveSettings | PlanSettings) -> str:
    """Return the budget of the whole as an option with its value."""
    if settings.budget_bytes is not None:
        return f"--budget-bytes {human_bytes(settings.budget_bytes)}"
    if settings.budget_params is not None:
        return f"--budget-params {settings.budget_params:,}"
    return f"budget {settings.budget}"


def describe_size(settings: SolveSettings | PlanSettings, removed: int, stored: Stored) -> str:
    """Return the size without so many parameters, in the unit of the budget."""
    if settings.budget_bytes is None:
        return f"{stored.parameters - removed:,} parameters"
    left = stored.bytes - removed * stored.item
    return f"{human_bytes(left)} ({left:,} bytes)"


def choose_sizes(
    settings: SolveSettings, shape: ModelShape, curves: list[Curves], stored: Stored, family: Family
) -> list[LayerSizes]:
    """Return each layer's sizes for the budgets. Raises A3Error if rounding or components do not allow them."""
    need = find_need(settings, shape, stored)
    heads, mlp = find_items(settings, shape, curves, costs.linear_weights)
    heads = keep_to_budget(heads, settings.attention_budget, costs.attention_weights, shape, settings, family)
    mlp = keep_to_budget(mlp, settings.mlp_budget, costs.mlp_weights, shape, settings, family)
    if need.whole is None and need.cached is not None and settings.mlp_budget is None:
        mlp = [[max(item, key=lambda choice: choice.size)] for item in mlp]
    if need.count is not costs.linear_weights:
        counted = find_items(settings, shape, curves, need.count)
        heads, mlp = recount(heads, counted[0]), recount(mlp, counted[1])
    check_reach(settings, need, shape, stored, [*heads, *mlp], family)
    if need.cached is None:
        chosen = allocate([*heads, *mlp], need.whole or 0, advance)
        return as_sizes(settings, shape, chosen[: len(heads)], chosen[len(heads) :])
    parts = [heads] if settings.shape == "stock" else [heads[0::2], heads[1::2]]
    *of_heads, widths = allocate_jointly(parts, mlp, need.whole or 0, need.cached, advance)
    return as_sizes(settings, shape, [head for layer in zip(*of_heads, strict=True) for head in layer], widths)


def planned_size(
    settings: PlanSettings, shape: ModelShape, stored: Stored, family: Family, head_multiple: int, mlp_multiple: int
) -> LayerSizes | None:
    """Return sizes for all layers that meet the budgets and cut what the family allows alike, or None if none do.

    With a budget of the KV cache alone the MLP keeps its width.
    """
    need = find_need(settings, shape, stored)
    return uniform.equal_cuts(
        shape,
        need.whole or 0,
        need.count,
        head_multiple=head_multiple,
        mlp_multiple=mlp_multiple,
        components=default_components(settings, family),
        kv_budget=settings.kv_budget or 0.0,
    )


def check_budgets(
    settings: SolveSettings | PlanSettings,
    shape: ModelShape,
    allowed: Mapping[Component, Sequence[int]],
    stored: Stored,
    family: Family,
) -> None:
    """Raise A3Error for budgets that no choice of the `allowed` sizes meets, whatever the losses are."""
    need = find_need(settings, shape, stored)
    curves: list[Curves] = [{c: dict.fromkeys(sizes, 0.0) for c, sizes in allowed.items()}] * shape.layers
    heads, mlp = find_items(settings, shape, curves, need.count)
    if isinstance(settings, SolveSettings):
        keep_to_budget(heads, settings.attention_budget, costs.attention_weights, shape, settings, family)
        keep_to_budget(mlp, settings.mlp_budget, costs.mlp_weights, shape, settings, family)
    check_reach(settings, need, shape, stored, [*heads, *mlp], family)


def as_sizes(
    settings: SolveSettings, shape: ModelShape, heads: Sequence[Choice], widths: Sequence[Choice]
) -> list[LayerSizes]:
    """Return each layer's sizes from the choices of `find_items`."""
    if settings.shape == "stock":
        return [LayerSizes(heads[0].size, heads[0].size, widths[0].size)] * shape.layers
    chosen = zip(heads[0::2], heads[1::2], widths, strict=True)
    return [LayerSizes(qk.size, ov.size, mlp.size) for qk, ov, mlp in chosen]


def find_items(
    settings: SolveSettings | PlanSettings, shape: ModelShape, curves: list[Curves], count: uniform.Count
) -> tuple[Items, Items]:
    """Return the items to choose of attention and of the MLP; `count` says what they remove."""
    find = per_layer_items if settings.shape == "per-layer" else stock_items
    return find(shape, curves, count)


def stock_items(shape: ModelShape, curves: list[Curves], count: uniform.Count) -> tuple[Items, Items]:
    """Return two items to choose: one head size for QK and OV of all layers, and one MLP width."""
    total = {c: {size: sum(curve[c][size] for curve in curves) for size in curves[0][c]} for c in curves[0]}
    heads = sorted(total["qk"].keys() & total["ov"].keys())
    attention = [choice_of(shape, count, shape.layers, total["qk"][r] + total["ov"][r], qk=r, ov=r) for r in heads]
    return [attention], [[choice_of(shape, count, shape.layers, loss, mlp=m) for m, loss in total["mlp"].items()]]


def per_layer_items(shape: ModelShape, curves: list[Curves], count: uniform.Count) -> tuple[Items, Items]:
    """Return the items to choose: QK and OV of each layer in turn, and the MLP of each layer."""
    items: dict[Component, Items] = {
        component: [
            [choice_of(shape, count, 1, loss, **{component: size}) for size, loss in curve[component].items()]
            for curve in curves
        ]
        for component in COMPONENTS
    }
    return [item for pair in zip(items["qk"], items["ov"], strict=True) for item in pair], items["mlp"]


def choice_of(shape: ModelShape, count: uniform.Count, layers: int, loss: float, **sizes: int) -> Choice:
    """Return the choice of these sizes in so many layers."""
    removed, cached = removals(shape, count, **sizes)
    return Choice(next(iter(sizes.values())), layers * removed, loss, layers * cached)


@lru_cache(1 << 16)  # the same for each of many layers
def removals(shape: ModelShape, count: uniform.Count, **sizes: int) -> tuple[int, int]:
    """Return what these sizes remove from one layer of what is counted, and of the values in its KV cache."""
    full, smaller = shape.full_sizes, replace(shape.full_sizes, **sizes)
    cached = costs.kv_bytes_per_token(shape, [full], 1) - costs.kv_bytes_per_token(shape, [smaller], 1)
    return count(shape, [full]) - count(shape, [smaller]), cached


def removed_weights(shape: ModelShape, **sizes: int) -> int:
    """Return the weights removed from one layer if its components `qk`, `ov` or `mlp` have these sizes."""
    return removals(shape, costs.linear_weights, **sizes)[0]


def recount(kept: Items, counted: Items) -> Items:
    """Return the choices of `counted` that `kept` has."""
    sizes = [{choice.size for choice in item} for item in kept]
    return [[choice for choice in item if choice.size in of_item] for item, of_item in zip(counted, sizes, strict=True)]


def keep_to_budget(
    items: Items, budget: float | None, count: uniform.Count, shape: ModelShape, settings: SolveSettings, family: Family
) -> Items:
    """Restrict the choices of attention or the MLP to those that its own budget selects."""
    if budget is None:
        return items
    weights = count(shape, shape.sizes)
    try:
        return [[choice] for choice in allocate(items, costs.share_of(budget, weights))]
    except ValueError:
        attention = count is costs.attention_weights
        name, multiple = ("attention", settings.head_multiple) if attention else ("MLP", settings.mlp_multiple)
        why = in_brackets(why_whole(settings, cut_of(settings, family), family)) if attention else ""
        raise A3Error(
            f"{name} budget {budget} cannot be reached: multiples of {multiple} remove at most "
            f"{most_of(items) / weights:.4f}{why}; lower the budget, the multiple or the least size"
        ) from None


def most_of(items: Items) -> int:
    return sum(max(choice.removed for choice in item) for item in items)


def check_reach(
    settings: SolveSettings | PlanSettings, need: Need, shape: ModelShape, stored: Stored, items: Items, family: Family
) -> None:
    """Raise A3Error naming each budget that is missed even if everything is removed that may be."""
    problems, cut = [], cut_of(settings, family)
    why = why_whole(settings, cut, family)
    because, other = in_brackets(why), other_ways(settings, why, family)
    cached = sum(max(choice.cached for choice in item) for item in items)
    if need.cached is not None and cached < need.cached:
        total = costs.kv_bytes_per_token(shape, shape.sizes, 1)
        heads: list[Component] = [component for component in cut if component != "mlp"]
        problems.append(
            f"--kv-budget {settings.kv_budget} cannot be reached: {','.join(heads)} with "
            f"{multiples_of(settings, heads)} remove at most {cached / total:.4f} of the KV cache{because}; lower "
            f"--kv-budget or --head-multiple{least_sizes(settings, heads)}{other}"
        )
    if need.whole is not None and most_of(items) < need.whole:
        share = most_of(items) / costs.linear_weights(shape, shape.sizes)
        reach, advice = f"remove at most {share:.4f}", "lower the budget or"
        if settings.budget is None:
            reach, advice = f"leave at least {describe_size(settings, most_of(items), stored)}", "give more, or lower"
        problems.append(
            f"{describe_target(settings)} cannot be reached: {','.join(cut)} with {multiples_of(settings, cut)} "
            f"{reach}{because}; {advice} the multiples{least_sizes(settings, cut)}{other}"
        )
    if problems:
        raise A3Error("; ".join(problems))


def cut_of(settings: SolveSettings | PlanSettings, family: Family) -> Sequence[Component]:
    """Return the components that may be cut: in a plan the default ones."""
    return settings.cut if isinstance(settings, SolveSettings) else default_components(settings, family)


def multiples_of(settings: SolveSettings | PlanSettings, cut: Sequence[Component]) -> str:
    """Return the multiples to which the sizes of these components are rounded, for a message."""
    heads = [f"head multiple {settings.head_multiple}"] if {"qk", "ov"} & {*cut} else []
    mlp = [f"MLP multiple {settings.mlp_multiple}"] if "mlp" in cut else []
    return " and ".join(heads + mlp)


def least_sizes(settings: SolveSettings | PlanSettings, cut: Sequence[Component]) -> str:
    """Return the advice to lower the least sizes of these components; none for a plan, which does not have them."""
    if not isinstance(settings, SolveSettings):
        return ""
    options = ["--min-head"] * bool({"qk", "ov"} & {*cut}) + ["--min-mlp"] * ("mlp" in cut)
    return f", or the least sizes ({', '.join(options)})"


def other_ways(settings: SolveSettings | PlanSettings, why: str | None, family: Family) -> str:
    """Return the advice to use another shape or to name components, if heads stay whole for the reason `why`."""
    cut_per_layer = HEADS & {*family.compressible("per-layer")}
    ways = ["--shape per-layer"] if why and settings.shape == "stock" and cut_per_layer else []
    possible = possible_components(settings, family)
    if why and isinstance(settings, SolveSettings) and "qk" in possible:
        ways.append(f"--components {','.join(possible)}")
    return f", or use {' or '.join(ways)}" if ways else ""


def in_brackets(why: str | None) -> str:
    return f" ({why})" if why else ""
