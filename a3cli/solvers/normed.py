"""Smaller query and key heads behind a norm: maps and the norms' weights, fitted on sampled attention.

The source's heads are `q̂ = γ ∘ q / rms(q)`, the same γ `[h]` for all heads of a layer; keys likewise. No linear map
passes through a norm, but a smaller head can have a norm of its own:

    q' = γ' ∘ p / rms(p),   p = Mᵀ q̂

A norm ignores the length of p, so M may take q̂, which calibration samples, in place of q: `Mᵀ (γ ∘ q)` has the same
direction. RoPE comes after the norm, so M need not commute with it. Maps are real `[h, r]`, for each KV head one of its
queries and one of its keys; γ' `[r]` of queries and of keys are shared by all heads of the layer, as in the source.

The start are maps that ignore the norm (`solvers/slots.py`), which get the directions right, with equal γ': the norm
then divides by the length that these maps give a head. Then maps and γ' are refined together by L-BFGS for the loss of
`solvers/attention.py`, with the norms inside.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from a3cli.solvers.attention import EVALUATIONS, AttentionProblem, Piece, SampledHead, lbfgs, whitening
from a3cli.solvers.rope import as_pairs

EPSILON = 1e-12  # of the mean square of a head, which may be zero


@dataclass(frozen=True)
class NormedHeads:
    """A layer's maps `[K, h, r]` of queries and keys, and the weights `[r]` of the norms behind them, float64."""

    query: torch.Tensor
    key: torch.Tensor
    query_norm: torch.Tensor
    key_norm: torch.Tensor

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.key, self.query_norm, self.key_norm


Penalty = Callable[[NormedHeads], torch.Tensor]


@dataclass(frozen=True)
class RefinedHeads:
    """Smaller heads, and the validation loss before and after refinement."""

    heads: NormedHeads
    before: float
    after: float


def with_norms(query: torch.Tensor, key: torch.Tensor, q_gram: torch.Tensor, k_gram: torch.Tensor) -> NormedHeads:
    """Return maps `[K, h, r]` that ignore the norm, with norms whose equal weights restore the heads' mean squares.

    q_gram `[H, h, h]` and k_gram `[K, h, h]` are those of the source's heads behind its norms. Both maps of a slot,
    dims `(j, j + r/2)`, are scaled to the same energy, which leaves scores as they are.
    """
    of_queries = q_gram.double().unflatten(0, (len(k_gram), -1)).mean(1)
    squares = [_mean_squares(query, of_queries), _mean_squares(key, k_gram)]
    energies = [each.unflatten(-1, (2, -1)).sum(-2).clamp_min(EPSILON) for each in squares]
    share = (energies[0] / energies[1]).pow(0.25).repeat(1, 2)  # [K, r]
    sizes = [(squares[0] / share.square()).mean().sqrt(), (squares[1] * share.square()).mean().sqrt()]
    weights = [size.clamp_min(EPSILON).repeat(query.shape[-1]) for size in sizes]
    scales = [1 / (share[:, None] * weights[0]), share[:, None] / weights[1]]
    return NormedHeads(query.double() * scales[0], key.double() * scales[1], *weights)


def without_norms(heads: NormedHeads, q_gram: torch.Tensor, k_gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return maps `[K, h, r]` of queries and keys that do what these heads do to vectors of mean length."""
    of_queries = q_gram.double().unflatten(0, (len(k_gram), -1)).mean(1)
    lengths = [_mean_squares(*each).mean(-1).sqrt() for each in ((heads.query, of_queries), (heads.key, k_gram))]
    query, key = (each / (length + EPSILON)[:, None, None] for each, length in zip(heads.parts, lengths, strict=False))
    return query * heads.query_norm, key * heads.key_norm


def _mean_squares(maps: torch.Tensor, grams: torch.Tensor) -> torch.Tensor:
    """Return the mean square `[K, r]` of each dim of `Mᵀ x`, for Gram matrices `[K, h, h]` of x."""
    return torch.einsum("khr,khi,kir->kr", maps.double(), grams.double(), maps.double())


class NormedHead(AttentionProblem):
    """The loss of one KV head of `AttentionProblem`, of which RoPE rotates all dims, for a smaller head with a norm."""

    def __init__(self, head: SampledHead) -> None:
        super().__init__(head)
        self.queries, self.keys = head.queries.transpose(1, 2), head.keys  # real, as the maps

    def _smaller(self, piece: Piece, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return complex queries and keys behind the norm; `maps` are `NormedHeads.parts` of this KV head."""
        query, key, query_norm, key_norm = maps
        queries, keys = self._of(piece)
        return as_pairs(normed(queries @ query, query_norm)), as_pairs(normed(keys @ key, key_norm))

    def error(self, index: int, parts: Sequence[torch.Tensor], turns: torch.Tensor) -> torch.Tensor:
        """Return one piece's part of the loss."""
        return self._error(index, parts, turns)

    def turns(self, slots: torch.Tensor) -> torch.Tensor:
        return self._turns(slots)


def normed(heads: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return `γ' ∘ p / rms(p)` of heads `[..., r]`."""
    return heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + EPSILON) * weights


class NormedAttention:
    """The loss per token of a layer's smaller heads: the sum over KV heads, since these share the norms' weights."""

    def __init__(self, heads: Sequence[SampledHead]) -> None:
        self.heads = [NormedHead(head) for head in heads]
        self.device = heads[0].keys.device

    def loss(self, found: NormedHeads, slots: torch.Tensor) -> float:
        """Return the loss for slots `[S]` in radians per position, r = 2S."""
        with torch.no_grad():
            parts = [self._narrow(each) for each in found.parts]
            return sum(
                head.error(piece, of_head(parts, i), turns).item()
                for i, head, turns in self._turned(slots)
                for piece in range(len(head.pieces))
            )

    def refine(
        self,
        start: NormedHeads,
        slots: torch.Tensor,
        *,
        judge: "NormedAttention",
        iterations: int,
        penalty: Penalty | None = None,
        advance: Callable[[float], object] = lambda _share: None,
    ) -> RefinedHeads:
        """Refine by L-BFGS; return the heads with the least loss on `judge` (other samples), possibly the start.

        `penalty` is an additional cost of the heads. The variables are the maps of whitened queries and keys, of unit
        size, which their norms allow, and the norms' weights relative to their mean. `advance` is called with shares of
        the work.
        """
        before = judge.loss(start, slots)
        best, lowest = RefinedHeads(start, before, before), math.inf
        if (unit := self.loss(start, slots)) == 0:
            return best
        space = Whitened(self.heads, start)
        variables = [each.clone().requires_grad_() for each in space.start]
        optimizer = lbfgs(variables, iterations)
        turned = list(self._turned(slots))

        def evaluate() -> torch.Tensor:
            nonlocal best, lowest
            optimizer.zero_grad()
            heads = space.heads(variables)
            total = self._descend(heads, turned, unit, penalty)
            if total < lowest:  # a step that the line search accepts; never one with a float32 overflow
                lowest = total.item()
                found = NormedHeads(*(part.detach() for part in heads.parts))
                after = judge.loss(found, slots)
                if after < best.after:
                    best = RefinedHeads(found, before, after)
            advance(1 / (EVALUATIONS * iterations))
            return total

        with torch.enable_grad():
            optimizer.step(evaluate)
        return best

    def _descend(
        self,
        heads: NormedHeads,
        turned: "list[tuple[int, NormedHead, torch.Tensor]]",
        unit: float,
        penalty: Penalty | None,
    ) -> torch.Tensor:
        """Return the loss of these heads and add its gradient to their variables, a piece of the samples at a time."""
        costs = [penalty(heads) / unit] if penalty else []
        narrow = [self._narrow(each) for each in heads.parts]
        leaves = [each.detach().requires_grad_() for each in narrow]
        total = torch.zeros((), dtype=torch.float64)
        for i, head, turns in turned:
            for piece in range(len(head.pieces)):
                error = head.error(piece, of_head(leaves, i), turns) / unit
                error.backward()
                total += error.detach().cpu()
        torch.autograd.backward([*narrow, *costs], [*(leaf.grad for leaf in leaves), *(None for _ in costs)])
        return total + sum(cost.detach() for cost in costs)

    def _turned(self, slots: torch.Tensor) -> Iterator[tuple[int, NormedHead, torch.Tensor]]:
        return ((i, head, head.turns(slots)) for i, head in enumerate(self.heads))

    def _narrow(self, part: torch.Tensor) -> torch.Tensor:
        return part.to(self.device, torch.float32)


def of_head(parts: Sequence[torch.Tensor], kv_head: int) -> list[torch.Tensor]:
    """Return a KV head's maps, and the weights that all share."""
    return [parts[0][kv_head], parts[1][kv_head], *parts[2:]]


class Whitened:
    """Coordinates in which L-BFGS converges fast: `M = E[q̂ q̂ᵀ]^{-1/2} M'`, M' of unit size, and `γ' = size · g`."""

    def __init__(self, heads: Sequence[NormedHead], start: NormedHeads) -> None:
        self._roots = [
            torch.stack([whitening(head.queries, torch.float64) for head in heads]).cpu(),
            torch.stack([whitening(head.keys, torch.float64) for head in heads]).cpu(),
        ]
        self._sizes = [each.square().mean().sqrt() for each in start.parts[2:]]
        maps = [torch.linalg.solve(root, each.cpu()) for root, each in zip(self._roots, start.parts[:2], strict=True)]
        maps = [each / each.square().mean((-1, -2), keepdim=True).sqrt() for each in maps]
        norms = [each / size for each, size in zip(start.parts[2:], self._sizes, strict=True)]
        self.start = [each.float().contiguous() for each in (*maps, *norms)]

    def heads(self, variables: Sequence[torch.Tensor]) -> NormedHeads:
        """Return the heads in float64."""
        maps = [root @ each.double() for root, each in zip(self._roots, variables[:2], strict=True)]
        norms = [each.double() * size for each, size in zip(variables[2:], self._sizes, strict=True)]
        return NormedHeads(*maps, *norms)
