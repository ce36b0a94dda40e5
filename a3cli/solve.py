"""Stage 2: statistics + source weights → error curves → sizes → projections."""

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from a3cli import costs
from a3cli.errors import A3Error
from a3cli.families import ModelShape
from a3cli.model import Model, open_calibrated_source
from a3cli.moments import Tensors, gram_blocks, unpack_upper
from a3cli.settings import SolveSettings
from a3cli.solvers.allocate import Choice, sizes, split_budget
from a3cli.solvers.linalg import JointDecomposition, effective_rank, tail_sums
from a3cli.solvers.mlp import keep_channels, score_channels
from a3cli.solvers.ov import output_gram_of, solve_ov
from a3cli.solvers.qk import keep_pairs, score_pairs
from a3cli.work import Json, Work, check_hash, hash_file, read_manifest, replacing, versions, write_manifest


@dataclass(frozen=True)
class LayerSolution:
    """One layer at every size at once: scores and decompositions, before sizes are chosen.

    `pair_scores` `[K, h/2]` in squared logits, `qk_unit` `[K]` turns them into the residual stream's relative
    squared error, `ov_unit` and `mlp_unit` do so for the OV and MLP losses (squared residual-stream error).
    """

    pair_scores: torch.Tensor
    ov: JointDecomposition
    channel_scores: torch.Tensor
    qk_unit: torch.Tensor
    ov_unit: float
    mlp_unit: float
    key_rank: torch.Tensor
    channel_rank: float


def solve(settings: SolveSettings, work: Work, *, overwrite: bool) -> Json:
    """Choose sizes for a budget and write each layer's projections; returns the manifest.

    Raises A3Error if the statistics are missing, altered or of another source, or if the budget cannot be
    reached under the rounding.
    """
    check_settings(settings)
    calibration = read_calibration(work)
    with work.locked():
        request = {"settings": settings.model_dump(mode="json"), "calibration": calibration["sha256"]}
        if finished := finished_manifest(work, request, overwrite=overwrite):
            return finished
        model = open_calibrated_source(work, calibration)
        check_statistics(work, calibration)
        layers = [solve_layer(model, work, layer, settings) for layer in range(model.shape.layers)]
        pair_scores = shared_pair_scores(layers)
        curves = [error_curves(layer, pair_scores) for layer in layers]
        head_dim, width = choose_sizes(settings, model.shape, curves)
        pairs = keep_pairs(pair_scores, head_dim // 2)

        work.solution.mkdir(exist_ok=True)
        hashes = []
        for index, layer in enumerate(layers):
            with replacing(work.layer_solution(index)) as partial:
                save_file(projections(layer, model.shape, head_dim, width, pairs), partial)
            hashes.append(hash_file(work.layer_solution(index)))
        manifest = {
            "request": request,
            **describe_result(model, settings, calibration, head_dim, width),
            "pairs": pairs.tolist(),
            "predicted_loss": predicted_loss(curves, head_dim, width),
            "per_layer": [
                describe_layer(layer, curve, calibration["tokens"], settings)
                for layer, curve in zip(layers, curves, strict=True)
            ],
            "layers": hashes,
            "versions": versions(),
        }
        return write_manifest(work.solution_manifest, manifest)


def check_settings(settings: SolveSettings) -> None:
    """Raise A3Error for settings that contradict one another."""
    if settings.budget is None and settings.attention_budget is None and settings.mlp_budget is None:
        raise A3Error("no budget: give --budget (or --attention-budget and --mlp-budget)")
    if None not in (settings.budget, settings.attention_budget, settings.mlp_budget):
        raise A3Error("--budget, --attention-budget and --mlp-budget together contradict one another; give two at most")
    attention = {"qk", "ov"} & set(settings.components)
    if len(attention) == 1:
        raise A3Error(
            f"--components {','.join(settings.components)}: the stock shape has one head size for QK and OV, "
            "so both are cut or neither; name both, or mlp alone"
        )
    if settings.attention_budget and not attention:
        raise A3Error("--attention-budget needs qk and ov among --components")
    if settings.mlp_budget and "mlp" not in settings.components:
        raise A3Error("--mlp-budget needs mlp among --components")
    if settings.head_multiple % 2 and attention:
        raise A3Error(f"--head-multiple {settings.head_multiple}: RoPE turns pairs of dims, so it must be even")


def read_calibration(work: Work) -> Json:
    if not work.calibration_manifest.is_file():
        raise A3Error(f"{work.folder} has no finished calibration; run a3 calibrate first (--work names the folder)")
    return read_manifest(work.calibration_manifest, "run a3 calibrate --overwrite")


def finished_manifest(work: Work, request: Json, *, overwrite: bool) -> Json | None:
    """The manifest of a finished solution with this request. Raises A3Error for another unless `overwrite`."""
    if work.solution_manifest.is_file() and not overwrite:
        found = read_manifest(work.solution_manifest, "use --overwrite")
        if found.get("request") == request:
            return found
        raise A3Error(f"{work.solution} holds a solution with other settings; use --overwrite or another --work")
    work.solution_manifest.unlink(missing_ok=True)
    return None


def check_statistics(work: Work, calibration: Json) -> None:
    """Raise A3Error if a statistics file is not what the calibration wrote."""
    for layer, expected in enumerate(calibration["layers"]):
        check_hash(work.statistics(layer), expected, "run a3 calibrate --overwrite")


def read_means(path: Path, names: tuple[str, ...]) -> Tensors:
    """The named sums of a statistics file over its token count; packed triangles stay packed."""
    with safe_open(path, framework="pt") as file:
        tokens = file.get_tensor("tokens")
        return {name: file.get_tensor(name) / tokens.to(file.get_tensor(name).dtype) for name in names}


def solve_layer(model: Model, work: Work, layer: int, settings: SolveSettings) -> LayerSolution:
    """All error curves of one layer. Raises A3Error for statistics that cannot be factorised."""
    shape, floor = model.shape, settings.eigenvalue_floor
    names = ("q_gram", "k_gram", "v_gram", "o_gram", "mlp_energy", "attention_residual", "mlp_residual")
    means = read_means(work.statistics(layer), names)
    for name, value in means.items():
        if not torch.isfinite(value).all():
            raise A3Error(f"layer {layer}: statistics {name} have NaN or Inf values; run a3 calibrate --overwrite")
    output_gram = output_gram_of(output_rows(model, layer))
    head_outputs = gram_blocks(unpack_upper(means["o_gram"], shape.heads * shape.head_dim), shape.heads).double()
    value_gram = head_outputs if shape.group == 1 else means["v_gram"]
    down = model.source.read(model.family.tensor(layer, "down"))
    effect = attention_effect(means["v_gram"], head_outputs, output_gram)
    attention_energy, mlp_energy = means["attention_residual"].item(), means["mlp_residual"].item()
    channel_scores = score_channels(means["mlp_energy"], down)
    return LayerSolution(
        pair_scores=score_pairs(means["q_gram"], means["k_gram"]),
        ov=solve_ov(value_gram, output_gram, floor=floor),
        channel_scores=channel_scores,
        qk_unit=effect / (shape.head_dim * attention_energy),
        ov_unit=1 / attention_energy,
        mlp_unit=1 / mlp_energy,
        key_rank=effective_rank(torch.linalg.eigvalsh(means["k_gram"])),
        channel_rank=effective_rank(channel_scores).item(),
    )


def output_rows(model: Model, layer: int) -> torch.Tensor:
    """`W_o,i` of each head, `[H, h, d]`: a view of the output projection `[d, H·h]`."""
    weight = model.source.read(model.family.tensor(layer, "o"))
    return weight.view(len(weight), model.shape.heads, model.shape.head_dim).permute(1, 2, 0)


def attention_effect(v_gram: torch.Tensor, head_outputs: torch.Tensor, output_gram: torch.Tensor) -> torch.Tensor:
    """How much a unit of score variance can move the residual stream, per KV head `[K]`.

    To first order a score error δ moves head i's output by `Cov_attention(δ, v)`, so by Cauchy-Schwarz its
    square is at most `Var(δ) · Var_attention(v W_o,i)`, and the variance of the values under the attention
    weights is `tr W_o,iᵀ (E[v vᵀ] − E[o_i o_iᵀ]) W_o,i`. The mean over the group's heads.
    """
    kv_heads = len(v_gram)
    spread = v_gram.double().repeat_interleave(len(head_outputs) // kv_heads, 0) - head_outputs
    effect = (spread * output_gram).sum((-1, -2)).clamp_min(0)
    return effect.view(kv_heads, -1).mean(1)


def shared_pair_scores(layers: list[LayerSolution]) -> torch.Tensor:
    """Total score `[h/2]` of each pair: in the stock shape all heads and layers keep the same pairs."""
    return torch.stack([layer.pair_scores.sum(0) for layer in layers]).sum(0)


def error_curves(layer: LayerSolution, shared_scores: torch.Tensor) -> Tensors:
    """Loss of one layer at every size, in the residual stream's relative squared error.

    `qk` `[h/2 + 1]` by pairs kept, `ov` `[h + 1]` by rank, `mlp` `[I + 1]` by channels kept.
    """
    order = shared_scores.argsort(descending=True, stable=True)
    pairs = (layer.pair_scores * layer.qk_unit[:, None]).sum(0)[order]
    return {
        "qk": tail_sums(pairs),
        "ov": tail_sums(layer.ov.values).sum(0) * layer.ov_unit,
        "mlp": tail_sums(layer.channel_scores.sort(descending=True).values) * layer.mlp_unit,
    }


def choose_sizes(settings: SolveSettings, shape: ModelShape, curves: list[Tensors]) -> tuple[int, int]:
    """Head size and MLP width for the budget. Raises A3Error if the rounding or the components don't allow it."""
    total = {name: torch.stack([curve[name] for curve in curves]).sum(0) for name in curves[0]}
    attention = [
        Choice(
            r,
            costs.attention_weights(shape) * (shape.head_dim - r) // shape.head_dim,
            (total["qk"][r // 2] + total["ov"][r]).item(),
        )
        for r in (sizes(shape.head_dim, settings.head_multiple) if "qk" in settings.components else [shape.head_dim])
    ]
    full = shape.intermediate_size
    mlp = [
        Choice(m, costs.mlp_weights(shape) * (full - m) // full, total["mlp"][m].item())
        for m in (sizes(full, settings.mlp_multiple) if "mlp" in settings.components else [full])
    ]
    needed = weights_to_remove(settings.budget or 0.0, costs.linear_weights(shape))
    if settings.attention_budget is not None:
        attention = [least(attention, settings.attention_budget, costs.attention_weights(shape), "attention", settings)]
    if settings.mlp_budget is not None:
        mlp = [least(mlp, settings.mlp_budget, costs.mlp_weights(shape), "MLP", settings)]
    try:
        a, m = split_budget(attention, mlp, needed)
    except ValueError:
        most = max(c.removed for c in attention) + max(c.removed for c in mlp)
        raise A3Error(
            f"budget {settings.budget} cannot be reached: {','.join(settings.components)} with head multiple "
            f"{settings.head_multiple} and MLP multiple {settings.mlp_multiple} remove at most "
            f"{most / costs.linear_weights(shape):.4f}; lower the budget or the multiples"
        ) from None
    return a.size, m.size


def least(choices: list[Choice], budget: float, weights: int, name: str, settings: SolveSettings) -> Choice:
    """The choice that removes least of those that reach a component's own budget."""
    enough = [choice for choice in choices if choice.removed >= weights_to_remove(budget, weights)]
    if not enough:
        multiple = settings.head_multiple if name == "attention" else settings.mlp_multiple
        most = max(choice.removed for choice in choices) / weights
        raise A3Error(
            f"{name} budget {budget} cannot be reached: multiples of {multiple} remove at most {most:.4f}; "
            "lower the budget or the multiple"
        )
    return min(enough, key=lambda choice: choice.removed)


def weights_to_remove(budget: float, weights: int) -> int:
    """The budget's share of the weights, rounded up; exact for the decimal number that was typed."""
    return math.ceil(Fraction(str(budget)) * weights)


def projections(layer: LayerSolution, shape: ModelShape, head_dim: int, width: int, pairs: torch.Tensor) -> Tensors:
    """What an export applies to one layer; a component that keeps its size has no entry.

    `pairs` `[r/2]` kept RoPE pairs, `value_map` `[K, h, r]` and `output_map` `[K, r, h]` float64,
    `channels` `[m]` kept MLP channels, ascending.
    """
    tensors: Tensors = {}
    if head_dim < shape.head_dim:
        tensors["pairs"] = pairs
        tensors["value_map"] = layer.ov.shared_map[..., :head_dim].contiguous()
        tensors["output_map"] = layer.ov.other_map[..., :head_dim].mT.contiguous()
    if width < shape.intermediate_size:
        tensors["channels"] = keep_channels(layer.channel_scores, width)
    return tensors or {"unchanged": torch.zeros(0)}


def describe_result(model: Model, settings: SolveSettings, calibration: Json, head_dim: int, width: int) -> Json:
    """Budget asked and reached, sizes, and what the compressed model costs."""
    before = model.shape
    after = costs.resized(before, head_dim=head_dim, intermediate_size=width)
    removed = costs.removed_parameters(before, after)
    item, seq_len = model.source.dtype.itemsize, calibration["blocks"][1]
    return {
        "budget_asked": settings.budget,
        "budget_reached": (costs.linear_weights(before) - costs.linear_weights(after)) / costs.linear_weights(before),
        "head_dim": {"before": before.head_dim, "after": head_dim},
        "intermediate_size": {"before": before.intermediate_size, "after": width},
        "parameters": {"before": model.source.parameters(), "after": model.source.parameters() - removed},
        "bytes": {"before": model.source.bytes(), "after": model.source.bytes() - removed * item},
        "kv_bytes_per_token": {
            "before": costs.kv_bytes_per_token(before, item),
            "after": costs.kv_bytes_per_token(after, item),
        },
        "prefill_flops_per_token": {
            "seq_len": seq_len,
            "before": costs.prefill_flops_per_token(before, seq_len),
            "after": costs.prefill_flops_per_token(after, seq_len),
        },
    }


def predicted_loss(curves: list[Tensors], head_dim: int, width: int) -> Json:
    at = {"qk": head_dim // 2, "ov": head_dim, "mlp": width}
    return {name: sum(curve[name][size].item() for curve in curves) for name, size in at.items()}


def describe_layer(layer: LayerSolution, curves: Tensors, tokens: int, settings: SolveSettings) -> Json:
    """Curves, effective ranks and damping of one layer, for the manifest."""
    head_dim, width = layer.ov.values.shape[-1], len(layer.channel_scores)
    kept = {
        "qk": list(range(0, head_dim + 1, 2)),
        "ov": list(range(head_dim + 1)),
        "mlp": [0, *sizes(width, settings.mlp_multiple)],  # every width would be 28673 numbers a layer
    }
    return {
        "curves": {
            name: {"size": at, "loss": significant(curves[name], [i // 2 for i in at] if name == "qk" else at)}
            for name, at in kept.items()
        },
        "effective_rank": {
            "qk": layer.key_rank.tolist(),
            "ov": layer.ov.effective_rank.tolist(),
            "mlp": layer.channel_rank,
        },
        "tokens_per_dimension": {"head": tokens / head_dim, "mlp": tokens / width},
        "floored_eigenvalues": {"ov": layer.ov.floored.tolist()},
    }


def significant(curve: torch.Tensor, at: list[int]) -> list[float]:
    """Six significant digits of a curve at some sizes: enough to choose by, and a readable manifest."""
    return [float(f"{value:.6g}") for value in curve[at].tolist()]
