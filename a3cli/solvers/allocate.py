"""Choose the sizes to keep: a search over error curves, not over models."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

Advance = Callable[[float], object]  # called with shares of the work as they are done
FINEST = 1 << 17  # largest number of steps of the removal; with more, removals are rounded down to a coarser unit


@dataclass(frozen=True)
class Choice:
    """One size that a component may take: the weights it removes from the model, its predicted loss, and what it
    removes of the KV cache.
    """

    size: int
    removed: int
    loss: float
    cached: int = 0


def allocate(items: Sequence[Sequence[Choice]], needed: int, advance: Advance = lambda _share: None) -> list[Choice]:
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
        advance(1 / len(items))
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


class Totals:
    """The least loss of some items for every total that they can remove.

    Totals are counted in steps from the least one; a step is the greatest common divisor of all removals. (Where that
    makes more than `FINEST` steps of items without a cache, removals are rounded down to a coarser one: still never
    too few.) What a choice removes of the KV cache must be in proportion to its steps.
    """

    def __init__(self, items: Sequence[Sequence[Choice]], finished: Callable[[], object] = lambda: None) -> None:
        self.items = items
        least = [min(item, key=lambda choice: choice.removed) for item in items]
        extra = [[choice.removed - low.removed for choice in item] for item, low in zip(items, least, strict=True)]
        coarsest = 1 if any(choice.cached for item in items for choice in item) else -(-sum(map(max, extra)) // FINEST)
        self.unit = max(math.gcd(*(removed for item in extra for removed in item)), coarsest, 1)
        self.steps = [[removed // self.unit for removed in item] for item in extra]
        self.removed, self.cached = sum(low.removed for low in least), sum(low.cached for low in least)
        self.cached_unit = self._cached_unit(least)
        self.loss = torch.full((sum(map(max, self.steps)) + 1,), float("inf"), dtype=torch.float64)
        self.loss[0] = 0
        self._chosen: list[torch.Tensor] = []
        for item, steps in zip(items, self.steps, strict=True):
            self.loss, which = _add_item(self.loss, steps, [choice.loss for choice in item])
            self._chosen.append(which)
            finished()

    def _cached_unit(self, least: Sequence[Choice]) -> int:
        """Return what one step removes of the KV cache."""
        pairs = [
            (step, choice.cached - low.cached)
            for item, steps, low in zip(self.items, self.steps, least, strict=True)
            for step, choice in zip(steps, item, strict=True)
        ]
        most, cached = max(pairs, default=(0, 0))
        unit = cached // most if most else 0
        assert all(step * unit == cached for step, cached in pairs), "the cache is not in proportion to the weights"
        return unit

    @cached_property
    def _least_beyond(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the least loss of each number of steps or more, and where it is."""
        least, place = self.loss.flip(0).cummin(0)
        return least.flip(0), len(self.loss) - 1 - place.flip(0)

    def at_least(self, needed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the least loss of removing at least so much, for each entry of `needed`, and its number of steps.

        The loss is infinite where that is too much.
        """
        least, state = self._least_beyond
        steps = (needed - self.removed).clamp_min(0).add(self.unit - 1) // self.unit
        within = steps.clamp_max(len(self.loss) - 1)
        return torch.where(steps < len(self.loss), least[within], float("inf")), state[within]

    def choices(self, state: int) -> list[Choice]:
        """Return the choice of each item that together make `state` steps at the least loss."""
        found = []
        for item, steps, which in reversed(list(zip(self.items, self.steps, self._chosen, strict=True))):
            index = int(which[state])
            found.append(item[index])
            state -= steps[index]
        return found[::-1]


def allocate_jointly(
    heads: Sequence[Sequence[Sequence[Choice]]],
    mlp: Sequence[Sequence[Choice]],
    needed: int,
    cached: int,
    advance: Advance = lambda _share: None,
) -> list[list[Choice]]:
    """Choose one size of each item, so that at least `needed` weights and at least `cached` of the KV cache are
    removed at the least total loss; return the choices of each part of `heads`, and of `mlp`.

    `heads` has one or two parts (QK and OV, or both as one), in each of which weights and cache shrink in proportion;
    between parts they need not. The MLP has no cache. Exact: the least losses of each part's totals, and the best of
    all combinations of totals. Raises ValueError if all items together cannot remove enough.
    """
    every = [item for part in (*heads, mlp) for item in part]
    parts = heads[0], heads[1] if len(heads) > 1 else [], mlp
    first, second, rest = (Totals(part, lambda: advance(1 / len(every))) for part in parts)
    most = [max(item, key=lambda choice: choice.removed) for item in every]
    if sum(choice.removed for choice in most) < needed or sum(choice.cached for choice in most) < cached:
        raise ValueError("no choice removes enough")
    states = torch.arange(len(second.loss))
    best, found = float("inf"), None
    for state in first.loss.isfinite().nonzero().flatten().tolist():
        removed = first.removed + state * first.unit + second.removed + states * second.unit
        emptied = first.cached + state * first.cached_unit + second.cached + states * second.cached_unit
        loss, widths = rest.at_least(needed - removed)
        loss = torch.where(emptied >= cached, loss + second.loss + first.loss[state], float("inf"))
        place = int(loss.argmin())
        if loss[place] < best:
            best, found = float(loss[place]), (state, place, int(widths[place]))
    totals = [first, second, rest] if len(heads) > 1 else [first, rest]
    if found is None:  # because of rounding, every removal is needed
        return [[max(item, key=lambda choice: choice.removed) for item in each.items] for each in totals]
    chosen = found if len(heads) > 1 else (found[0], found[2])
    return [each.choices(state) for each, state in zip(totals, chosen, strict=True)]


def sizes(full: int, multiple: int, *, least: int = 1) -> list[int]:
    """Return the sizes that a dimension may take, ascending: multiples from `least` to below `full`, and `full`."""
    return [*(size for size in range(multiple, full, multiple) if size >= least), full]
