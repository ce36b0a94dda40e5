"""A³-QK with RoPE by slots: every slot of the smaller head mixes every pair, by alternating least squares.

Pairs are complex numbers as in `solvers/rope.py`. With maps `A` (queries) and `B` (keys), both `[P, S]`, and slots
with frequencies φ, the smaller head computes `z^kᴴ B diag(exp(iφΔ)) Aᴴ z^q` in place of `z^kᴴ diag(exp(iθΔ)) z^q`. For
queries and keys drawn independently at a distance Δ the squared error is quadratic in A for fixed B and in B for fixed
A, and the expectation over Δ only multiplies the matrices of the normal equations entry by entry. So each half-step is
solved in closed form with matrices no larger than P, whatever the distances. Bands (`solvers/rope.py`) are the special
case in which a slot mixes only pairs of its band; they give the slots and the initial maps.

What is constant over keys has no effect on the softmax: the share `centring` of the squared mean error over Δ that the
mean key makes is subtracted from the loss. P = h/2 pairs, S slots, K KV heads; complex128.
"""

from dataclasses import dataclass

import torch

from a3cli.solvers.qk import sum_over_group
from a3cli.solvers.rope import Distances, as_pairs, complex_gram

ROUNDS = 40
ENOUGH = 1e-3  # stop when a round lowers the loss by less than this share


@dataclass(frozen=True)
class HeadStatistics:
    """Complex Gram matrices `[K, P, P]` of one layer's queries (summed over the group) and keys, mean keys `[K, P]`."""

    queries: torch.Tensor
    keys: torch.Tensor
    key_mean: torch.Tensor

    def of(self, kv_head: int) -> "HeadStatistics":
        """Return the statistics of one KV head."""
        own = slice(kv_head, kv_head + 1)
        return HeadStatistics(self.queries[own], self.keys[own], self.key_mean[own])


def head_statistics(q_gram: torch.Tensor, k_gram: torch.Tensor, k_mean: torch.Tensor) -> HeadStatistics:
    """Return the statistics from real Gram matrices `[H, h, h]`, `[K, h, h]` and key means `[K, h]`."""
    queries = complex_gram(sum_over_group(q_gram, len(k_gram)))
    return HeadStatistics(queries, complex_gram(k_gram.double()), as_pairs(k_mean.double()))


@dataclass(frozen=True)
class SlotMaps:
    """Complex maps `[K, P, S]` of queries and keys, and their squared score error `[K]`."""

    query: torch.Tensor
    key: torch.Tensor
    loss: torch.Tensor


class SlotProblem:
    """One layer's squared score error for given slots, as a function of the maps.

    `pairs` `[P]` and `slots` `[S]` are frequencies in radians per position. `floor` times the mean of its diagonal is
    added to each matrix that is inverted.
    """

    def __init__(
        self,
        heads: HeadStatistics,
        pairs: torch.Tensor,
        slots: torch.Tensor,
        distances: Distances,
        *,
        centring: float,
        floor: float,
    ) -> None:
        self.heads, self.centring, self.floor = heads, centring, floor
        still = torch.zeros(1, dtype=torch.float64)
        self._mixed = distances.expected_phase(pairs, slots)
        self._slots = distances.expected_phase(slots, slots)
        self._pair_mean = distances.expected_phase(pairs, still)  # [P, 1]
        self._slot_mean = distances.expected_phase(slots, still)  # [S, 1]
        self._mean = heads.key_mean[..., None]  # [K, P, 1]
        self._whitened_mean = torch.linalg.solve(_damped(heads.keys, floor), self._mean)
        self.energy = self._score_energy(distances.expected_phase(pairs, pairs))

    def _score_energy(self, phases: torch.Tensor) -> torch.Tensor:
        """Return the loss `[K]` of keeping nothing."""
        mean = self._mean * self._pair_mean.conj()
        keys = self.heads.keys * phases.conj() - self.centring * mean @ mean.mH
        return _real_trace(keys, self.heads.queries)

    def solve(self, key: torch.Tensor) -> SlotMaps:
        """Alternate from the given keys' maps `[K, P, S]`. No half-step increases the loss."""
        query = self._best_query(key)
        loss = self.loss(query, key)
        for _ in range(ROUNDS):
            last = loss
            key = self._best_key(query)
            query = self._best_query(key)
            loss = self.loss(query, key)
            if (last - loss).sum() <= ENOUGH * last.sum():
                break
        return SlotMaps(query, key, loss)

    def _query_equations(self, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `N` `[K, S, S]` and `R` `[K, P, S]`, `A N = R`: the derivative by A, multiplied by `E[z^q z^qᴴ]⁻¹`."""
        from_mean = (self._mean.mH @ key) * self._slot_mean.mT  # [K, 1, S], the mean key in each slot
        seen = key.mH @ self.heads.keys @ key * self._slots.conj()
        met = self.heads.keys @ key * self._mixed.conj()
        return (
            seen - self.centring * from_mean.mH @ from_mean,
            met - self.centring * (self._mean * self._pair_mean.conj()) @ from_mean,
        )

    def _best_query(self, key: torch.Tensor) -> torch.Tensor:
        left, right = self._query_equations(key)
        query: torch.Tensor = torch.linalg.solve(_damped(left, self.floor), right, left=False)
        return query

    def loss(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Return the loss `[K]` of maps `[K, P, S]`."""
        left, right = self._query_equations(key)
        reached = self.heads.queries @ query
        quadratic = _real_trace(query.mH @ reached, left)
        return (self.energy - 2 * (reached.conj() * right).sum((-1, -2)).real + quadratic).clamp_min(0)

    def _best_key(self, query: torch.Tensor) -> torch.Tensor:
        """Solve `G_k B N − c μ μᴴ B M = G_k R − c μ μᴴ R'` for B: a rank-one change of `B N = R`, c the centring."""
        reached = self.heads.queries @ query
        energy = query.mH @ reached
        inverse = torch.linalg.inv(_damped(energy * self._slots, self.floor))
        of_means = energy * (self._slot_mean @ self._slot_mean.mH)
        mean, whitened = self._mean, self._whitened_mean
        known = mean.mH @ (self._pair_mean * reached * self._slot_mean.mH)
        right = reached * self._mixed - self.centring * whitened @ known
        coupling = self.centring * (mean.mH @ whitened) * (of_means @ inverse)
        eye = torch.eye(coupling.shape[-1], dtype=coupling.dtype, device=coupling.device)
        mean_in_slots = torch.linalg.solve(_damped(eye - coupling, self.floor), mean.mH @ right @ inverse, left=False)
        key: torch.Tensor = (right + self.centring * whitened @ (mean_in_slots @ of_means)) @ inverse
        return key


def score_error(
    grams: tuple[torch.Tensor, torch.Tensor],
    maps: tuple[torch.Tensor, torch.Tensor],
    pairs: torch.Tensor,
    slots: torch.Tensor,
    distance: float,
) -> float:
    """Return the root mean square error of a layer's scores at one distance, relative to the scores, keys not centred.

    grams: real ones of queries `[H, h, h]` and keys `[K, h, h]`; maps: real ones of both, `[K, h, r]`; pairs `[h/2]`
    and slots `[r/2]` are frequencies. For queries and keys drawn independently; 0 where the scores are 0.
    """
    queries, keys = sum_over_group(grams[0], len(grams[1])), grams[1].double()
    turned = _turn_back(pairs, distance)
    error = turned - maps[0].double() @ _turn_back(slots, distance) @ maps[1].double().mT
    lost = (queries @ error @ keys * error).sum()
    total = (queries @ turned @ keys * turned).sum()
    return float((lost / total).clamp_min(0).sqrt()) if total > 0 else 0.0


def _turn_back(frequencies: torch.Tensor, distance: float) -> torch.Tensor:
    """Return the rotation `[2n, 2n]` by −`distance`, pairs in dims `(p, p + n)`: a score is `qᵀ · rotation · k`."""
    cos, sin = (torch.diag(part) for part in ((frequencies * distance).cos(), (frequencies * distance).sin()))
    return torch.cat([torch.cat([cos, sin], -1), torch.cat([-sin, cos], -1)], -2)


def _real_trace(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return `Re tr(first · second)` of `[..., n, n]`."""
    return (first * second.mT).sum((-1, -2)).real


def _damped(matrix: torch.Tensor, floor: float) -> torch.Tensor:
    """Return `matrix + floor · (mean of its diagonal) · I`, or the identity for a zero matrix."""
    mean = matrix.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    damping = torch.where(mean > 0, floor * mean, 1.0)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + damping[..., None, None] * eye
