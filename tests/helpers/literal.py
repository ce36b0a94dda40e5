"""The paper's formulas as printed: d × d autocorrelations, their square roots, and SVDs of d × d matrices.

They are slow and straightforward on purpose: the head-space solvers must equal them. Vectors are rows: a token
`x` `[d]` gives the query `x W`; a bias is an additional row of `W` for a constant 1 in `x`.
"""

from dataclasses import dataclass

import torch


def square_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def truncate(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the best rank-r approximation, by SVD."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@dataclass
class Attention:
    """Random attention of one layer, float64. x `[n, d']`, weights `[heads, d', h]`, w_o `[H, h, d]`.

    `mixed` `[H, n, d']` are the attention-weighted inputs `p x` of each head.
    """

    x: torch.Tensor
    mixed: torch.Tensor
    w_q: torch.Tensor
    w_k: torch.Tensor
    w_v: torch.Tensor
    w_o: torch.Tensor

    @property
    def group(self) -> int:
        return len(self.w_q) // len(self.w_k)

    def gram(self, weights: torch.Tensor) -> torch.Tensor:
        """Return `E[y yᵀ]` `[heads, h, h]` of `y = x W`."""
        y = torch.einsum("nd,ahd->anh", self.x, weights.mT)
        return y.mT @ y / len(self.x)

    def output_gram(self) -> torch.Tensor:
        """Return `E[o_i o_iᵀ]` `[H, h, h]` of each head's input to the output projection."""
        o = self.mixed @ self.w_v.repeat_interleave(self.group, 0)
        return o.mT @ o / len(self.x)

    def autocorrelation(self) -> torch.Tensor:
        return self.x.T @ self.x / len(self.x)


def random_attention(heads: int, kv_heads: int, *, bias: bool, d: int = 24, h: int = 8, seed: int = 0) -> Attention:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = 4 * d
    x = normal(tokens, d) @ normal(d, d) / d**0.5
    if bias:
        x = torch.cat([x, torch.ones(tokens, 1, dtype=torch.float64)], 1)
    inputs = x.shape[1]
    attention = normal(heads, tokens, tokens).mul(2).softmax(-1)
    return Attention(
        x,
        attention @ x,
        normal(heads, inputs, h),
        normal(kv_heads, inputs, h),
        normal(kv_heads, inputs, h),
        normal(heads, h, d),
    )
