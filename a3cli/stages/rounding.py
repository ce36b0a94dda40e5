"""Warn if rounding sizes to multiples removes far more than a budget asks for, and name multiples that do not."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import compress

from a3cli.errors import A3Error
from a3cli.models import costs, uniform
from a3cli.models.config import read_shape
from a3cli.models.families import Family, LayerSizes, ModelShape
from a3cli.models.model import read_stock
from a3cli.models.source import recorded_source
from a3cli.report.concerns import one_kind_warnings
from a3cli.report.figures import asked, human, human_bytes, percent
from a3cli.report.long_range import solution_warnings
from a3cli.report.serving import serving_warnings
from a3cli.settings import Component, PlanSettings, SolveSettings
from a3cli.settings.budgets import given_budgets
from a3cli.solvers.allocate import sizes
from a3cli.stages.sizes import Stored, default_components, planned_size, removed_weights
from a3cli.work.folder import Work
from a3cli.work.manifests import CalibrationManifest, Change, Solution

EXCESS = 0.1  # of a budget, which rounding may add without a warning
HEAD_MULTIPLES, MLP_MULTIPLES = (8, 4, 2), (32, 16, 8)  # smaller ones to suggest
Near = Callable[[int, int], bool]  # whether head multiple and MLP multiple keep the excess of all budgets small


def warnings_of(solution: Solution, work: Work, memory: int | None = None) -> list[str]:
    """Return what `a3 solve` warns of; the source's configuration is read only if a budget was overshot."""
    overshot = rounding_warnings(solution, lambda: source_shape(work))
    calibration = CalibrationManifest.read(work.calibration_manifest, "run a3 calibrate --overwrite")
    text = one_kind_warnings(calibration.request)
    return [*solution_warnings(solution), *text, *overshot, *serving_warnings(solution, memory)]


@dataclass(frozen=True)
class Excess:
    """A budget with the fraction that it asks for and the one that was removed, and both as text."""

    option: str
    budget: float
    reached: float
    said: str = ""

    @property
    def too_large(self) -> bool:
        return overshoots(self.budget, self.reached)

    def describe(self, settings: SolveSettings | PlanSettings, cuts: tuple[bool, bool], remedy: str) -> str:
        said = self.said or f"{asked(self.budget)} were asked for, {percent(self.reached, 1)} are removed"
        multiples = (f"--head-multiple {settings.head_multiple}", f"--mlp-multiple {settings.mlp_multiple}")
        return f"{self.option}: {said}, since sizes are rounded to {' and '.join(compress(multiples, cuts))}; {remedy}"


def rounding_warnings(solution: Solution, find_shape: Callable[[], ModelShape | None]) -> list[str]:
    """Return a warning for each budget that was overshot. Without a shape it names no multiple."""
    settings = solution.request.settings
    overshot = [each for each in budgets_of(solution) if each.too_large]
    shape = find_shape() if overshot else None
    cuts = cuts_of(settings, settings.cut)
    if not overshot or shape is None:
        return [each.describe(settings, cuts, "lower these multiples") for each in overshot]
    remedy = suggest(settings, cuts, partial(stays_near, with_fraction(settings, solution, shape), shape))
    return [each.describe(settings, cuts, remedy) for each in overshot]


def cuts_of(settings: SolveSettings | PlanSettings, components: Sequence[Component]) -> tuple[bool, bool]:
    """Return whether heads and whether the MLP are cut; a budget of the KV cache alone leaves the MLP."""
    return bool({"qk", "ov"} & {*components}), "mlp" in components and given_budgets(settings) != ["kv_budget"]


def with_fraction(settings: SolveSettings, solution: Solution, shape: ModelShape) -> SolveSettings:
    """Return settings with the largest size of the result as a fraction of the linear weights to remove."""
    parameters, item = solution.parameters, solution.bytes.before / solution.parameters.before
    most = settings.budget_params
    if settings.budget_bytes is not None:
        most = math.floor(settings.budget_bytes / item)
    if most is None:
        return settings
    share = max(0.0, (parameters.before - most) / costs.linear_weights(shape, shape.sizes))
    return settings.model_copy(update={"budget": share, "budget_bytes": None, "budget_params": None})


def planned_warnings(
    settings: PlanSettings, shape: ModelShape, size: LayerSizes, stored: Stored, family: Family
) -> list[str]:
    """Return a warning if a plan's sizes overshoot a budget. Layers with sizes of their own come nearer to it."""

    def near(head: int, mlp: int) -> bool:
        planned = planned_size(settings, shape, stored, family, head, mlp)
        return planned is not None and not overshot_by(settings, shape, planned, stored)

    overshot = overshot_by(settings, shape, size, stored)
    if settings.shape == "per-layer" or not overshot:
        return []
    cuts = cuts_of(settings, default_components(settings, family))
    remedy = suggest(settings, cuts, near)
    return [each.describe(settings, cuts, remedy) for each in overshot]


def overshot_by(settings: PlanSettings, shape: ModelShape, size: LayerSizes, stored: Stored) -> list[Excess]:
    """Return the budgets that sizes planned for all layers overshoot."""
    sizes, heads = [size] * shape.layers, 1 - (size.qk + size.ov) / (2 * shape.head_dim)
    if settings.kv_budget is not None:
        near = heads - settings.head_multiple / shape.head_dim < settings.kv_budget
        found = [Excess("--kv-budget", settings.kv_budget, heads)] if near else []
    else:
        left = stored.parameters - costs.removed_parameters(shape, sizes)
        count = Change(before=stored.parameters, after=left), Change(before=stored.bytes, after=left * stored.item)
        removed = 1 - costs.linear_weights(shape, sizes) / costs.linear_weights(shape, shape.sizes)
        found = list(budgets_of_whole(settings, removed, *count))
    return [each for each in found if each.too_large]


def budgets_of(solution: Solution) -> Iterator[Excess]:
    """Yield each budget with what was removed.

    A budget of the whole beside one of attention, KV cache or MLP is left out: the latter may ask for more than the
    former. So is one of the KV cache if heads are smaller than it makes them, for a budget of the whole.
    """
    settings, full, count = solution.request.settings, solution.full_size, len(solution.sizes)
    heads = 1 - sum(size.qk + size.ov for size in solution.sizes) / (count * (full.qk + full.ov))
    if settings.attention_budget is not None:
        yield Excess("--attention-budget", settings.attention_budget, heads)
    step = settings.head_multiple / full.qk / (1 if settings.shape == "stock" else 2 * count)
    if settings.kv_budget is not None and heads - step < settings.kv_budget:
        yield Excess("--kv-budget", settings.kv_budget, heads)
    if settings.mlp_budget is not None:
        width = sum(size.mlp for size in solution.sizes) / (count * full.mlp)
        yield Excess("--mlp-budget", settings.mlp_budget, 1 - width)
    if settings.attention_budget is None and settings.kv_budget is None and settings.mlp_budget is None:
        yield from budgets_of_whole(settings, solution.budget_reached, solution.parameters, solution.bytes)


def budgets_of_whole(
    settings: SolveSettings | PlanSettings, removed: float, parameters: Change, size: Change
) -> Iterator[Excess]:
    """Yield the budget of the whole with what was removed: a fraction of the linear weights, or of all."""
    if settings.budget is not None:
        yield Excess("--budget", settings.budget, removed)
    limits = (
        ("--budget-bytes", settings.budget_bytes, size, human_bytes),
        ("--budget-params", settings.budget_params, parameters, human),
    )
    for option, most, change, show in limits:
        if most is not None:
            said = f"at most {show(most).rstrip()} were asked for, {show(change.after).rstrip()} are left"
            yield Excess(option, 1 - most / change.before, 1 - change.after / change.before, said)


def overshoots(budget: float, reached: float) -> bool:
    return 0 < budget < reached / (1 + EXCESS)


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
    parts = ((heads, settings.attention_budget), (heads, settings.kv_budget), (widths, settings.mlp_budget))
    if any(budget is not None and not has_size_near(choices, budget) for choices, budget in parts):
        return False
    if settings.budget is None or any(budget is not None for _, budget in parts):
        return True
    cuts = uniform.least_cuts(shape, settings.budget, heads=heads, widths=widths)
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
        (settings.kv_budget, shape.head_dim - head, 2 * shape.layers * shape.head_dim),
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
