"""How `best` represents query and key heads: as rotated pairs, or as dims with partial RoPE.

Both classes give Gram matrices, the cost of bands, initial maps, the score problem for given slots, and maps on real
dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from a3cli.models.families.base import pair_dims
from a3cli.models.rope import Rope, turning_slots
from a3cli.solvers.partial import PartialProblem, key_start, partial_grams, partial_statistics, real_columns
from a3cli.solvers.rope import Band, Distances, PairGrams, band_maps, frequency_at, pair_grams, real_map
from a3cli.solvers.slots import HeadStatistics, SlotProblem, head_statistics

CENTRING = 0.95  # share of the constant part of a key that the softmax is assumed to ignore

Problem = SlotProblem | PartialProblem


@dataclass(frozen=True)
class Heads:
    """Heads with full RoPE: maps are complex, `[K, P, S]`, of P = h/2 pairs."""

    rope: Rope
    floor: float

    @property
    def coordinates(self) -> int:
        """Return the number of rows of a map."""
        return len(self.rope.short)

    def statistics(self, q_gram: torch.Tensor, k_gram: torch.Tensor, k_mean: torch.Tensor) -> HeadStatistics:
        """Return the statistics from real Gram matrices `[H, h, h]`, `[K, h, h]` and key means `[K, h]`."""
        return head_statistics(q_gram, k_gram, k_mean)

    def grams(
        self, q_gram: torch.Tensor, k_gram: torch.Tensor, k_mean: torch.Tensor, distances: Distances
    ) -> PairGrams:
        """Return the centred Gram matrices from which bands are found."""
        return pair_grams(q_gram, k_gram, k_mean, self._constancy(distances), centring=CENTRING)

    def start(self, grams: PairGrams, bands: list[Band]) -> torch.Tensor:
        """Return the keys' maps of these bands."""
        return band_maps(grams, bands, floor=self.floor)[1]

    def problem(self, heads: HeadStatistics, slots: Sequence[float], distances: Distances) -> Problem:
        return SlotProblem(
            heads, self._turning, self._frequencies(slots), distances, centring=CENTRING, floor=self.floor
        )

    def real_map(self, maps: torch.Tensor, slots: Sequence[float]) -> torch.Tensor:
        """Return the maps `[K, h, 2S]` on real dims, in the smaller head's order of dims."""
        columns = self._columns(maps)
        ordered = torch.empty_like(columns)
        ordered[..., pair_dims(len(slots), len(turning_slots(self.rope, slots)))] = columns
        return ordered

    def _columns(self, maps: torch.Tensor) -> torch.Tensor:
        return real_map(maps)

    @property
    def _turning(self) -> torch.Tensor:
        return self.rope.short[: self.rope.turning]

    def _constancy(self, distances: Distances) -> torch.Tensor:
        return distances.constancy(self._turning)

    def _frequencies(self, slots: Sequence[float]) -> torch.Tensor:
        return frequency_at(self.rope.short, torch.tensor(slots, dtype=torch.float64))


class PartialHeads(Heads):
    """Heads with partial RoPE: maps are complex, `[K, h, S]`, of real dims."""

    @property
    def coordinates(self) -> int:
        return 2 * len(self.rope.short)

    def statistics(self, q_gram: torch.Tensor, k_gram: torch.Tensor, k_mean: torch.Tensor) -> HeadStatistics:
        return partial_statistics(q_gram, k_gram, k_mean, self.rope.turning)

    def grams(
        self, q_gram: torch.Tensor, k_gram: torch.Tensor, k_mean: torch.Tensor, distances: Distances
    ) -> PairGrams:
        constancy = self._constancy(distances)
        return partial_grams(q_gram, k_gram, k_mean, constancy, centring=CENTRING, floor=self.floor)

    def start(self, grams: PairGrams, bands: list[Band]) -> torch.Tensor:
        return key_start(grams, bands, floor=self.floor)

    def problem(self, heads: HeadStatistics, slots: Sequence[float], distances: Distances) -> Problem:
        return PartialProblem(
            heads, self._turning, self._frequencies(slots), distances, centring=CENTRING, floor=self.floor
        )

    def _columns(self, maps: torch.Tensor) -> torch.Tensor:
        return real_columns(maps)


def heads_of(rope: Rope, *, floor: float) -> Heads:
    return PartialHeads(rope, floor) if rope.partial else Heads(rope, floor)
