"""Least squares for a linear layer, from running sums over tokens."""

from dataclasses import dataclass

import torch

from a3cli.solvers.linalg import solve_ridge

ROWS = 256  # rows of a Gram matrix at a time, from the diagonal on


@dataclass
class LeastSquares:
    """Running sums of `x` `[n, m]` and `t` `[n, d]` for the least-squares weight of `t = x Wᵀ`.

    `gain` `[d]` is what each output counts: outputs are fitted independently, so it affects the error only.
    """

    gram: torch.Tensor | None = None  # its upper triangle, with more beside the diagonal
    cross: torch.Tensor | None = None
    energy: float = 0.0
    tokens: int = 0
    gain: torch.Tensor | None = None

    def add(self, x: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens, `[..., m]` and `[..., d]`; `weights` `[...]` are theirs, None for 1 each."""
        x, target = (part.reshape(-1, part.shape[-1]).float() for part in (x, target))
        self.tokens += len(x)
        if weights is not None:
            x, target = (part * weights.reshape(-1, 1).sqrt() for part in (x, target))
        counted = target if self.gain is None else target * self.gain
        self.energy += counted.square().sum(dtype=torch.float64).item()
        if self.gram is None or self.cross is None:
            self.gram, self.cross = (x.new_zeros(x.shape[1], other.shape[1]) for other in (x, target))
        for row in range(0, len(self.gram), ROWS):  # half the work
            self.gram[row : row + ROWS, row:].addmm_(x[:, row : row + ROWS].mT, x[:, row:])
        self.cross.addmm_(x.mT, target)

    def solve(self, weight: torch.Tensor, *, pull: float) -> torch.Tensor:
        """Return `argmin ‖x Wᵀ − t‖² + ε‖W − weight‖²`, `[d, m]`, with ε = `pull` times the mean of `‖x‖²` over tokens.

        So `weight` counts as much as `pull · m` tokens of mean length, evenly in all directions, that it fits exactly.
        Raises ValueError if the Gram is not finite.
        """
        assert self.cross is not None
        gram, start = self._whole_gram(), weight.double().mT
        ridge = pull * len(gram) / self.tokens  # of the mean of the diagonal
        return (start + solve_ridge(gram, self.cross.double() - gram @ start, ridge=ridge)).mT

    def error(self, weight: torch.Tensor) -> float:
        """Return `Σ ‖(x Wᵀ − t) ∘ gain‖²` of a weight `[d, m]`."""
        assert self.cross is not None
        wide = weight.double().mT
        squares = wide * (self._whole_gram() @ wide - 2 * self.cross.double())
        if self.gain is not None:
            squares = squares * self.gain.double().square()
        return self.energy + squares.sum().item()

    def _whole_gram(self) -> torch.Tensor:
        """Return the Gram matrix in float64."""
        assert self.gram is not None
        upper = self.gram.double().triu_()
        return upper.add_(upper.triu(1).mT)
