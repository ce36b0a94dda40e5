"""Sizes that are the same in every layer, from a budget alone: what a plan assumes, and how near rounding comes."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace

from a3cli.models.costs import linear_weights, share_of
from a3cli.models.families import LayerSizes, ModelShape
from a3cli.settings import COMPONENTS, Component

Count = Callable[[ModelShape, Sequence[LayerSizes]], int]  # of what some layers have


def equal_cuts(
    shape: ModelShape,
    needed: int,
    count: Count,
    *,
    head_multiple: int,
    mlp_multiple: int,
    components: Sequence[Component] = COMPONENTS,
    kv_budget: float = 0.0,
) -> LayerSizes | None:
    """Return sizes that, the same in every layer, remove at least `needed` of what is counted, or None if none do.

    The components are cut as equally as rounding allows, and heads so far that `kv_budget` of the cache is removed.
    """
    total, full = count(shape, shape.sizes[:1]), shape.full_sizes
    needed = -(-needed // shape.layers)
    channel = total - count(shape, [replace(full, mlp=full.mlp - 1)])
    cached = 2 * shape.head_dim - share_of(kv_budget, 2 * shape.head_dim)
    heads: list[Component] = [component for component in components if component != "mlp"]
    found = []
    for head in (*(range(head_multiple, shape.head_dim, head_multiple) if heads else ()), shape.head_dim):
        size = replace(full, **dict.fromkeys(heads, head))
        of_heads = total - count(shape, [size])
        most = shape.intermediate_size - max(0, math.ceil((needed - of_heads) / channel))
        rounded = most // mlp_multiple * mlp_multiple if "mlp" in components else 0
        width = most if most == shape.intermediate_size else rounded
        if width > 0 and size.qk + size.ov <= cached:
            unlike = abs(head / shape.head_dim - width / shape.intermediate_size)
            found.append((unlike, -width, replace(size, mlp=width)))
    return min(found, key=lambda each: each[:2])[2] if found else None


def least_cuts(
    shape: ModelShape, budget: float, *, heads: Sequence[int], widths: Sequence[int]
) -> list[tuple[LayerSizes, float]]:
    """Return the sizes, the same in every layer, that remove at least `budget` and none of which could be larger.

    A choice of least loss is among them, since no size loses less than a larger one. `heads` and `widths` are the
    sizes to choose from, ascending; beside each choice is the fraction of the linear weights that it removes.
    """
    total = linear_weights(shape, shape.sizes[:1])
    needed = share_of(budget, total)
    channel = shape.mlps * len(shape.mlp_roles) * shape.hidden_size
    found: list[tuple[LayerSizes, float]] = []
    for head in reversed(heads):
        of_heads = total - linear_weights(shape, [LayerSizes(head, head, shape.intermediate_size)])
        most = shape.intermediate_size - max(0, math.ceil((needed - of_heads) / channel))
        fitting = bisect_right(widths, most)
        if fitting and (not found or widths[fitting - 1] > found[-1][0].mlp):  # else a larger head has this width too
            size = LayerSizes(head, head, widths[fitting - 1])
            found.append((size, 1 - linear_weights(shape, [size]) / total))
    return found
