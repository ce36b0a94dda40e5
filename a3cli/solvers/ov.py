"""A³-OV: smaller values and output projections. `W_o,i` is `[h, d]`, the rows of head i."""

import torch

from a3cli.solvers.linalg import JointDecomposition, decompose_jointly, solve_ridge
from a3cli.solvers.qk import sum_over_group


def solve_ov(value_gram: torch.Tensor, output_gram: torch.Tensor, *, floor: float) -> JointDecomposition:
    """A³-OV (Theorem A³-OV, joint over a KV group).

    value_gram `[K, h, h]`: the Gram matrix of what enters the output projection, `E[o_i o_iᵀ]` for MHA; the
    paper's `E[v vᵀ]` for GQA. output_gram `[H, h, h]` = `W_o,i W_o,iᵀ`. `W_v ← W_v · shared_map`,
    `W_o,i ← other_mapᵀ · W_o,i`. For MHA the loss is the exact minimum of `E‖o_i W_o,i − õ_i W̃_o,i‖²`.
    """
    return decompose_jointly(value_gram, sum_over_group(output_gram, len(value_gram)), floor=floor)


def output_gram_of(output_weight: torch.Tensor) -> torch.Tensor:
    """`W_o,i W_o,iᵀ` `[H, h, h]` in float64, of `[H, h, d]`; one head is converted at a time."""
    return torch.stack([head.double() @ head.double().mT for head in output_weight])


def refit_output(
    o_gram: torch.Tensor, output_weight: torch.Tensor, value_map: torch.Tensor, *, ridge: float
) -> torch.Tensor:
    """The output projection `[H·r, d]` that fits best what all heads together put out, by least squares.

    o_gram `[Hh, Hh]` = `E[o oᵀ]` over all heads, output_weight `[Hh, d]`, value_map `[K, h, r]`. With `õ = Aᵀo`, `A`
    block diagonal, `W̃ = (Aᵀ C A + εI)⁻¹ Aᵀ C W`, ε = `ridge` times the mean of the diagonal. Repairs what treating
    heads one by one ignores; never worse on the calibration set than their own output maps.
    """
    heads = len(o_gram) // value_map.shape[1]
    blocks = value_map.double().repeat_interleave(heads // len(value_map), 0)
    a = torch.block_diag(*blocks)
    reduced = a.mT @ o_gram.double()
    return solve_ridge(reduced @ a, reduced @ output_weight.double(), ridge=ridge)
