"""Which sizes to keep: a search over error curves, not over models."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One size that a component may take: weights it removes from the model, and its predicted loss."""

    size: int
    removed: int
    loss: float


def split_budget(attention: Sequence[Choice], mlp: Sequence[Choice], needed: int) -> tuple[Choice, Choice]:
    """The pair of choices with the least total loss among those that overshoot only by rounding.

    For each attention choice the MLP choice is the one that removes least while both together still
    remove `needed` weights. Ties go to the pair that removes less. Raises ValueError if none reaches it.
    """
    pairs = []
    for a in attention:
        enough = [m for m in mlp if a.removed + m.removed >= needed]
        if enough:
            pairs.append((a, min(enough, key=lambda m: (m.removed, m.loss))))
    if not pairs:
        raise ValueError("no choice removes enough")
    return min(pairs, key=lambda pair: (pair[0].loss + pair[1].loss, pair[0].removed + pair[1].removed))


def sizes(full: int, multiple: int) -> list[int]:
    """Sizes that a dimension may take, ascending: the multiples below `full`, and `full` itself."""
    return [*range(multiple, full, multiple), full]
