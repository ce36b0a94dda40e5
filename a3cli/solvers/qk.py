"""A³-QK: smaller queries and keys. `H` query heads, `K` KV heads, `g = H/K`, head size `h`."""

import torch

from a3cli.solvers.linalg import JointDecomposition, decompose_jointly


def solve_qk(q_gram: torch.Tensor, k_gram: torch.Tensor, *, floor: float) -> JointDecomposition:
    """Solve A³-QK without RoPE (Theorem A³-QK, joint over a KV group).

    q_gram `[H, h, h]` = `E[q_i q_iᵀ]`, k_gram `[K, h, h]` = `E[k kᵀ]`, biases included. Minimises
    `Σ_i E|q_iᵀk − q̃_iᵀk̃|²` for query and key tokens drawn independently. `W_q,i ← W_q,i · other_map`,
    `W_k ← W_k · shared_map`, biases alike (columns of W are head dims).
    """
    return decompose_jointly(k_gram, sum_over_group(q_gram, len(k_gram)), floor=floor)


def score_pairs(q_gram: torch.Tensor, k_gram: torch.Tensor) -> torch.Tensor:
    """Return the loss `[K, h/2]` of dropping each rotated pair: A³-QK with RoPE (the paper's CUR form).

    Pair p is dims `(p, p + h/2)`; its score is `Σ_{both dims} (Σ_i E[q_i²]) E[k²]`.
    """
    queries = sum_over_group(q_gram, len(k_gram)).diagonal(dim1=-2, dim2=-1).double()
    energy = queries * k_gram.diagonal(dim1=-2, dim2=-1).double()
    first, second = energy.chunk(2, -1)
    return first + second


def keep_pairs(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """Return the indices `[kept]` of the highest scores `[h/2]`, ascending; among equals the first pair wins."""
    return scores.argsort(descending=True, stable=True)[:kept].sort().values


def sum_over_group(gram: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Sum `[H, h, h]` of query heads over the group of each KV head: `[K, h, h]`, float64."""
    return gram.double().view(kv_heads, len(gram) // max(1, kv_heads), *gram.shape[1:]).sum(1)
