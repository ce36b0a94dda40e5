"""The paper's method as published, by masking: pairs per KV head, and the same share of every component and layer.

`a3 solve --method paper` gives a checkpoint that stock runtimes load, for which all heads must keep the same pairs,
and it splits the budget over attention and MLP by predicted loss. The paper (arXiv 2505.12942) does neither: each KV
head keeps its own pairs, which needs a frequency index per head and a custom kernel. Here, what is dropped is zeros in
a model of full size: its logits are those of the smaller model, and what that one would store is counted.

Pairs: `Σ_{both dims} (Σ_i E[q_i²]) E[k²]`, energies before RoPE. Values: Theorem A³-OV per KV head, with the Gram
matrix of the values under GQA, and that of the head's output under MHA. MLP: `R_jj ‖w_j‖²`. Kept rows of q, k, gate and
up and kept columns of down stay as they are.
"""

import copy
from typing import Any

import torch

from a3cli.models.families import ModelShape
from a3cli.solvers.mlp import score_channels
from a3cli.solvers.ov import output_gram_of, solve_ov
from a3cli.solvers.qk import score_pairs
from benchmarks.baselines import (
    Calibration,
    Compressed,
    Grams,
    affine_of,
    decoder_weights,
    keep_channels,
    keep_pairs,
    mask_top,
    padded,
    set_affine,
    set_weight,
    structured_weights,
    weight_of,
    widths_for,
)

FLOOR = 1e-10  # smallest eigenvalue relative to the largest, as the default of a3


@torch.no_grad()
def published(calibration: Calibration, target: float) -> Compressed:
    """Cut query/key pairs, value dims and channels by the same share, with the unmodified model's statistics."""
    shape, dense = calibration.shape, decoder_weights(calibration.shape)
    widths = widths_for(shape, target, attention=True)
    model = copy.deepcopy(calibration.model)
    for layer, grams in zip(model.model.layers, calibration.grams, strict=True):
        keep_pairs(layer, mask_top(pair_scores(layer, grams, shape), widths.pairs))
        if widths.values < shape.head_dim:
            truncate_values(layer, grams, shape, widths.values)
        scores = score_channels(grams["down"].diagonal(), weight_of(layer, "down"))
        keep_channels(layer, mask_top(scores, widths.channels))
    return Compressed(model, structured_weights(shape, widths), dense)


def pair_scores(layer: Any, grams: Grams, shape: ModelShape) -> torch.Tensor:
    """Return the loss `[K, h/2]` of dropping each pair of each KV head."""
    return score_pairs(*(head_grams(affine_of(layer, role), grams["affine"], shape) for role in ("q", "k")))


def head_grams(weight: torch.Tensor, gram: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """Return `E[y yᵀ]` `[heads, h, h]` of `y = W x`, for W `[heads · h, d + 1]` and `E[x xᵀ]` of inputs with a 1."""
    heads = weight.view(-1, shape.head_dim, weight.shape[1])
    return heads @ gram @ heads.mT


def truncate_values(layer: Any, grams: Grams, shape: ModelShape, rank: int) -> None:
    """Replace values and output projection by those of Theorem A³-OV at this rank."""
    h = shape.head_dim
    value, output = affine_of(layer, "v").view(-1, h, shape.hidden_size + 1), weight_of(layer, "o")
    by_head = output.T.reshape(shape.heads, h, -1)
    found = solve_ov(value_gram(layer, grams, shape), output_gram_of(by_head), floor=FLOOR)
    new_value = torch.cat([padded(part, h) for part in found.shared_map[..., :rank].mT @ value])
    maps = found.other_map[..., :rank].mT.repeat_interleave(shape.group, 0)
    new_output = torch.cat([padded(part, h) for part in maps @ by_head]).T
    set_affine(layer, "v", new_value)
    set_weight(layer, "o", new_output)


def value_gram(layer: Any, grams: Grams, shape: ModelShape) -> torch.Tensor:
    """Return the Gram matrix `[K, h, h]` that the paper weighs values with."""
    if shape.group > 1:
        return head_grams(affine_of(layer, "v"), grams["affine"], shape)
    outputs = grams["o"].view(shape.heads, shape.head_dim, shape.heads, shape.head_dim)
    return outputs.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
