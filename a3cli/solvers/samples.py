"""Attention samples: every layer's keys and values of a few blocks, and every eighth query.

The effect of a score error depends on which keys a query attends to, which no Gram matrix contains. The samples give
`solvers/attention.py` that information. Queries and keys are those before RoPE, all in bfloat16: the rounding is the
same for the source and for the maps fitted to it. If a norm follows the output projection, each query's weight `1/rms²`
in the residual stream (`moments.py`) is kept too.
"""

from dataclasses import dataclass

import torch

from a3cli.solvers.sampling import sampled_blocks, sampled_queries

NAMES = ("sample_q", "sample_k", "sample_v", "sample_seen")
WEIGHT = "sample_weight"  # only if a norm follows the output projection

Tensors = dict[str, torch.Tensor]


@dataclass
class AttentionSamples:
    """One layer's samples in one process. Blocks of other processes are zero, so that the sum over all is complete.

    Calibration has `blocks` blocks of `length` tokens; `device` is the activations' device.
    """

    blocks: int
    length: int
    device: torch.device

    def __post_init__(self) -> None:
        self.place = {block: i for i, block in enumerate(sampled_blocks(self.blocks, self.length))}
        self.tensors: Tensors = {}

    def add(
        self,
        first: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Add blocks from `first` on: queries `[B, T, H·h]`, keys and values `[B, T, K·h]`, the model's mask, and the
        tokens' weights `[B, T]`.
        """
        for offset in range(len(q)):
            if (i := self.place.get(first + offset)) is None:
                continue
            rows = torch.tensor(sampled_queries(self.length), device=q.device)
            kept = {
                "sample_q": q[offset, rows],
                "sample_k": k[offset],
                "sample_v": v[offset],
            }
            for name, value in kept.items():
                self._tensor(name, value.shape, torch.bfloat16)[i] = value
            seen = torch.stack([first_seen(rows, offset, mask), rows], -1)
            self._tensor("sample_seen", seen.shape, torch.float32)[i] = seen.float()
            if weights is not None:
                self._tensor(WEIGHT, rows.shape, torch.float32)[i] = weights[offset, rows]

    def _tensor(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        if name not in self.tensors:
            self.tensors[name] = torch.zeros(len(self.place), *shape, dtype=dtype, device=self.device)
        return self.tensors[name]


def first_seen(rows: torch.Tensor, sequence: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the first key `[R]` that queries at `rows` attend to: 0 except with a sliding window.

    mask `[B or 1, 1, T, T]` is boolean (True attends) or additive, None is causal.
    """
    if mask is None:
        return torch.zeros_like(rows)
    own = mask.to(rows.device)[min(sequence, len(mask) - 1), 0, rows]
    attends = own if own.dtype == torch.bool else own == 0
    return attends.int().argmax(-1)


def merge_samples(parts: list[Tensors]) -> Tensors:
    """Return as many samples as one calibration keeps, taken evenly from several (all with blocks of one length)."""
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    kept = sampled_blocks(*joined["sample_k"].shape[:2])
    return {name: value[kept] for name, value in joined.items()}
