"""What serving a model takes: the KV cache at the full context, and how many sequences fit beside the weights."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from a3cli.report.figures import Comparison, human_bytes

if TYPE_CHECKING:
    from a3cli.work.manifests import Solution

Json = dict[str, Any]
ITEMSIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a value, by its dtype's name


@dataclass(frozen=True)
class Serving:
    """Bytes before and after: `cache` of one sequence of so many tokens, and `weights`. `memory` may be unknown."""

    tokens: int
    cache: tuple[int, int]
    weights: tuple[int, int]
    memory: int | None

    @property
    def sequences(self) -> tuple[int, int] | None:
        """Return how many sequences fit into the memory beside the weights, before and after."""
        if self.memory is None:
            return None
        before, after = (
            max(0, self.memory - weights) // max(1, cache)
            for weights, cache in zip(self.weights, self.cache, strict=True)
        )
        return before, after

    def rows(self) -> list[Comparison]:
        """Return the rows of a before/after table."""
        shown = [(f"KV cache at the full context ({self.tokens:,} tokens)", self.cache, human_bytes)]
        if self.memory is not None and (found := self.sequences):
            shown.append((f"sequences that fit {human_bytes(self.memory)} beside the weights", found, "{:,}".format))
        return [
            Comparison(label, show(before), show(after), after / before if before else None)
            for label, (before, after), show in shown
        ]

    def plain(self) -> Json:
        """Return the sequences as JSON has them, nothing without a memory."""
        if (found := self.sequences) is None:
            return {}
        return {"sequences": {"memory": self.memory, "before": found[0], "after": found[1]}}


def serving_of(solution: "Solution", memory: int | None, dtype: str = "source") -> Serving | None:
    """Return what serving a solution takes, exported in `dtype`; None if an earlier version of a3 solved it."""
    cache, weights = solution.kv_cache, solution.bytes
    if cache is None:
        return None
    item = round(weights.before / solution.parameters.before)
    exported = ITEMSIZES.get(dtype, item)
    kept = cache.before, cache.after * exported // item
    return Serving(cache.tokens, kept, (weights.before, weights.after * exported // item), memory)


def serving_warnings(solution: "Solution", memory: int | None) -> list[str]:
    """Return a warning if it is not known what fits a memory."""
    if memory is None or solution.kv_cache is not None:
        return []
    return ["--memory: an earlier version of a3 solved this and did not record the KV cache; solve with --overwrite"]
