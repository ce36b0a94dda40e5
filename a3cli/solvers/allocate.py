"""Choose the sizes to keep: a search over error curves, not over models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

FINEST = 1 << 17  # largest number of steps of the removal; with more, removals are rounded down to a coarser unit


@dataclass(frozen=True)
class Choice:
    """One size that a component may take: the weights it removes from the model, and its predicted loss."""

    size: int
    removed: int
    loss: float


def allocate(items: Sequence[Sequence[Choice]], needed: int) -> list[Choice]:
    """Choose one size of each item, so that at least `needed` weights are removed at the least total loss.

    An exact knapsack by dynamic programming over the weights removed, in units of their greatest common divisor. (Where
    that makes more than `FINEST` steps, removals are rounded down to a coarser unit: still never too few.) In each item
    the choice that removes least must also lose least. Among equal losses the smaller removal wins. Raises ValueError
    if all items together cannot remove `needed`.
    """
    least = [min(choice.removed for choice in item) for item in items]  # this much is removed in any case
    target = max(0, needed - sum(least))
    extra = [[choice.removed - low for choice in item] for item, low in zip(items, least, strict=True)]
    unit = max(math.gcd(*(removed for item in extra for removed in item)), -(-target // FINEST), 1)
    target = -(-target // unit)
    steps = [[removed // unit for removed in item] for item in extra]
    if sum(map(max, extra)) < needed - sum(least):
        raise ValueError("no choice removes enough")
    if sum(map(max, steps)) < target:  # because of rounding, every removal is needed
        return [max(item, key=lambda choice: choice.removed) for item in items]
    # One item may exceed the target by its whole removal; exceeding it further never pays.
    loss = torch.full((target + max(map(max, steps)) + 1,), float("inf"), dtype=torch.float64)
    loss[0] = 0
    chosen = []
    for item, item_steps in zip(items, steps, strict=True):
        loss, which = _add_item(loss, item_steps, [choice.loss for choice in item])
        chosen.append(which)
    state, found = target + int(loss[target:].argmin()), []
    for item, item_steps, which in reversed(list(zip(items, steps, chosen, strict=True))):
        index = int(which[state])
        found.append(item[index])
        state -= item_steps[index]
    return found[::-1]


def _add_item(loss: torch.Tensor, steps: list[int], losses: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least loss of every state after one more item, and the index of its choice."""
    best, which = torch.full_like(loss, float("inf")), torch.zeros(len(loss), dtype=torch.int32)
    for index, (step, more) in enumerate(zip(steps, losses, strict=True)):
        reached = loss[: len(loss) - step] + more
        best_there = best[step:]
        which[step:].masked_fill_(reached < best_there, index)
        torch.minimum(best_there, reached, out=best_there)
    return best, which


def sizes(full: int, multiple: int, *, least: int = 1) -> list[int]:
    """Return the sizes that a dimension may take, ascending: multiples from `least` to below `full`, and `full`."""
    return [*(size for size in range(multiple, full, multiple) if size >= least), full]
