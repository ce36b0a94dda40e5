"""Warn if rounding sizes to multiples removes far more than a budget asks for, and name multiples that do not."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import partial
from itertools import compress

from a3cli.errors import A3Error
from a3cli.models import costs
from a3cli.models.config import read_shape
from a3cli.models.families import LayerSizes, ModelShape
from a3cli.models.model import read_stock, recorded_source
from a3cli.report.figures import asked, percent
from a3cli.report.long_range import solution_warnings
from a3cli.settings import Component, PlanSettings, SolveSettings
from a3cli.solvers.allocate import sizes
from a3cli.stages.sizes import removed_weights
from a3cli.work.folder import Work
from a3cli.work.manifests import Solution

EXCESS = 0.1  # of a budget, which rounding may add without a warning
HEAD_MULTIPLES, MLP_MULTIPLES = (8, 4, 2), (32, 16, 8)  # smaller ones to suggest
Near = Callable[[int, int], bool]  # whether head multiple and MLP multiple keep the excess of all budgets small


def warnings_of(solution: Solution, work: Work) -> list[str]:
    """Return what `a3 solve` warns of; the source's configuration is read only if a budget was overshot."""
    return [*solution_warnings(solution), *rounding_warnings(solution, lambda: source_shape(work))]


def rounding_warnings(solution: Solution, find_shape: Callable[[], ModelShape | None]) -> list[str]:
    """Return a warning for each budget that was overshot. Without a shape it names no multiple."""
    settings = solution.request.settings
    overshot = [each for each in budgets_of(solution) if overshoots(*each[1:])]
    shape = find_shape() if overshot else None
    cuts = cuts_of(settings.cut)
    if not overshot or shape is None:
        return [describe(*each, settings, cuts, "lower these multiples") for each in overshot]
    remedy = suggest(settings, cuts, partial(stays_near, settings, shape))
    return [describe(*each, settings, cuts, remedy) for each in overshot]


def cuts_of(components: Sequence[Component]) -> tuple[bool, bool]:
    """Return whether heads and whether the MLP are cut."""
    return bool({"qk", "ov"} & set(components)), "mlp" in components


def planned_warnings(
    settings: PlanSettings, shape: ModelShape, size: LayerSizes, components: Sequence[Component]
) -> list[str]:
    """Return a warning if a plan's sizes overshoot the budget. Layers with sizes of their own come nearer to it."""

    def removed(planned: LayerSizes | None) -> float:
        total = costs.linear_weights(shape, shape.sizes[:1])
        return 1 - costs.linear_weights(shape, [planned]) / total if planned else 1.0

    def near(head: int, mlp: int) -> bool:
        planned = costs.uniform_sizes(
            shape, settings.budget, components=components, head_multiple=head, mlp_multiple=mlp
        )
        return not overshoots(settings.budget, removed(planned))

    if settings.shape == "per-layer" or not overshoots(settings.budget, removed(size)):
        return []
    cuts = cuts_of(components)
    remedy = suggest(settings, cuts, near)
    return [describe("--budget", settings.budget, removed(size), settings, cuts, remedy)]


def budgets_of(solution: Solution) -> Iterator[tuple[str, float, float]]:
    """Yield the option of each budget, what it asks for and what was removed.

    A budget of the whole beside one of attention or MLP is left out: the latter may ask for more than the former.
    """
    settings, full, count = solution.request.settings, solution.full_size, len(solution.sizes)
    if settings.attention_budget is not None:
        heads = sum(size.qk + size.ov for size in solution.sizes)
        yield "--attention-budget", settings.attention_budget, 1 - heads / (count * (full.qk + full.ov))
    if settings.mlp_budget is not None:
        yield "--mlp-budget", settings.mlp_budget, 1 - sum(size.mlp for size in solution.sizes) / (count * full.mlp)
    if settings.budget is not None and settings.attention_budget is None and settings.mlp_budget is None:
        yield "--budget", settings.budget, solution.budget_reached


def overshoots(budget: float, reached: float) -> bool:
    return 0 < budget < reached / (1 + EXCESS)


def describe(
    option: str,
    budget: float,
    reached: float,
    settings: SolveSettings | PlanSettings,
    cuts: tuple[bool, bool],
    remedy: str,
) -> str:
    multiples = (f"--head-multiple {settings.head_multiple}", f"--mlp-multiple {settings.mlp_multiple}")
    return (
        f"{option}: {asked(budget)} were asked for, {percent(reached, 1)} are removed, since sizes are rounded to "
        f"{' and '.join(compress(multiples, cuts))}; {remedy}"
    )


def suggest(settings: SolveSettings | PlanSettings, cuts: tuple[bool, bool], near: Near) -> str:
    """Return which smaller multiples to use: one of them if that suffices, and the largest that does.

    `cuts` says whether heads and whether the MLP are cut.
    """
    head, mlp = settings.head_multiple, settings.mlp_multiple
    heads = [each for each in HEAD_MULTIPLES if cuts[0] and each < head]
    widths = [each for each in MLP_MULTIPLES if cuts[1] and each < mlp]
    tried = [(head, each) for each in widths] + [(each, mlp) for each in heads]
    tried += [(one, other) for one in heads for other in widths]
    found = next((each for each in tried if near(*each)), None)
    if found is None:
        tried_to = " and ".join(compress((f"{HEAD_MULTIPLES[-1]} (heads)", f"{MLP_MULTIPLES[-1]} (MLP)"), cuts))
        finer = "; --shape per-layer has finer steps" if settings.shape == "stock" else ""
        return f"no multiple down to {tried_to} comes within a tenth of the budget{finer}"
    options = [f"--head-multiple {found[0]}"] * (found[0] < head) + [f"--mlp-multiple {found[1]}"] * (found[1] < mlp)
    return f"use {' '.join(options)} to come within a tenth of the budget"


def stays_near(settings: SolveSettings, shape: ModelShape, head_multiple: int, mlp_multiple: int) -> bool:
    """Return whether no budget is overshot with these multiples, whatever the losses are.

    In the stock shape this holds for every choice that cuts both attention and MLP, if there is one.
    """
    if settings.shape == "per-layer":
        return steps_are_small(settings, shape, head_multiple, mlp_multiple)
    heads, widths = [shape.head_dim], [shape.intermediate_size]
    if {"qk", "ov"} & set(settings.cut):
        heads = sizes(shape.head_dim, head_multiple, least=settings.min_head)
    if "mlp" in settings.cut:
        widths = sizes(shape.intermediate_size, mlp_multiple, least=settings.min_mlp)
    parts = ((heads, settings.attention_budget), (widths, settings.mlp_budget))
    if any(budget is not None and not has_size_near(choices, budget) for choices, budget in parts):
        return False
    if settings.budget is None or settings.attention_budget is not None or settings.mlp_budget is not None:
        return True
    cuts = costs.least_cuts(shape, settings.budget, heads=heads, widths=widths)
    both = [removed for size, removed in cuts if size.qk < heads[-1] and size.mlp < widths[-1]]
    reached = both or [removed for _, removed in cuts]
    return bool(reached) and not overshoots(settings.budget, max(reached))


def has_size_near(choices: list[int], budget: float) -> bool:
    """Return whether the largest size that meets a budget does not overshoot it."""
    full = choices[-1]
    enough = [size for size in choices if Fraction(full - size, full) >= Fraction(str(budget))]
    return bool(enough) and not overshoots(budget, 1 - max(enough) / full)


def steps_are_small(settings: SolveSettings, shape: ModelShape, head_multiple: int, mlp_multiple: int) -> bool:
    """Return whether one step of one layer's size is at most the allowed excess: a choice is never further off."""
    head, width = max(0, shape.head_dim - head_multiple), max(0, shape.intermediate_size - mlp_multiple)
    attention = min(removed_weights(shape, qk=head), removed_weights(shape, ov=head))
    mlp = removed_weights(shape, mlp=width)
    cut = [attention] * bool({"qk", "ov"} & set(settings.cut)) + [mlp] * ("mlp" in settings.cut)
    weights = costs.attention_weights(shape, shape.sizes), costs.mlp_weights(shape, shape.sizes)
    budgets = (
        (settings.attention_budget, attention, weights[0]),
        (settings.mlp_budget, mlp, weights[1]),
        (settings.budget, min(cut), sum(weights)),
    )
    return all(step <= EXCESS * budget * total for budget, step, total in budgets if budget is not None)


def source_shape(work: Work) -> ModelShape | None:
    """Return the shape of a work folder's source, or None if its configuration is not on this machine."""
    with suppress(A3Error):
        config, _ = read_stock(*recorded_source(work), tensors=None)
        return read_shape(config)
    return None
