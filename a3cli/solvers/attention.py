"""A³-QK on attention itself: refine query and key maps to preserve a head's output, on sampled queries.

The effect of score errors depends on the softmax. If it is sure of a key, even a large error of the others changes
nothing; if two keys compete, a small error does. So after the closed form (`solvers/slots.py`), which weighs all scores
alike, the same maps are refined for the output of attention:

    min  E_m Σ_i ‖(ã_i,m − a_i,m) V W_o,i‖²,
    ã_i,m = softmax over n of Re Σ_s (Aᴴ z^q_i,m)_s conj(Bᴴ z^k_n)_s exp(iφ_s(m−n)) · scale

over the sampled queries m of a KV head's group of heads i, by L-BFGS from the closed form's maps: a smooth problem in
`4 P S` real numbers. Few samples would be overfitted, so every step is validated on other samples, and the maps with
the lowest validation loss are kept. `z = x_p + i·x_{p+h/2}` as in `solvers/rope.py`; P = h/2 pairs, S slots.
With partial RoPE, `z` are the h real dims, as in `solvers/partial.py`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from a3cli.solvers.rope import as_pairs

FLOOR = 1e-4  # of the mean eigenvalue, when queries and keys are whitened
ENTRIES = 1 << 17  # scores at a time, so that they stay in the cache
ENTRIES_ON_GPU = 1 << 25

ROW_PARTS = 4  # parts of a block's queries: early ones need few keys

EVALUATIONS = 1.25  # that L-BFGS makes in an iteration, at most

Penalty = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SampledHead:
    """One KV head's attention samples, on the device of the fit.

    queries `[N, R, g, h]` of its g heads and keys `[N, T, h]` before RoPE, values `[N, T, h]`, all float32; `seen`
    `[N, R, 2]` is the first key that each query attends to and its own place, the last one; `pairs` `[P]` are radians
    per position; `scale` multiplies scores; `output_gram` `[g, h, h]` is `W_o,i W_o,iᵀ`; `turning` counts the rotated
    pairs, None if all are; `weights` `[N, R]` multiply the queries' errors, None for 1 each; a score s is capped as
    `cap · tanh(s / cap)`.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    seen: torch.Tensor
    pairs: torch.Tensor
    scale: float
    output_gram: torch.Tensor
    turning: int | None = None
    weights: torch.Tensor | None = None
    cap: float | None = None
    slopes: torch.Tensor | None = None  # [g], of ALiBi: added to scores for each position of the key


@dataclass(frozen=True)
class Refined:
    """Complex maps `[P, S]` of queries and keys, and the validation loss before and after refinement."""

    query: torch.Tensor
    key: torch.Tensor
    before: float
    after: float


@dataclass(frozen=True)
class Piece:
    """Some blocks, some of their queries, and the keys up to `length` that these attend to."""

    blocks: slice
    rows: slice
    length: int


class AttentionProblem:
    """The squared error per token of one KV head's contribution to the residual stream, as a function of its maps."""

    def __init__(self, head: SampledHead) -> None:
        self.head = head
        real = head.queries.transpose(1, 2), head.keys
        self.queries, self.keys = (as_pairs(x, head.turning) for x in real)
        self.pieces = list(self._cut())
        turns = self._turns(head.pairs)
        self.outputs = [self._outputs(piece, *self._of(piece), turns) for piece in self.pieces]
        if head.turning is not None:
            self.queries, self.keys = (x.to(self.keys.dtype) for x in real)

    def _of(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries `[n, g, R, P]` and keys `[n, T, P]` of a piece."""
        return self.queries[piece.blocks, :, piece.rows], self.keys[piece.blocks, : piece.length]

    def _cut(self) -> Iterator[Piece]:
        """Cut into pieces: some blocks, some of their queries, and only the keys that these attend to."""
        blocks, group, rows = self.queries.shape[:3]
        small = blocks * rows * group * self.keys.shape[1] <= ENTRIES
        for some in torch.arange(rows).chunk(1 if small else ROW_PARTS):
            inside = slice(int(some[0]), int(some[-1]) + 1)
            length = int(self.head.seen[:, inside, 1].max()) + 1
            entries = ENTRIES if self.keys.device.type == "cpu" else ENTRIES_ON_GPU
            for few in torch.arange(blocks).split(max(1, entries // (len(some) * group * length))):
                yield Piece(slice(int(few[0]), int(few[-1]) + 1), inside, length)

    def loss(self, query: torch.Tensor, key: torch.Tensor, slots: torch.Tensor) -> float:
        """Return the loss of complex maps `[P, S]` and slots `[S]` in radians per position."""
        with torch.no_grad():
            turns = self._turns(slots)
            narrow = self._narrow(query, key)
            return sum(self._error(i, narrow, turns).item() for i in range(len(self.pieces)))

    def refine(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        slots: torch.Tensor,
        *,
        judge: "AttentionProblem",
        iterations: int,
        penalty: Penalty | None,
        advance: Callable[[float], object] = lambda _share: None,
    ) -> Refined:
        """Refine maps by L-BFGS; return those with the least loss on `judge` (other samples), possibly the given ones.

        Complex128 on the device of the given maps. `penalty` is an additional cost of the maps, or None. The variables
        are the maps of whitened queries and keys, which halves the iterations. `advance` is called with shares of the
        work.
        """
        before = judge.loss(query, key, slots)
        best, lowest = Refined(query, key, before, before), math.inf
        if (unit := self.loss(query, key, slots)) == 0:
            return best
        widen, turns = [whitening(self.queries), whitening(self.keys)], self._turns(slots)
        start = balanced(*(torch.linalg.solve(w, x.to(w)) for w, x in zip(widen, (query, key), strict=True)))
        variables = [torch.view_as_real(x.to(torch.complex64).contiguous()).clone().requires_grad_() for x in start]
        optimizer = lbfgs(variables, iterations)

        def evaluate() -> torch.Tensor:
            nonlocal best, lowest
            optimizer.zero_grad()
            wide = [w @ torch.view_as_complex(x).to(w) for w, x in zip(widen, variables, strict=True)]
            total = self._descend(wide, turns, unit, penalty)
            if total < lowest:  # a step that the line search accepts; never one with a float32 overflow
                lowest = total.item()
                found = [x.detach().to(query) for x in wide]
                after = judge.loss(found[0], found[1], slots)
                if after < best.after:
                    best = Refined(found[0], found[1], before, after)
            advance(1 / (EVALUATIONS * iterations))
            return total

        with torch.enable_grad():
            optimizer.step(evaluate)
        return best

    def _descend(
        self, wide: list[torch.Tensor], turns: torch.Tensor, unit: float, penalty: Penalty | None
    ) -> torch.Tensor:
        """Return the loss of these maps and add its gradient to their variables.

        A few blocks at a time: the softmax's saved tensors would exhaust memory.
        """
        costs = [penalty(*wide) / unit] if penalty else []
        narrow = self._narrow(*wide)
        leaves = [x.detach().requires_grad_() for x in narrow]
        total = torch.zeros((), dtype=torch.float64)
        for i in range(len(self.pieces)):
            error = self._error(i, leaves, turns) / unit
            error.backward()
            total += error.detach().cpu()
        torch.autograd.backward([*narrow, *costs], [*(leaf.grad for leaf in leaves), *(None for _ in costs)])
        return total + sum(cost.detach() for cost in costs)

    def _narrow(self, *maps: torch.Tensor) -> list[torch.Tensor]:
        return [x.to(self.keys.device, torch.complex64) for x in maps]

    def _turns(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Return `exp(i f t)` `[T, n]` at each position."""
        places = torch.arange(self.head.keys.shape[1], dtype=torch.float64)
        angle = places[:, None] * frequencies.cpu()
        return torch.polar(torch.ones_like(angle), angle).to(self.keys.device, torch.complex64)

    def _outputs(self, piece: Piece, queries: torch.Tensor, keys: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Return attention's outputs `[n, g, R, h]` of queries `[n, g, R, S]` and keys `[n, T, S]`."""
        first, last = self.head.seen[piece.blocks, piece.rows].long().unbind(-1)
        shape = (*queries.shape[:3], piece.length)
        turned = torch.view_as_real(queries * (self.head.scale * turns[last][:, None])).flatten(-2)
        places = torch.arange(piece.length, device=keys.device)
        hidden = (places < first[..., None]) | (places > last[..., None])  # [n, R, T]
        # Merge heads with queries: broadcasting keys and values over heads would copy them.
        scores = turned.flatten(1, 2) @ torch.view_as_real(keys * turns[: piece.length]).flatten(-2).mT
        scores = capped(scores.view(shape), self.head.cap)
        if self.head.slopes is not None:
            scores = scores + self.head.slopes[:, None, None] * (places - piece.length + 1)
        weights = scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
        found = weights.flatten(1, 2) @ self.head.values[piece.blocks, : piece.length]
        return found.view(*shape[:3], -1)

    def _smaller(self, piece: Piece, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return complex queries `[n, g, R, S]` and keys `[n, T, S]` of the smaller head."""
        query, key = (each.conj() for each in maps)
        queries, keys = self._of(piece)
        return queries @ query, keys @ key

    def _error(self, index: int, maps: Sequence[torch.Tensor], turns: torch.Tensor) -> torch.Tensor:
        """Return one piece's part of the loss."""
        piece = self.pieces[index]
        found = self._outputs(piece, *self._smaller(piece, maps), turns)
        wrong = found - self.outputs[index]
        sampled = self.queries.shape[0] * self.queries.shape[2]
        squares = (wrong @ self.head.output_gram) * wrong
        if self.head.weights is not None:
            squares = squares * self.head.weights[piece.blocks, None, piece.rows, None]
        error: torch.Tensor = squares.sum() / sampled
        return error


def capped(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return attention scores as a model that limits them (Gemma 2) gives them to the softmax."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


def alibi_slopes(heads: int) -> torch.Tensor:
    """Return the slope of each head `[H]` of ALiBi with a largest bias of 8 (arXiv 2108.12409, as MPT orders them)."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** -(torch.arange(1, power + 1) * 8 / power)
    return slopes if power == heads else torch.cat([slopes[1::2], slopes[::2]])[:heads]


def whitening(samples: torch.Tensor, dtype: torch.dtype = torch.complex128) -> torch.Tensor:
    """Return `E[z zᴴ]^{-1/2}` `[P, P]` of samples `[..., P]`, in this dtype: `z̃ = Mᴴ z`, `M = E[z zᴴ]^{-1/2} M'`."""
    flat = samples.flatten(0, -2).to(dtype)
    gram = (flat.mH @ flat).mT / len(flat)
    values, vectors = torch.linalg.eigh(gram)
    floor = FLOOR * values.mean().clamp_min(torch.finfo(torch.float64).tiny)
    root: torch.Tensor = (vectors * values.clamp_min(floor).rsqrt()) @ vectors.mH
    return root


def balanced(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale both maps so that each slot has the same product and equal energy in both."""
    share = (query.abs().square().sum(0) / key.abs().square().sum(0)).nan_to_num(1.0, 1.0).clamp(1e-6, 1e6).pow(0.25)
    return query / share, key * share


def lbfgs(variables: list[torch.Tensor], iterations: int) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(
        variables,
        max_iter=iterations,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=1e-9,
    )
