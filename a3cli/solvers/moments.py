"""Accumulate running sums of activations. Only tensors: no models or files here.

Sums, not means, so that statistics over different text add up exactly. Per layer, over n tokens:

    q_gram [H, h, h]   Σ q_i q_iᵀ   queries, biases included, before RoPE but
                                    after a norm of the head                    q_sum [H, h]
    k_gram [K, h, h]   Σ k kᵀ       keys, likewise                              k_sum [K, h]
    v_gram [K, h, h]   Σ v vᵀ       values                                      v_sum [K, h]
    o_gram [Hh, Hh]    Σ o oᵀ       input of the output projection              o_sum [Hh]
    mlp_gram [I, I]    Σ x xᵀ       input of the down projection                x_sum [I]
    mlp_energy [I]     Σ x²         its diagonal (all there is with diagonal statistics)
    attention_inverse, mlp_inverse []  Σ 1/‖·‖² of the residual stream after attention and after the MLP
    distance [T]       attention mass by query-key distance, of sampled queries over all heads
    tokens []

With experts, each token in an expert's sums is weighted by its routing weight, with which the expert's output enters
the stream; there is no x_sum:

    mlp_gram [E, I, I]  Σ w² x xᵀ    input of each expert's down projection      mlp_energy [E, I]
    expert_tokens [E]   tokens that went through each expert

and attention samples of a few blocks (`samples.py`), which are concatenated, not summed.

If an RMS norm follows a projection, the residual stream gets `γ ∘ f/rms(f)` of its output f, so an error of f counts
`1/rms(f)²`. The sums of outer products and squares of that projection's input (`o_gram`; `mlp_gram`, `mlp_energy`) then
weigh each token by this, and `o_weight` [] is the sum of the weights behind o. All other sums stay as above.

Products are formed in float32 per batch and added up in float64, except the two large Gram matrices
(`o_gram`, `mlp_gram`), which are added up in float32 and stored as the rows of their upper triangle.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from a3cli.solvers.attention import capped
from a3cli.solvers.samples import AttentionSamples

Tensors = dict[str, torch.Tensor]
LARGE = ("o_gram", "mlp_gram")
SAMPLED_QUERIES = 8
PIECE = 512  # tokens
ROWS = 256  # rows of a large Gram matrix at a time
SMALL = 1 << 19  # numbers; memory for so few is available


@dataclass
class LayerMoments:
    """Running sums of one layer, on the activations' device."""

    head_dim: int
    full_mlp: bool
    device: torch.device
    samples: AttentionSamples | None = None
    scale: float | None = None  # of the softmax; None: head_dim ** -0.5
    cap: float | None = None  # of attention scores, see `capped`

    def __post_init__(self) -> None:
        self.sums: Tensors = {}
        self.first_block = 0  # of the current batch
        self._wide = torch.empty(0)

    def add_heads(self, name: str, x: torch.Tensor) -> None:
        """Add `q`, `k` or `v` of a batch, `[..., heads · h]`."""
        flat = x.reshape(-1, x.shape[-1])
        heads = flat.shape[1] // self.head_dim
        # A CPU's batch is small; a GPU's has so many tokens that each piece is summed separately.
        kind = torch.float32 if self._on_cpu else torch.float64
        gram = torch.zeros(heads, self.head_dim, self.head_dim, device=self.device, dtype=kind)
        total = torch.zeros(flat.shape[1], device=self.device, dtype=kind)
        for piece in self._pieces(flat) if self._on_cpu else flat.split(4 * PIECE):
            by_head = piece.view(-1, heads, self.head_dim).transpose(0, 1).float()
            if self._on_cpu:
                gram.baddbmm_(by_head.mT, by_head)
            else:
                gram += by_head.mT @ by_head
            total += piece.sum(0, dtype=kind)
        self._add(f"{name}_gram", gram)
        self._add(f"{name}_sum", total.view(heads, self.head_dim))

    def add_attention_output(self, o: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add the input of the output projection `[..., H · h]`; `weights` `[...]` are the tokens', None for 1 each."""
        flat = o.reshape(-1, o.shape[-1])
        total = torch.zeros(flat.shape[1], device=self.device)
        with products_of(flat.dtype if weights is None else torch.float32):
            for piece, weighted in self._weighted_pieces(flat, weights):
                self._add_gram("o_gram", weighted)
                total += piece.sum(0, dtype=torch.float32)
        self._add("o_sum", total)
        if weights is not None:
            self._add("o_weight", weights.sum(dtype=torch.float64))

    def add_mlp(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add the input of the down projection `[..., I]`; `weights` `[...]` are the tokens', None for 1 each."""
        flat = x.reshape(-1, x.shape[-1])
        energy, total = torch.zeros(2, flat.shape[1], device=self.device)
        with products_of(flat.dtype if weights is None else torch.float32):
            for piece, weighted in self._weighted_pieces(flat, weights):
                total += piece.sum(0, dtype=torch.float32)
                energy += self._energy(weighted)
                if self.full_mlp:
                    self._add_gram("mlp_gram", weighted)
        self._add("mlp_energy", energy)
        self._add("x_sum", total)

    def begin_experts(self, count: int, width: int) -> None:
        """Begin with zeros, once: an expert may get no token, of this process's share or at all."""
        if "expert_tokens" in self.sums:
            return
        self._add("expert_tokens", torch.zeros(count, device=self.device))
        self._add("mlp_energy", torch.zeros(count, width, device=self.device))
        if self.full_mlp:
            self.sums["mlp_gram"] = torch.zeros(count, width, width, device=self.device)

    def add_expert(self, expert: int, x: torch.Tensor, routing: torch.Tensor) -> None:
        """Add the input `[n, I]` of an expert's down projection and the tokens' routing weights `[n, 1]`."""
        self.sums["expert_tokens"][expert] += len(x)
        # In float32, in which the weighted values are not rounded.
        for piece, weights in zip(x.split(PIECE), routing.split(PIECE), strict=True):
            weighted = piece.float() * weights.float()
            self.sums["mlp_energy"][expert] += self._energy(weighted)
            if self.full_mlp:
                self._add_to_gram(self.sums["mlp_gram"][expert], weighted)

    @property
    def _on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def _energy(self, piece: torch.Tensor) -> torch.Tensor:
        """Return `Σ x²` over tokens of `[n, m]`, a few at a time: squares of a GPU's batch would take much memory."""
        total = torch.zeros(piece.shape[1], device=self.device)
        for rows in piece.split(max(1, SMALL // piece.shape[1]) if self._on_cpu else PIECE):
            total += rows.float().square().sum(0)
        return total

    def _pieces(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the tokens of a batch `[n, m]` as factors of the products.

        On the CPU: a few at a time, in float32, since products of half precision would be rounded to it, and in a
        reused buffer, since touching fresh memory takes longer than the cast and cached data is read faster. A GPU
        multiplies half precision directly and accumulates in float32.
        """
        if not self._on_cpu:
            yield flat
            return
        for part in flat.split(PIECE):
            piece = part
            if part.dtype != torch.float32:
                if self._wide.numel() < part.numel():
                    self._wide = torch.empty(part.numel())
                piece = self._wide[: part.numel()].view(part.shape).copy_(part)
            yield piece

    def _weighted_pieces(
        self, flat: torch.Tensor, weights: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the pieces of a batch, and beside each its tokens times the roots of their weights, in float32."""
        if weights is None:
            yield from ((piece, piece) for piece in self._pieces(flat))
            return
        roots = weights.reshape(-1, 1).float().sqrt()
        length = PIECE if self._on_cpu else 16 * PIECE  # a float32 copy of a GPU's whole batch would take much memory
        for part, root in zip(flat.split(length), roots.split(length), strict=True):
            for piece in self._pieces(part):
                yield piece, piece * root

    def add_attention(
        self,
        seen: Tensors,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None,
        weights: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        """Add attention by distance, and samples: see `attention_mass`.

        `q` `[B, T, H·h]`, `k` and `v` `[B, T, K·h]` are before RoPE; `weights` `[B, T]` go with the samples only.
        """
        heads = seen["q"], seen["k"]
        mass = attention_mass(*heads, rotation, mask, head_dim=self.head_dim, bias=bias, scale=self.scale, cap=self.cap)
        self._add("distance", mass)
        if self.samples is not None:
            self.samples.add(self.first_block, seen["q"], seen["k"], seen["v"], mask, weights)

    def add_residual(self, name: str, x: torch.Tensor) -> None:
        """Add `attention_inverse` or `mlp_inverse` from the stream `[..., d]`; the second also counts tokens.

        A token whose stream is zero adds nothing.
        """
        energy = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).double().square()
        self._add(name, torch.where(energy > 0, 1 / energy, 0.0).sum())
        if name == "mlp_inverse":
            self._add("tokens", torch.tensor(x[..., 0].numel(), dtype=torch.float64, device=self.device))

    def _add(self, name: str, value: torch.Tensor) -> None:
        if name in self.sums:
            self.sums[name].add_(value)
        else:
            self.sums[name] = value.double()

    def _add_gram(self, name: str, flat: torch.Tensor) -> None:
        width = flat.shape[1]
        if name not in self.sums:
            self.sums[name] = torch.zeros(width, width, device=self.device)
        self._add_to_gram(self.sums[name], flat)

    def _add_to_gram(self, gram: torch.Tensor, flat: torch.Tensor) -> None:
        """Add `Σ x xᵀ` to the upper triangle of a large Gram matrix, a few rows of it at a time: half the work."""
        width, rows = flat.shape[1], ROWS if self._on_cpu else 8 * ROWS
        for i in range(0, width, rows):
            _add_product(gram[i : i + rows, i:], flat[:, i : i + rows].mT, flat[:, i:])

    def finished(self) -> Tensors:
        """Return the sums as stored, the large ones packed, and empty this object. Without any batch there are none."""
        stored = {}
        for name in list(self.sums):
            value = self.sums.pop(name)
            stored[name] = pack_upper(value) if name in LARGE else value
        if self.samples is not None:
            stored |= self.samples.tensors
        return stored


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Allow bf16 (AMX) matmuls for float32 data that was originally bf16; they lose nothing and accumulate in float32.

    Without such units nothing changes.
    """
    before = torch.get_float32_matmul_precision()
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Compute `total += a b` in float32; `a` and `b` may have half precision on a GPU."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
        return
    try:
        total += torch.mm(a, b, out_dtype=torch.float32)
    except (TypeError, NotImplementedError, RuntimeError):  # an older torch, or a device without such a product
        total.addmm_(a.float(), b.float())


def attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    mask: torch.Tensor | None,
    *,
    head_dim: int,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """Return attention weights by distance `[T]`, summed over blocks, heads and a few evenly spaced queries per block.

    q `[B, T, H·h]`, k `[B, T, K·h]` before RoPE; rotation is the layer's (cos, sin), each `[·, T, r]`, with pairs
    `(p, p + r/2)`, r < h with partial RoPE, None without RoPE; mask `[B or 1, 1, T, T]` is boolean (True attends) or
    additive, None is causal; bias `[H, 1, ≥ T]` is added to scores, its last entry to that of the last key.
    """
    length = q.shape[1]
    rows = torch.linspace(0, length - 1, min(SAMPLED_QUERIES + 1, length))[1:].round().long().to(q.device)
    queries, keys = (heads.float().unflatten(-1, (-1, head_dim)) for heads in (q[:, rows], k))
    if rotation is not None:
        cos, sin = (part.float().to(q.device) for part in rotation)
        queries, keys = (
            _rotate(heads, cos[:, places, None], sin[:, places, None])
            for heads, places in ((queries, rows), (keys, slice(None)))
        )
    grouped = queries.unflatten(2, (keys.shape[2], -1))  # [B, r, K, g, h]
    scores = torch.einsum("brkgc,btkc->bkgrt", grouped, keys).flatten(1, 2)
    scores = capped(scores * (head_dim**-0.5 if scale is None else scale), cap)
    if bias is not None:
        scores = scores + bias[..., -length:].float().to(q.device)
    distance = rows[:, None] - torch.arange(length, device=q.device)
    if mask is None:
        scores = scores.masked_fill(distance < 0, float("-inf"))
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask.to(q.device)[:, :, rows], float("-inf"))
    else:
        scores = scores + mask.to(q.device)[:, :, rows].float()
    weights = scores.softmax(-1).sum((0, 1), dtype=torch.float64)
    mass: torch.Tensor = weights.new_zeros(length)
    return mass.index_add_(0, distance.clamp_min(0).flatten(), weights.flatten())


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    if (turned := cos.shape[-1]) < x.shape[-1]:
        return torch.cat([_rotate(x[..., :turned], cos, sin), x[..., turned:]], -1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def pack_upper(matrix: torch.Tensor) -> torch.Tensor:
    """Return the rows of the upper triangle of `[n, n]`, concatenated: `[n(n+1)/2]`; of each of several matrices."""
    if matrix.ndim == 3:
        return torch.stack([pack_upper(each) for each in matrix])
    n = len(matrix)
    packed = matrix.new_empty(n * (n + 1) // 2)
    start = 0
    for i in range(n):
        packed[start : start + n - i] = matrix[i, i:]
        start += n - i
    return packed


def unpack_upper(packed: torch.Tensor, n: int) -> torch.Tensor:
    """Return the symmetric `[n, n]` matrix of `pack_upper`."""
    matrix = packed.new_zeros(n, n)
    start = 0
    for i in range(n):
        row = packed[start : start + n - i]
        matrix[i, i:] = row
        matrix[i:, i] = row
        start += n - i
    return matrix


def gram_blocks(o_gram: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the diagonal blocks `[H, h, h]` of `[Hh, Hh]`: each head's Gram matrix."""
    size = len(o_gram) // heads
    return torch.stack([o_gram[i : i + size, i : i + size] for i in range(0, len(o_gram), size)])
