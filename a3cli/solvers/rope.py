"""A³-QK with RoPE by bands: closed form inside bands of neighbouring pairs that share one frequency.

Pair p of a head is the complex number `z_p = x_p + i·x_{p+h/2}`; RoPE multiplies it by `exp(i m θ_p)` at position m,
and the score is `Re Σ_p z^q_p conj(z^k_p) exp(i(m−n)θ_p)`. In a band of pairs with one frequency, complex linear maps
commute with the rotation, so A³-QK applies in complex form. A band of one pair with rank 0 or 1 is the paper's CUR, one
band of everything its theorem without RoPE. P = h/2 pairs, K KV heads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from a3cli.solvers.linalg import JointDecomposition, decompose_jointly, tail_sums
from a3cli.solvers.qk import sum_over_group

TRIED = 4  # frequencies tried for a band from each pair to the next


@dataclass(frozen=True)
class PairGrams:
    """Complex Gram matrices `[K, P, P]` of one layer's queries (summed over the group) and keys.

    `keys` is centred: what is constant over keys has no effect on the softmax where pairs hardly rotate. With partial
    RoPE, P are the rotated pairs, and `still` is the solution for the other dims (`solvers/partial.py`).
    """

    queries: torch.Tensor
    keys: torch.Tensor
    energy: torch.Tensor  # [K, P], E|z^q_p|² E|z^k_p|², keys not centred
    still: JointDecomposition | None = None


@dataclass(frozen=True)
class Band:
    """Pairs `start … stop-1` compressed to `rank` slots with one frequency.

    `slot` is the pair with that frequency; between two pairs it is a fraction (see `frequency_at`).
    """

    start: int
    stop: int
    rank: int
    slot: float


@dataclass(frozen=True)
class BandCost:
    """Loss `[L, n + 1]` of one band in each layer at each rank, and its slot (a fractional pair)."""

    losses: torch.Tensor
    slot: float


@dataclass(frozen=True)
class Distances:
    """Attention mass by distance: weights `[D]`, summing to 1, of query-key distances `[D]`."""

    delta: torch.Tensor
    weight: torch.Tensor

    def expected_phase(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Return `E_Δ exp(i (f_a − s_b) Δ)` `[A, B]` of frequencies `[A]` and `[B]`."""
        return (self._turns(first) * self.weight) @ self._turns(second).mH

    def _turns(self, frequencies: torch.Tensor) -> torch.Tensor:
        angle = frequencies[:, None] * self.delta
        return torch.polar(torch.ones_like(angle), angle)

    def constancy(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Return `|E_Δ exp(iθ_pΔ)| |E_Δ exp(iθ_p'Δ)|` `[P, P]`: near 1 for pairs that hardly rotate."""
        phase = self.expected_phase(frequencies, torch.zeros_like(frequencies[:1])).abs()
        return phase * phase.mT


def spread_distances(mass: torch.Tensor, context: int, *, far_weight: float) -> Distances:
    """Return the measured attention mass `[T]` by distance, plus a log-uniform share `far_weight` over 1 … context−1.

    The share gives a cost to distances beyond the calibration text. Distances are exact below 256 and log-spaced above.
    """
    near = torch.arange(min(256, max(context, len(mass))), dtype=torch.float64)
    far = torch.logspace(8, math.log2(max(context, len(mass), 257)), 193, base=2, dtype=torch.float64).round()
    delta = torch.cat([near, far]).unique()
    place = torch.bucketize(torch.arange(len(mass), dtype=torch.float64), delta, right=True) - 1
    measured = torch.zeros_like(delta).index_add_(0, place, mass.double())
    span = log_spans(delta)
    span[delta >= context] = 0
    weight = (1 - far_weight) * measured / measured.sum() + far_weight * span / span.sum()
    return Distances(delta, weight)


def distances_beyond(length: int, context: int) -> Distances | None:
    """Return distances `length` … `context` − 1, log-uniformly; None if there are none."""
    if context <= length:
        return None
    delta = torch.logspace(math.log2(length), math.log2(context - 1), 193, base=2, dtype=torch.float64).round().unique()
    span = log_spans(delta)
    return Distances(delta, span / span.sum())


def log_spans(delta: torch.Tensor) -> torch.Tensor:
    """Return the share of a log-uniform spread that each of ascending distances `[D]` represents."""
    return torch.cat([delta[1:], delta[-1:] + 1]).clamp_min(1).log() - delta.clamp_min(1).log()


def frequency_at(frequencies: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Return frequencies at fractional pair indices, by geometric interpolation; 0 where a pair's frequency is 0."""
    below = slots.floor().long()
    above = (below + 1).clamp_max(len(frequencies) - 1)
    above = torch.where(frequencies[above] > 0, above, below)
    between = frequencies[below].log().lerp(frequencies[above].log(), slots - below).exp()
    return between.masked_fill(frequencies[below] == 0, 0)


def pair_grams(
    q_gram: torch.Tensor, k_gram: torch.Tensor, k_mean: torch.Tensor, constancy: torch.Tensor, *, centring: float
) -> PairGrams:
    """Return the complex Gram matrices of real ones `[H, h, h]`, `[K, h, h]` and key means `[K, h]`.

    The part `centring · constancy` (`[P, P]`, see `Distances`) of the mean's outer product is subtracted from the
    keys' Gram matrix.
    """
    queries = complex_gram(sum_over_group(q_gram, len(k_gram)))
    raw = complex_gram(k_gram.double())
    mean = as_pairs(k_mean.double())
    keys = raw - centring * constancy * (mean[:, :, None] * mean[:, None, :].conj())
    energy = queries.diagonal(dim1=-2, dim2=-1).real * raw.diagonal(dim1=-2, dim2=-1).real
    return PairGrams(queries, keys, energy)


def as_pairs(x: torch.Tensor, turning: int | None = None) -> torch.Tensor:
    """Convert `[..., h]` real to `[..., P]` complex.

    With partial RoPE: the first `turning` pairs, then the rest paired in the same way.
    """
    if turning is not None:
        return torch.cat([as_pairs(x[..., : 2 * turning]), as_pairs(x[..., 2 * turning :])], -1)
    real, imaginary = x.chunk(2, -1)
    return torch.complex(real, imaginary)


def complex_gram(gram: torch.Tensor) -> torch.Tensor:
    """Return `E[z zᴴ]` `[..., P, P]` from the real `E[x xᵀ]` `[..., h, h]`."""
    (a, b), (c, d) = (half.chunk(2, -1) for half in gram.chunk(2, -2))
    return torch.complex(a + d, c - b)


def sharing_cost(frequencies: torch.Tensor, shared: torch.Tensor, distances: Distances) -> torch.Tensor:
    """Return `2 (1 − E_Δ cos((θ_p − θ)Δ))` `[B, P]`: relative squared error of pairs `[P]` with frequencies `[B]`."""
    return 2 * (1 - distances.expected_phase(shared, frequencies).real).clamp_min(0)


def band_costs(
    grams: list[PairGrams],
    units: list[torch.Tensor],
    frequencies: torch.Tensor,
    distances: Distances,
    *,
    longest: int,
    floor: float,
    advance: Callable[[float], object] = lambda _share: None,
) -> dict[tuple[int, int], BandCost]:
    """Return the cost of every band `(start, stop)` of at most `longest` consecutive pairs.

    units[l] `[K]` converts layer l's squared scores to the common unit. Rank 0 loses all of the band's energy. All
    unrotated dims are one band after those of the rotated pairs. `advance` is called with shares of the work.
    """
    pairs = len(frequencies)
    energy = torch.stack([unit @ gram.energy for gram, unit in zip(grams, units, strict=True)])
    tried = torch.arange(max(0, TRIED * (pairs - 1) + 1), dtype=torch.float64) / TRIED
    sharing = sharing_cost(frequencies, frequency_at(frequencies, tried), distances)
    costs = {}
    lengths = range(1, min(longest, pairs) + 1)
    for length in lengths:
        tails = torch.stack([_tails(gram, unit, length, floor) for gram, unit in zip(grams, units, strict=True)], 1)
        for start, losses in enumerate(tails):
            slot, shared = best_slot(sharing, slice(start, start + length), energy)
            losses[:, 1:] += shared[:, None]
            costs[start, start + length] = BandCost(losses, slot)
        advance(length / sum(lengths))
    if still := [gram.still for gram in grams if gram.still is not None]:
        # Two dims per slot. A real score has half the energy of its complex form, for which the units are.
        doubled = [2 * (unit @ tail_sums(each.values)[:, ::2]) for unit, each in zip(units, still, strict=True)]
        losses = torch.stack(doubled)
        costs[pairs, pairs + losses.shape[1] - 1] = BandCost(losses, float(pairs))
    return costs


def _tails(grams: PairGrams, unit: torch.Tensor, length: int, floor: float) -> torch.Tensor:
    """Return the loss of every band of `length` pairs in one layer at each rank, `[bands, length + 1]`."""
    bands = [slice(start, start + length) for start in range(grams.keys.shape[-1] - length + 1)]
    keys, queries = (torch.stack([g[:, band, band] for band in bands]) for g in (grams.keys, grams.queries))
    return (unit[:, None] * tail_sums(decompose_jointly(keys, queries, floor=floor).values)).sum(1)


def best_slot(sharing: torch.Tensor, band: slice, energy: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the shared slot of a band with the least sharing cost over all layers, and each layer's cost `[L]`.

    energy `[L, P]`; sharing is the cost of each tried frequency for each pair. The frequencies of the band's pairs and
    points between them are tried.
    """
    first = TRIED * band.start
    cost = energy[:, band] @ sharing[first : TRIED * (band.stop - 1) + 1, band].mT
    best = int(cost.sum(0).argmin())
    return (first + best) / TRIED, cost[:, best]


def best_bands(costs: dict[tuple[int, int], BandCost], pairs: int, most: int) -> list[tuple[float, list[Band]]]:
    """Return, for every number of slots 0 … most, the least loss and the bands that reach it.

    A dynamic programme over (end of the last band, slots used): optimal among partitions of the pairs in consecutive
    bands with a rank each.
    """
    infinity = float("inf")
    loss = [[infinity] * (most + 1) for _ in range(pairs + 1)]
    last: list[list[Band | None]] = [[None] * (most + 1) for _ in range(pairs + 1)]
    loss[0][0] = 0.0
    for (start, stop), cost in sorted(costs.items(), key=lambda item: (item[0][1], item[0][0])):
        for rank, tail in enumerate(cost.losses.sum(0).tolist()):
            for slots in range(rank, most + 1):
                total = loss[start][slots - rank] + tail
                if total < loss[stop][slots]:
                    loss[stop][slots] = total
                    last[stop][slots] = Band(start, stop, rank, cost.slot)
    return [(loss[pairs][slots], _trace(last, pairs, slots)) for slots in range(most + 1)]


def _trace(last: list[list[Band | None]], end: int, slots: int) -> list[Band]:
    bands: list[Band] = []
    while end > 0:
        band = last[end][slots]
        if band is None:
            return []
        bands.append(band)
        end, slots = band.start, slots - band.rank
    return bands[::-1]


def band_maps(grams: PairGrams, bands: list[Band], *, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return complex maps `[K, P, S]` of queries and keys: `z̃ = Mᴴ z`. Slots follow the bands."""
    kv_heads, pairs, _ = grams.keys.shape
    maps = torch.zeros(2, kv_heads, pairs, sum(band.rank for band in bands), dtype=torch.complex128)
    used = 0
    for band in bands:
        inside = slice(band.start, band.stop)
        solved = decompose_jointly(grams.keys[:, inside, inside], grams.queries[:, inside, inside], floor=floor)
        maps[0, :, inside, used : used + band.rank] = solved.other_map[..., : band.rank]
        maps[1, :, inside, used : used + band.rank] = solved.shared_map[..., : band.rank]
        used += band.rank
    return maps[0], maps[1]


def real_map(complex_map: torch.Tensor) -> torch.Tensor:
    """Return `z̃ = Mᴴ z`, `M` `[..., P, R]`, as the real matrix `[..., 2P, 2R]` that multiplies row vectors of dims."""
    a, b = complex_map.real, complex_map.imag
    return torch.cat([torch.cat([a, -b], -1), torch.cat([b, a], -1)], -2)
