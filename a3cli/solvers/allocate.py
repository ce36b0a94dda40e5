"""Which sizes to keep: a search over error curves, not over models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

FINEST = 1 << 17  # steps into which the removal is divided at most; beyond, it is rounded down


@dataclass(frozen=True)
class Choice:
    """One size that a component may take: weights it removes from the model, and its predicted loss."""

    size: int
    removed: int
    loss: float


def allocate(items: Sequence[Sequence[Choice]], needed: int) -> list[Choice]:
    """One choice of each item, so that at least `needed` weights go at the least total loss.

    An exact knapsack by dynamic programming over the weights removed, in units of their greatest common divisor. (Where
    that makes more than `FINEST` steps, removals are rounded down to a coarser unit: still never too few.) Among equal
    losses the smaller removal wins. Raises ValueError if all items together cannot remove `needed`.
    """
    unit = math.gcd(*(choice.removed for item in items for choice in item)) or 1
    unit = max(unit, -(-needed // FINEST))
    target = -(-needed // unit)
    if sum(max(choice.removed // unit for choice in item) for item in items) < target:
        raise ValueError("no choice removes enough")
    # One item may jump over the target by its whole removal.
    states = target + max(choice.removed // unit for item in items for choice in item) + 1
    loss = torch.full((states,), float("inf"), dtype=torch.float64)
    loss[0] = 0
    chosen = []
    for item in items:
        loss, which = _add_item(loss, [choice.removed // unit for choice in item], [choice.loss for choice in item])
        chosen.append(which)
    return _trace(items, chosen, target + int(loss[target:].argmin()), unit)


def _add_item(loss: torch.Tensor, steps: list[int], losses: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Least loss of every state after one more item, and the index of its choice."""
    best, which = torch.full_like(loss, float("inf")), torch.zeros(len(loss), dtype=torch.int32)
    for index, (step, more) in enumerate(zip(steps, losses, strict=True)):
        reached = loss[: len(loss) - step] + more
        best_there = best[step:]
        which[step:].masked_fill_(reached < best_there, index)
        torch.minimum(best_there, reached, out=best_there)
    return best, which


def _trace(items: Sequence[Sequence[Choice]], chosen: list[torch.Tensor], state: int, unit: int) -> list[Choice]:
    found = []
    for item, which in zip(reversed(items), reversed(chosen), strict=True):
        choice = item[int(which[state])]
        found.append(choice)
        state -= choice.removed // unit
    return found[::-1]


def sizes(full: int, multiple: int) -> list[int]:
    """Sizes that a dimension may take, ascending: the multiples below `full`, and `full` itself."""
    return [*range(multiple, full, multiple), full]
