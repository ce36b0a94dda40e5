"""Warn of what may hurt a solution: few tokens, singular statistics, text of one kind, scores beyond the context."""

import math
from collections.abc import Sequence

from a3cli.report.figures import TITLES, percent
from a3cli.report.layers import ComponentState, LayerState, name_layers
from a3cli.report.long_range import solution_warnings
from a3cli.settings import COMPONENTS, Component
from a3cli.text.tokens import TokenStatistics
from a3cli.work.manifests import CalibrationRequest, Solution

ENOUGH_TOKENS = 10  # times the dimension of a Gram matrix
ONE_KIND = ("wikitext", "Salesforce/wikitext")  # beginnings of data sets whose text is all of one kind
NEAR_SINGULAR = 1e8  # condition; above it, the smallest eigenvalues are rounding of float32 sums


def find_concerns(
    request: CalibrationRequest,
    layers: list[LayerState],
    text: TokenStatistics | None,
    solution: Solution | None,
    cut: Sequence[Component] = COMPONENTS,
) -> list[str]:
    """Return the warnings, one line each; of statistics only for components that the model's family can cut."""
    found = [*solution_warnings(solution), *expert_warnings(solution)] if solution else []
    for component in cut:
        found += component_warnings(component, [each.part(component) for each in layers])
    return found + one_kind_warnings(request) + (text_warnings(text) if text else [])


def one_kind_warnings(request: CalibrationRequest) -> list[str]:
    """Return the warning of a calibration on one data set whose text is known to be of one kind."""
    dataset = request.text.dataset
    if request.mixture or request.merged or not dataset.startswith(ONE_KIND):
        return []
    return [
        f"calibrated on {dataset} alone, which is text of one kind: on other text the loss can be two to three times "
        f"as large; calibrate on a mixture (--dataset {dataset} --dataset c4, or text of your own)"
    ]


def component_warnings(component: Component, layers: list[ComponentState]) -> list[str]:
    """Return the warnings of one component; `layers` has its state in each layer."""
    title, found = TITLES[component], []
    tokens = layers[0].tokens_per_dimension if layers else None
    if tokens is not None and tokens < ENOUGH_TOKENS:
        first = layers[0]
        found.append(
            f"{title}: {tokens:.1f} tokens for each of the {first.dimension:,} dimensions of "
            f"its statistics, fewer than {ENOUGH_TOKENS}: calibrate on {tokens_needed(first):,} or more"
        )
    singular = [layer for layer, each in enumerate(layers) if each.is_singular]
    if singular:
        found.append(
            f"{title}: singular statistics in {name_layers(singular)}: some directions never occur; they are damped"
        )
    near = [i for i, each in enumerate(layers) if i not in singular and (each.condition or 0) > NEAR_SINGULAR]
    if near:
        found.append(f"{title}: near-singular statistics in {name_layers(near)} (condition above {NEAR_SINGULAR:.0e})")
    if dead := [layer for layer, each in enumerate(layers) if each.dead]:
        found.append(f"{title}: channels that are always zero in {name_layers(dead)}: they cost nothing to remove")
    return found


def tokens_needed(state: ComponentState) -> int:
    return math.ceil(ENOUGH_TOKENS * state.dimension / state.share_of_tokens)


def expert_warnings(solution: Solution) -> list[str]:
    """Return the warning of experts that too few tokens went through to refit them."""
    few = {layer: len(each.experts.few_tokens) for layer, each in enumerate(solution.per_layer) if each.experts}
    if not any(few.values()):
        return []
    layers = [layer for layer, count in few.items() if count]
    return [
        f"MLP: {sum(few.values())} experts in {name_layers(layers)} saw fewer tokens than they have channels: "
        "they are cut without a refit; calibrate on more tokens"
    ]


def text_warnings(text: TokenStatistics) -> list[str]:
    overlaps = text.overlapping_blocks
    identical = sum(each.share == 1 for each in overlaps)
    found = []
    if overlaps:
        blocks, first = len({each.block for each in overlaps}), overlaps[0]
        found.append(
            f"text: {blocks} of {text.blocks[0]} calibration blocks repeat another one ({identical} wholly; first "
            f"block {first.block}, {percent(first.share)} of it in block {first.of}): duplicates count "
            "twice; remove them, or use other text"
        )
    if text.distinct_tokens == 1:
        found.append("text: one single token, repeated")
    return found
