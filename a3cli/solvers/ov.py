"""A³-OV: smaller values and output projections. `W_o,i` is `[h, d]`, the rows of head i."""

import torch

from a3cli.solvers.linalg import JointDecomposition, decompose_jointly
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
