"""A³-OV: smaller values and output projections. `W_o,i` is `[h, d]`, the rows of head i."""

import torch

from a3cli.solvers.linalg import JointDecomposition, conjugate_gradients, decompose_jointly, solve_ridge
from a3cli.solvers.qk import sum_over_group

REFINEMENT_STEPS = 10  # of conjugate gradients in one round of `refine_values`; 30 give the same loss


def solve_ov(value_gram: torch.Tensor, output_gram: torch.Tensor, *, floor: float) -> JointDecomposition:
    """Solve A³-OV (Theorem A³-OV, joint over a KV group).

    value_gram `[K, h, h]`: the Gram matrix of the output projection's input, `E[o_i o_iᵀ]` for MHA; the
    paper's `E[v vᵀ]` for GQA. output_gram `[H, h, h]` = `W_o,i W_o,iᵀ`. `W_v ← W_v · shared_map`,
    `W_o,i ← other_mapᵀ · W_o,i`. For MHA the loss is the exact minimum of `E‖o_i W_o,i − õ_i W̃_o,i‖²`.
    """
    return decompose_jointly(value_gram, sum_over_group(output_gram, len(value_gram)), floor=floor)


def output_gram_of(output_weight: torch.Tensor) -> torch.Tensor:
    """Return `W_o,i W_o,iᵀ` `[H, h, h]` in float64, for `[H, h, d]`; one head is converted at a time."""
    return torch.stack([head.double() @ head.double().mT for head in output_weight])


def refit_output(
    o_gram: torch.Tensor, output_weight: torch.Tensor, value_map: torch.Tensor, *, ridge: float
) -> torch.Tensor:
    """Return the output projection `[H·r, d]` that fits the output of all heads together by least squares.

    o_gram `[Hh, Hh]` = `E[o oᵀ]` over all heads, output_weight `[Hh, d]`, value_map `[K, h, r]`. With `õ = Aᵀo`, `A`
    block diagonal, `W̃ = (Aᵀ C A + εI)⁻¹ Aᵀ C W`, ε = `ridge` times the mean of the diagonal. Accounts for
    correlations between heads; never worse on the calibration set than the heads' own output maps.
    """
    a = _block_diagonal(o_gram, value_map)
    reduced = a.mT @ o_gram.double()
    return solve_ridge(reduced @ a, reduced @ output_weight.double(), ridge=ridge)


def refine_values(
    o_gram: torch.Tensor, output_weight: torch.Tensor, value_map: torch.Tensor, *, ridge: float, rounds: int
) -> torch.Tensor:
    """Refine value maps `[K, h, r]` for the output of all heads together, by alternating least squares.

    The initial maps of `solve_ov` treat KV heads separately, and a group by its mean Gram matrix. For the output
    projection `W̃` that `refit_output` gives, `‖C^½ (W − A W̃)‖²` is quadratic in the shared maps A as well: its normal
    equations `Σ_{i in group} Σ_j C_ij A_j W̃_j W̃_iᵀ = Σ_{i in group} (C W)_i W̃_iᵀ` are solved by conjugate gradients.
    Never worse on the calibration set than the initial maps.
    """
    kv_heads, size, rank = value_map.shape
    heads = len(o_gram) // size
    gram, maps = o_gram.double(), value_map.double()
    blocks = gram.view(heads, size, heads, size)
    wanted = (gram @ output_weight.double()).view(heads, size, -1)

    def of_groups(by_head: torch.Tensor) -> torch.Tensor:
        return by_head.view(kv_heads, -1, size, rank).sum(1)

    for _ in range(rounds):
        output = refit_output(o_gram, output_weight, maps, ridge=ridge).view(heads, rank, -1)
        met = torch.einsum("ird,jsd->ijrs", output, output)

        def normal(step: torch.Tensor, met: torch.Tensor = met) -> torch.Tensor:
            by_head = step.repeat_interleave(heads // kv_heads, 0)
            return of_groups(torch.einsum("ihjk,jkr,jirs->ihs", blocks, by_head, met))

        right = of_groups(wanted @ output.mT) - normal(maps)
        maps = maps + conjugate_gradients(normal, right, lambda residual: residual, iterations=REFINEMENT_STEPS)
    return maps


def _block_diagonal(o_gram: torch.Tensor, value_map: torch.Tensor) -> torch.Tensor:
    """Return `A` `[Hh, H·r]` with each head's map `[h, r]`, that of its group."""
    heads = len(o_gram) // value_map.shape[1]
    a: torch.Tensor = torch.block_diag(*value_map.double().repeat_interleave(heads // len(value_map), 0))
    return a
