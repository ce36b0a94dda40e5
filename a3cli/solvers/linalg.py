"""Square roots of Gram matrices and the joint decomposition of QK and OV. float64 throughout."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Root:
    """`S = G^½` and `S⁻¹`, `[..., h, h]`, of a Gram matrix with a floored spectrum.

    `floored` `[...]` counts the eigenvalues raised to the floor, `effective_rank` `[...]` is the
    exponential of the entropy of the normalised spectrum (Roy & Vetterli, 2007).
    """

    root: torch.Tensor
    inverse: torch.Tensor
    floored: torch.Tensor
    effective_rank: torch.Tensor


def root_and_inverse(gram: torch.Tensor, *, floor: float) -> Root:
    """Return the symmetric square root of `gram` `[..., h, h]` and its inverse, by `eigh` in float64.

    Eigenvalues below `floor` times the largest are raised to it, in the root and in the inverse alike, so
    that the two stay inverse to each other. A zero Gram matrix has the identity for both.
    Raises ValueError if `gram` is not finite.
    """
    if not torch.isfinite(gram).all():
        raise ValueError("the Gram matrix has NaN or Inf values")
    values, vectors = torch.linalg.eigh(_hermitian(gram))
    largest = values.amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    least = max(floor, torch.finfo(torch.float64).tiny) * largest
    dead = (values.amax(-1, keepdim=True) <= 0).expand_as(values)
    floored = (values < least) & ~dead
    values = torch.where(dead, torch.ones_like(values), torch.maximum(values, least))
    return Root(
        root=(vectors * values.sqrt().unsqueeze(-2)) @ vectors.mH,
        inverse=(vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mH,
        floored=floored.sum(-1),
        effective_rank=effective_rank(values),
    )


def effective_rank(spectrum: torch.Tensor) -> torch.Tensor:
    """Return the exponential of the entropy of a spectrum `[..., h]` normalised to sum 1."""
    p = spectrum.clamp_min(0)
    p = p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return torch.exp(-torch.xlogy(p, p).sum(-1))


@dataclass(frozen=True)
class JointDecomposition:
    """All ranks of one group's decomposition at once; rank r takes the first r columns of the maps.

    `values` `[..., h]` descending. `shared_map = S⁻¹U` is for the map whose Gram matrix gave `S` (keys,
    values), `other_map = S U` for the maps that meet it (queries, output). The loss at rank r is
    `Σ_{j>r} values_j`. `floored` and `effective_rank` are those of the shared Gram matrix.
    """

    values: torch.Tensor
    shared_map: torch.Tensor
    other_map: torch.Tensor
    floored: torch.Tensor
    effective_rank: torch.Tensor


def decompose_jointly(shared_gram: torch.Tensor, other_gram: torch.Tensor, *, floor: float) -> JointDecomposition:
    """Return eigenvalues and maps of `S · other_gram · S`, `S = shared_gram^½`; both `[..., h, h]`.

    The head-space form of the paper's Theorems A³-QK and A³-OV with its joint SVD over a GQA group: the
    truncation to rank r is the exact minimum of the group's summed squared error.
    """
    root = root_and_inverse(shared_gram, floor=floor)
    values, vectors = torch.linalg.eigh(_hermitian(root.root @ _wide(other_gram) @ root.root))
    vectors = vectors.flip(-1)
    return JointDecomposition(
        values=values.flip(-1).clamp_min(0),
        shared_map=root.inverse @ vectors,
        other_map=root.root @ vectors,
        floored=root.floored,
        effective_rank=root.effective_rank,
    )


def tail_sums(values: torch.Tensor) -> torch.Tensor:
    """Return the error curve `[..., n + 1]` of a descending spectrum `[..., n]`: entry r is `Σ_{j>=r} values_j`."""
    tails = values.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([tails, torch.zeros_like(tails[..., :1])], -1)


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    """Convert to float64, or to complex128 for the complex Gram matrices of rotated pairs."""
    return matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)


def _hermitian(matrix: torch.Tensor) -> torch.Tensor:
    wide = _wide(matrix)
    return (wide + wide.mH) / 2


def solve_ridge(
    gram: torch.Tensor, target: torch.Tensor, *, ridge: float, overwrite_gram: bool = False
) -> torch.Tensor:
    """Return `(gram + εI)⁻¹ target` by Cholesky, ε = `ridge` times the mean of the diagonal.

    gram `[n, n]` positive semi-definite, target `[n, d]`; with `overwrite_gram` the factor takes gram's place. Raises
    ValueError if it cannot be factorised.
    """
    factor = gram if overwrite_gram else gram.clone()
    mean = gram.diagonal().mean()
    factor.diagonal().add_(torch.where(mean > torch.finfo(gram.dtype).tiny, ridge * mean, 1.0))
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    if failed:
        raise ValueError(f"not positive definite at row {int(failed)} of {len(gram)}")
    return torch.cholesky_solve(target, factor)


def conjugate_gradients(
    operator: Callable[[torch.Tensor], torch.Tensor],
    right: torch.Tensor,
    precondition: Callable[[torch.Tensor], torch.Tensor],
    *,
    iterations: int,
) -> torch.Tensor:
    """Take `iterations` steps from zero towards the solution of `operator(v) = right`, positive definite."""
    solution, residual = torch.zeros_like(right), right.clone()
    direction = conditioned = precondition(residual)
    product = (residual * conditioned).sum()
    for _ in range(iterations):
        if product <= 0:  # solved, or nothing to solve
            break
        moved = operator(direction)
        length = product / (direction * moved).sum()
        solution += length * direction
        residual -= length * moved
        conditioned = precondition(residual)
        last, product = product, (residual * conditioned).sum()
        direction = conditioned + product / last * direction
    return solution
