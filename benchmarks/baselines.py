"""Published compression formulas for a stock Llama or Qwen2 model in memory, to compare a3 with. Own implementations.

Each function takes a `Calibration` (a model in float32 and token blocks) and the fraction of the decoder's linear
weights (q, k, v, o, gate, up, down) to remove. It returns a modified copy of the model and the number of parameters
that a checkpoint of it would store instead of those weights. At least the requested fraction is removed; embeddings,
norms and output head are not counted. Statistics are those of the unmodified model, except in SliceGPT, which is
sequential. The copies keep the source's sizes: dropped structures are zeros, two factors are multiplied out, and a
sliced residual stream is a projected one. Logits are those of the smaller model up to float rounding. Biases of
attention are not counted. A dropped dim loses its bias, a map of value dims applies to their biases, and a bias is
not approximated by factors.

svd               W ≈ U_r Σ_r V_rᵀ; two factors, `r (in + out)` parameters per weight.
svd_llm           SVD-LLM (arXiv 2403.07378), truncation-aware whitening without its later updates; counted like svd.
modegpt           MoDeGPT (arXiv 2408.09632): Nyström for the MLP, CR for QK, SVD for VO. All layers and modules lose
                  the same share; its global allocation over layers is omitted, since its temperature must be tuned per
                  model.
slicegpt          SliceGPT (arXiv 2401.15024), sequential PCA; `k` of `d` directions stay. Counted: the remaining
                  weights and two shortcut matrices per layer, `k × k`, the last one `k × d`.
wanda_structured  |W| ‖x‖ (Wanda, arXiv 2306.11695) summed over structures, as Wanda-sp in FLAP (arXiv 2312.11983)
                  does for the output and down projections. Nothing is refit.
magnitude         The same structures by the norm of their weights.

`modegpt_mlp`, `wanda_mlp` and `magnitude_mlp` remove everything from the MLP and leave attention unchanged.

`per_head_svd` makes only the KV cache smaller, in the form of Palu (arXiv 2407.21118, its M-LRD): each head's key and
value projection is of low rank, and the cache holds `r` numbers in place of the `h` of a value, and of a key before
RoPE. Every step computes the keys of all cached tokens from them. Palu's choice of ranks per layer is omitted.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from a3cli.models import costs
from a3cli.models.config import read_shape
from a3cli.models.families import ModelShape

Grams = dict[str, torch.Tensor]
ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")
# Linear layers with the same input share a Gram matrix, named after the first of them.
INPUT_OF = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}
RIDGE = 1e-6


@dataclass(frozen=True)
class Compressed:
    """A model that computes what the smaller one would, and the number of parameters that one would store."""

    model: Any
    stored: int
    dense: int

    @property
    def removed(self) -> float:
        return (self.dense - self.stored) / self.dense


@dataclass(frozen=True)
class Widths:
    """The sizes that a structured method keeps: pairs and value dims per KV head, channels per layer."""

    pairs: int
    values: int
    channels: int


@dataclass(frozen=True)
class Scores:
    """Importance of one layer's structures: `pairs` `[K, h/2]`, `values` `[K, h]`, `channels` `[I]`."""

    pairs: torch.Tensor
    values: torch.Tensor
    channels: torch.Tensor


class Calibration:
    """A source model with token blocks `[N, T]`; its statistics are computed once, at first use."""

    def __init__(self, model: Any, tokens: torch.Tensor, *, batch_size: int = 8) -> None:
        self.model = model
        self.tokens = tokens.to(model.device)
        self.batch_size = batch_size
        self.shape: ModelShape = read_shape(model.config)
        if self.shape.mlp_bias:
            raise ValueError("the baselines know no biases in the MLP")
        if not self.shape.gated:
            raise ValueError("the baselines know no MLP without a gate")

    @property
    def batches(self) -> tuple[torch.Tensor, ...]:
        return self.tokens.split(self.batch_size)

    @cached_property
    @torch.no_grad()
    def grams(self) -> list[Grams]:
        """Return each layer's `E[x xᵀ]` `[in, in]`, float64, of the inputs of q, o, gate and down.

        `affine` is that of q's input with a 1 appended, `[d + 1, d + 1]`, which a bias is multiplied with.
        """
        sums: list[Grams] = [{} for _ in range(self.shape.layers)]
        hooks = [
            linear(layer, role).register_forward_pre_hook(partial(add_gram, sums[index], role))
            for index, layer in enumerate(self.model.model.layers)
            for role in set(INPUT_OF.values())
        ]
        for batch in self.batches:
            self.model.model(batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        for layer in sums:
            layer["q"] = layer["affine"][:-1, :-1]
        return [{role: gram / self.tokens.numel() for role, gram in layer.items()} for layer in sums]


def add_gram(sums: Grams, role: str, _module: Any, args: tuple[torch.Tensor]) -> None:
    x = args[0]
    if role == "q":
        role, x = "affine", torch.cat([x, torch.ones_like(x[..., :1])], -1)
    sums[role] = sums.get(role, 0) + gram_of(x)


def gram_of(x: torch.Tensor) -> torch.Tensor:
    """Return `Σ x xᵀ` over all tokens of `[..., n]`: the float32 product of one batch, as float64."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    return (rows.T @ rows).double()


def linear(layer: Any, role: str) -> Any:
    return getattr(layer.self_attn if role in ATTENTION else layer.mlp, f"{role}_proj")


def weight_of(layer: Any, role: str) -> torch.Tensor:
    """Return a linear weight `[out, in]`, float64."""
    return linear(layer, role).weight.detach().double()


def affine_of(layer: Any, role: str) -> torch.Tensor:
    """Return `[W | b]` `[out, in + 1]`, float64; b is 0 where there is no bias."""
    weight, bias = weight_of(layer, role), linear(layer, role).bias
    column = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
    return torch.cat([weight, column[:, None]], 1)


def set_weight(layer: Any, role: str, value: torch.Tensor) -> None:
    linear(layer, role).weight.data.copy_(value)


def set_affine(layer: Any, role: str, value: torch.Tensor) -> None:
    """Set weight and, if there is one, bias from `[W | b]`."""
    set_weight(layer, role, value[:, :-1])
    if (bias := linear(layer, role).bias) is not None:
        bias.data.copy_(value[:, -1])


def decoder_weights(shape: ModelShape) -> int:
    """Return the number of the decoder's linear weights at full size."""
    return costs.linear_weights(shape, shape.sizes)


def limit_of(shape: ModelShape, target: float) -> int:
    """Return how many parameters may be stored when the fraction `target` is removed."""
    return int((1 - target) * decoder_weights(shape) + 1e-6)


# --- two factors in place of a weight -------------------------------------------------------------------------------


def svd(calibration: Calibration, target: float) -> Compressed:
    return factorise(calibration, target, lambda W, _gram, rank: truncate(W, rank))


def svd_llm(calibration: Calibration, target: float) -> Compressed:
    return factorise(calibration, target, truncate_whitened)


def truncate(W: torch.Tensor, rank: int) -> torch.Tensor:
    """Return `U_r Σ_r V_rᵀ`, the best rank-r approximation in the Frobenius norm."""
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vh[:rank]


def truncate_whitened(W: torch.Tensor, gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Return `U_r Σ_r (V_rᵀ S⁻¹)`, `W S = U Σ Vᵀ`, `S Sᵀ = E[x xᵀ]`: the rank-r W' with the least `E‖W x − W' x‖²`.

    The loss is the sum of the dropped squared singular values. W `[out, in]`, gram `[in, in]`.
    """
    S = cholesky(gram)
    return torch.linalg.solve_triangular(S, truncate(W @ S, rank), upper=False, left=False)


def cholesky(gram: torch.Tensor) -> torch.Tensor:
    """Return the lower factor. If rounding makes the matrix singular, add the least ridge (in decades) that helps."""
    scale = gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for damping in (0.0, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4):
        factor, failed = torch.linalg.cholesky_ex(gram + damping * scale)
        if not failed:
            return factor
    raise ValueError("a Gram matrix is not positive definite")


@torch.no_grad()
def factorise(
    calibration: Calibration, target: float, approximate: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
) -> Compressed:
    """Approximate every linear weight at the rank that its share of the budget allows."""
    dense = decoder_weights(calibration.shape)
    model = copy.deepcopy(calibration.model)
    if target == 0:
        return Compressed(model, dense, dense)
    ranks, stored = factor_ranks(calibration.shape, target)
    for layer, grams in zip(model.model.layers, calibration.grams, strict=True):
        for role, rank in ranks.items():
            set_weight(layer, role, approximate(weight_of(layer, role), grams[INPUT_OF[role]], rank))
    return Compressed(model, stored, dense)


def factor_ranks(shape: ModelShape, target: float) -> tuple[dict[str, int], int]:
    """Return the rank of each role, `(1 − target) · out · in / (out + in)` as published, and all factors' parameters.

    Ranks are rounded down; while the budget allows, those that lost most in rounding get one more.
    """
    exact = {role: (1 - target) * rows * cols / (rows + cols) for role, (rows, cols) in shape.linear_shapes().items()}
    price = {role: shape.layers * sum(sizes) for role, sizes in shape.linear_shapes().items()}
    ranks = {role: int(rank) for role, rank in exact.items()}
    stored = sum(ranks[role] * price[role] for role in ranks)
    for role in sorted(ranks, key=lambda role: ranks[role] - exact[role]):
        if stored + price[role] <= limit_of(shape, target):
            ranks[role] += 1
            stored += price[role]
    return ranks, stored


@torch.no_grad()
def per_head_svd(calibration: Calibration, rank: int, *, whitened: bool) -> Any:
    """Return the model with keys and values of this rank in each head; `whitened` by the input's second moments."""
    model, h = copy.deepcopy(calibration.model), calibration.shape.head_dim
    for layer, grams in zip(model.model.layers, calibration.grams, strict=True):
        for role in ("k", "v"):
            heads = weight_of(layer, role).split(h)
            gram = grams[INPUT_OF[role]]
            smaller = [truncate_whitened(W, gram, rank) if whitened else truncate(W, rank) for W in heads]
            set_weight(layer, role, torch.cat(smaller))
    return model


# --- smaller heads and MLPs -----------------------------------------------------------------------------------------


def wanda_structured(calibration: Calibration, target: float, *, attention: bool = True) -> Compressed:
    return prune(calibration, target, wanda_scores, attention=attention)


def magnitude(calibration: Calibration, target: float, *, attention: bool = True) -> Compressed:
    return prune(calibration, target, lambda layer, _grams, shape: magnitude_scores(layer, shape), attention=attention)


def wanda_scores(layer: Any, grams: Grams, shape: ModelShape) -> Scores:
    """Return sums of `|W_ij| ‖x_j‖` over the columns of down and o that a channel or value dim feeds, as in Wanda-sp.

    RoPE pairs feed no weight; their score is summed over the rows of q and k that compute them.
    """
    weighted = {
        role: weight_of(layer, role).abs() * grams[INPUT_OF[role]].diagonal().sqrt() for role in ("q", "k", "o", "down")
    }
    pairs = pair_sums(weighted["q"].sum(1), shape) + pair_sums(weighted["k"].sum(1), shape)
    return Scores(pairs, value_sums(weighted["o"].sum(0), shape), weighted["down"].sum(0))


def magnitude_scores(layer: Any, shape: ModelShape) -> Scores:
    """Return the squared norm of all the weights that belong to a structure."""
    squares = {role: weight_of(layer, role).square() for role in (*ATTENTION, *MLP)}
    return Scores(
        pair_sums(squares["q"].sum(1), shape) + pair_sums(squares["k"].sum(1), shape),
        value_sums(squares["o"].sum(0), shape) + value_sums(squares["v"].sum(1), shape),
        squares["gate"].sum(1) + squares["up"].sum(1) + squares["down"].sum(0),
    )


def pair_sums(per_dim: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """Sum `[heads · h]` over the heads of a KV group and the two dims `(p, p + h/2)` of a pair; return `[K, h/2]`."""
    return per_dim.view(shape.kv_heads, -1, 2, shape.head_dim // 2).sum((1, 2))


def value_sums(per_dim: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """Sum `[heads · h]` over the heads of a KV group; return `[K, h]`."""
    return per_dim.view(shape.kv_heads, -1, shape.head_dim).sum(1)


@torch.no_grad()
def prune(
    calibration: Calibration,
    target: float,
    score: Callable[[Any, Grams, ModelShape], Scores],
    *,
    attention: bool,
) -> Compressed:
    """Remove the structures with the lowest scores, the same number in each layer and KV head."""
    shape, dense = calibration.shape, decoder_weights(calibration.shape)
    widths = widths_for(shape, target, attention=attention)
    model = copy.deepcopy(calibration.model)
    for layer, grams in zip(model.model.layers, calibration.grams, strict=True):
        scores = score(layer, grams, shape)
        keep_pairs(layer, mask_top(scores.pairs, widths.pairs))
        keep_values(layer, mask_top(scores.values, widths.values))
        keep_channels(layer, mask_top(scores.channels, widths.channels))
    return Compressed(model, structured_weights(shape, widths), dense)


def structured_weights(shape: ModelShape, widths: Widths) -> int:
    heads = shape.heads + shape.kv_heads
    return shape.layers * shape.hidden_size * (heads * (2 * widths.pairs + widths.values) + 3 * widths.channels)


def widths_for(shape: ModelShape, target: float, *, attention: bool) -> Widths:
    """Round pairs and value dims to nearest; return them and the most channels that still reach the budget.

    Without `attention`, everything is removed from the MLP. Raises ValueError if it is too small for that.
    """
    keep = 1 - target if attention else 1.0
    pairs, values = (max(1, round(keep * size)) for size in (shape.head_dim // 2, shape.head_dim))
    rest = limit_of(shape, target) - structured_weights(shape, Widths(pairs, values, 0))
    channels = min(shape.intermediate_size, rest // (3 * shape.layers * shape.hidden_size))
    if channels < 1:
        raise ValueError(f"the MLP alone cannot give {target:.0%} of the weights")
    return Widths(pairs, values, channels)


def mask_top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask of the `count` largest entries of the last dimension."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count).indices, True)


def keep_pairs(layer: Any, mask: torch.Tensor) -> None:
    """Zero the q and k rows of all pairs outside `mask` `[K, h/2]`."""
    dims = mask.repeat(1, 2)
    for role in ("q", "k"):
        keep_rows(layer, role, dims)


def keep_values(layer: Any, mask: torch.Tensor) -> None:
    """Zero the v rows and o columns of all value dims outside `mask` `[K, h]`."""
    keep_rows(layer, "v", mask)
    o = linear(layer, "o").weight.data
    o *= spread(mask, o.shape[1])


def keep_rows(layer: Any, role: str, mask: torch.Tensor) -> None:
    """Zero the rows of a weight and the entries of its bias outside `mask` `[K, h]`."""
    affine = affine_of(layer, role)
    set_affine(layer, role, affine * spread(mask, len(affine))[:, None])


def keep_channels(layer: Any, mask: torch.Tensor) -> None:
    """Zero the gate and up rows and the down columns of all channels outside `mask` `[I]`."""
    for role in ("gate", "up"):
        linear(layer, role).weight.data.mul_(mask[:, None])
    linear(layer, "down").weight.data.mul_(mask)


def spread(mask: torch.Tensor, size: int) -> torch.Tensor:
    """Repeat `[K, h]` for each head of a group; return `[size]`."""
    return mask.repeat_interleave(size // mask.numel(), 0).flatten()


# --- MoDeGPT --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def modegpt(calibration: Calibration, target: float, *, attention: bool = True) -> Compressed:
    """Apply Nyström to the MLP, CR to QK and SVD to VO, all with the unmodified model's statistics."""
    shape, dense = calibration.shape, decoder_weights(calibration.shape)
    widths = widths_for(shape, target, attention=attention)
    model = copy.deepcopy(calibration.model)
    for layer, grams in zip(model.model.layers, calibration.grams, strict=True):
        keep_pairs(layer, mask_top(cr_scores(layer, grams, shape), widths.pairs))
        if widths.values < shape.head_dim:
            decompose_values(layer, grams["affine"], shape, widths.values)
        if widths.channels < shape.intermediate_size:
            nystroem(layer, grams["down"], widths.channels)
    return Compressed(model, structured_weights(shape, widths), dense)


def nystroem(layer: Any, gram: torch.Tensor, width: int) -> None:
    """Keep the channels of largest ridge leverage; the down projection becomes `C_SS⁻¹ C_S: W_down` (least squares)."""
    mask = mask_top(ridge_leverage(gram), width)
    kept = mask.nonzero().flatten()
    damping = RIDGE * gram.diagonal().mean() * torch.eye(width, dtype=gram.dtype, device=gram.device)
    refit = torch.linalg.solve(gram[kept][:, kept] + damping, gram[kept] @ weight_of(layer, "down").T)
    keep_channels(layer, mask)
    linear(layer, "down").weight.data[:, kept] = refit.T.to(linear(layer, "down").weight.dtype)


def ridge_leverage(gram: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Return `[C (C + λI)⁻¹]_ii` `[I]`, `λ` = `strength` times the mean of the diagonal.

    Of 1e-4, 1e-2, 0.1, 1 and 10, strengths 1 and 10 were best on wikitext-llama, by a quarter of the increase.
    """
    ridge = strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge, gram).diagonal()


def cr_scores(layer: Any, grams: Grams, shape: ModelShape) -> torch.Tensor:
    """Return `‖C_q^½ e_p‖ ‖C_k^½ e_p‖` `[K, h/2]`, over both dims of a pair and, for queries, the heads of a group.

    A column of `C^½` has the squared norm `C_pp`. RoPE rotates a pair without changing its energy, so the
    moments before RoPE suffice.
    """
    energies = [
        pair_sums(((weight := affine_of(layer, role)) @ grams["affine"] * weight).sum(1), shape) for role in ("q", "k")
    ]
    return (energies[0] * energies[1]).sqrt()


def decompose_values(layer: Any, gram: torch.Tensor, shape: ModelShape, rank: int) -> None:
    """Apply SVD to VO per KV head, a group's heads side by side: the least rank-r `‖C^½ (W_v W_o − W̃_v W̃_o)‖`.

    `C^½ W_v = U Σ Vᵀ`, `Σ Vᵀ W_o = U' Σ' V'ᵀ`; `W̃_v = C^-½ U U'_r = W_v V Σ⁻¹ U'_r`, `W̃_o = U'_rᵀ Σ Vᵀ W_o`.
    `V` and `Σ²` are the eigenvectors and eigenvalues of `W_vᵀ C W_v`.
    """
    h, group = shape.head_dim, shape.group
    v, o = affine_of(layer, "v"), linear(layer, "o").weight.data
    for head in range(shape.kv_heads):
        rows, columns = slice(head * h, (head + 1) * h), slice(head * group * h, (head + 1) * group * h)
        W_v, W_o = v[rows].T, torch.cat(list(o[:, columns].double().T.split(h)), 1)
        values, V = torch.linalg.eigh(W_v.T @ gram @ W_v)
        sigma = values.clamp_min(1e-12 * values[-1]).sqrt()
        U = torch.linalg.svd(sigma[:, None] * (V.T @ W_o), full_matrices=False)[0][:, :rank]
        new_v, new_o = (V / sigma) @ U, U.T @ (sigma[:, None] * V.T) @ W_o
        v[rows] = padded((W_v @ new_v).T, h)
        o[:, columns] = torch.cat([padded(part, h) for part in new_o.split(shape.hidden_size, 1)]).T.to(o.dtype)
    set_affine(layer, "v", v)


def padded(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """Append zero rows, for `rows` rows in total."""
    return torch.nn.functional.pad(matrix, (0, 0, 0, rows - len(matrix)))


# --- SliceGPT -------------------------------------------------------------------------------------------------------


def slicegpt(calibration: Calibration, target: float) -> Compressed:
    """Keep the most directions with which the remaining weights and the shortcuts reach the budget.

    If nothing is to be removed, nothing is sliced: shortcuts of full size would fold into the weights.
    """
    dense = decoder_weights(calibration.shape)
    d = calibration.shape.hidden_size
    if target == 0:
        return Compressed(slice_to(calibration, d), dense, dense)
    limit = limit_of(calibration.shape, target)
    kept = max(k for k in range(1, d) if sliced_weights(calibration.shape, k) <= limit)
    return Compressed(slice_to(calibration, kept), sliced_weights(calibration.shape, kept), dense)


def sliced_weights(shape: ModelShape, kept: int) -> int:
    """Count the remaining weights: each linear weight has one side on the residual stream, which is sliced.

    The last down projection keeps its full output, for the head. Shortcuts are `k × k` around attention and MLP of each
    layer, the last one `k × d`.
    """
    d, last = shape.hidden_size, shape.intermediate_size + kept
    return decoder_weights(shape) // d * kept + 2 * shape.layers * kept**2 + last * (d - kept)


@torch.no_grad()
def slice_to(calibration: Calibration, kept: int) -> Any:
    """Project the residual stream onto its `kept` principal directions before every norm but the last.

    This happens in the basis of the source: rotated and sliced weights see only `P x` of the stream `x`, and a shortcut
    maps one norm's subspace to the next one's. So the stream becomes `P x` before each norm, with `P` from the
    second moments of that norm's output in the model sliced so far.
    """
    model = copy.deepcopy(calibration.model)
    fuse_norms(model)
    calls = capture_calls(model, calibration.batches)
    eps = model.config.rms_norm_eps
    embedded = [model.model.embed_tokens(batch) for batch in calibration.batches]
    projection = principal_projection(gram_of_normed(embedded, eps), kept)
    embedding = model.model.embed_tokens.weight.data
    embedding.copy_(embedding.double() @ projection)
    streams = [project(x, projection) for x in embedded]
    for index, layer in enumerate(model.model.layers):
        middle = [after_attention(layer, x, call) for x, call in zip(streams, calls, strict=True)]
        projection = principal_projection(gram_of_normed(middle, eps), kept)
        project_after_attention(layer, projection)
        if index + 1 < len(model.model.layers):
            streams = [after_mlp(layer, project(x, projection)) for x in middle]
            projection = principal_projection(gram_of_normed(streams, eps), kept)
            streams = [project(x, projection) for x in streams]
            project_output(layer, projection)
    return model


def fuse_norms(model: Any) -> None:
    """Move norm weights into the linear layers that follow, so that norms commute with rotations; untie the head."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    for layer in model.model.layers:
        fuse(layer.input_layernorm, [linear(layer, role) for role in ("q", "k", "v")])
        fuse(layer.post_attention_layernorm, [linear(layer, role) for role in ("gate", "up")])
    fuse(model.model.norm, [model.lm_head])


def fuse(norm: Any, linears: list[Any]) -> None:
    for each in linears:
        each.weight.data.mul_(norm.weight.data)
    norm.weight.data.fill_(1)


def gram_of_normed(streams: list[torch.Tensor], eps: float) -> torch.Tensor:
    """Return `Σ y yᵀ`, where `y` is the output of an RMSNorm without weight."""
    return torch.stack([gram_of(x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()) for x in streams]).sum(0)


def principal_projection(gram: torch.Tensor, kept: int) -> torch.Tensor:
    """Return `Q_k Q_kᵀ` `[d, d]`, with `Q_k` the eigenvectors of the `kept` largest eigenvalues."""
    Q = torch.linalg.eigh(gram).eigenvectors[:, len(gram) - kept :]
    return Q @ Q.T


def project(x: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    return x @ projection.to(x.dtype)


def capture_calls(model: Any, batches: tuple[torch.Tensor, ...]) -> list[dict[str, Any]]:
    """Return the arguments of a decoder layer beside the hidden states, for each batch."""
    calls: list[dict[str, Any]] = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    by_size = {len(batch): batch for batch in batches}
    for batch in by_size.values():
        model.model(batch, use_cache=False)
    hook.remove()
    of_size = dict(zip(by_size, calls, strict=True))
    return [of_size[len(batch)] for batch in batches]


def after_attention(layer: Any, x: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
    return x + layer.self_attn(hidden_states=layer.input_layernorm(x), **call)[0]


def after_mlp(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return x + layer.mlp(layer.post_attention_layernorm(x))


def project_after_attention(layer: Any, projection: torch.Tensor) -> None:
    """Make the stream `P (x + a)`, by replacing attention's output `a` by `P (x + a) − x`."""
    before: list[torch.Tensor] = []

    def replace(_module: Any, _args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        x = before.pop()
        return (project(x + output[0], projection) - x, *output[1:])

    layer.input_layernorm.register_forward_pre_hook(lambda module, args: before.append(args[0]))
    layer.self_attn.register_forward_hook(replace)


def project_output(layer: Any, projection: torch.Tensor) -> None:
    layer.register_forward_hook(lambda module, args, output: project(output, projection))


BASELINES: dict[str, Callable[[Calibration, float], Compressed]] = {
    "svd": svd,
    "svd_llm": svd_llm,
    "slicegpt": slicegpt,
    "magnitude": magnitude,
    "wanda_structured": wanda_structured,
    "modegpt": modegpt,
    "magnitude_mlp": partial(magnitude, attention=False),
    "wanda_mlp": partial(wanda_structured, attention=False),
    "modegpt_mlp": partial(modegpt, attention=False),
}
