"""Stage 2: statistics + source weights → error curves → sizes → projections."""

import math
from dataclasses import asdict
from fractions import Fraction

import torch

from a3cli import costs
from a3cli.errors import A3Error
from a3cli.families import LayerSizes, ModelShape
from a3cli.methods import METHODS, LayerInputs, Method
from a3cli.model import Model, open_calibrated_source
from a3cli.moments import Tensors
from a3cli.settings import SolveSettings
from a3cli.solvers.allocate import Choice, sizes, split_budget
from a3cli.work import (
    Json,
    Work,
    check_hash,
    differences,
    hash_file,
    read_manifest,
    replacing_folder,
    versions,
    write_manifest,
    write_tensors,
)


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
        method = METHODS[settings.method](model, settings)
        layers = range(model.shape.layers)
        for layer in layers:
            method.add_layer(LayerInputs(model, work, layer))
        method.share()
        curves = [method.curves(layer) for layer in layers]
        head_dim, width = choose_sizes(settings, model.shape, curves)

        with replacing_folder(work.solution) as partial:
            hashes = []
            for layer in layers:
                path = partial / work.layer_solution(layer).name
                write_tensors(path, project(method, LayerInputs(model, work, layer), head_dim, width))
                hashes.append(hash_file(path))
            manifest = {
                "request": request,
                **describe_result(model, settings, calibration, head_dim, width),
                "rope_slots": method.rope_slots(head_dim) if head_dim < model.shape.head_dim else None,
                "predicted_loss": predicted_loss(curves, head_dim, width),
                "per_layer": [
                    {**method.describe(layer), **describe_curves(model.shape, curves[layer], calibration, settings)}
                    for layer in layers
                ],
                "layers": hashes,
                "versions": versions(),
            }
            return write_manifest(partial / work.solution_manifest.name, manifest)


def check_settings(settings: SolveSettings) -> None:
    """Raise A3Error naming all settings that contradict one another."""
    problems = []
    if settings.budget is None and settings.attention_budget is None and settings.mlp_budget is None:
        problems.append("no budget: give --budget (or --attention-budget and --mlp-budget)")
    if None not in (settings.budget, settings.attention_budget, settings.mlp_budget):
        problems.append("--budget, --attention-budget and --mlp-budget contradict one another: give two at most")
    attention = {"qk", "ov"} & set(settings.components)
    if len(attention) == 1:
        problems.append(
            f"--components {','.join(settings.components)}: the stock shape has one head size for QK and OV, "
            "so both are cut or neither: name both, or mlp alone"
        )
    if settings.attention_budget and not attention:
        problems.append("--attention-budget needs qk and ov among --components")
    if settings.mlp_budget and "mlp" not in settings.components:
        problems.append("--mlp-budget needs mlp among --components")
    if settings.head_multiple % 2 and attention:
        problems.append(f"--head-multiple {settings.head_multiple}: RoPE turns pairs of dims, so it must be even")
    if problems:
        raise A3Error("bad settings: " + "; ".join(problems))


def read_calibration(work: Work) -> Json:
    if not work.calibration_manifest.is_file():
        raise A3Error(f"{work.folder} has no finished calibration; run a3 calibrate first (--work names the folder)")
    return read_manifest(work.calibration_manifest, "run a3 calibrate --overwrite")


def finished_manifest(work: Work, request: Json, *, overwrite: bool) -> Json | None:
    """The manifest of a finished solution with this request. Raises A3Error for another unless `overwrite`."""
    if work.solution_manifest.is_file() and not overwrite:
        found = read_manifest(work.solution_manifest, "use --overwrite")
        if found["request"] == request:
            return found
        raise A3Error(
            f"{work.solution} holds a solution with other settings (differs in "
            f"{differences(found['request'], request, 'settings')}); use --overwrite or another --work"
        )
    return None


def check_statistics(work: Work, calibration: Json) -> None:
    """Raise A3Error if a statistics file is not what the calibration wrote."""
    for layer, expected in enumerate(calibration["layers"]):
        check_hash(work.statistics(layer), expected, "run a3 calibrate --overwrite")


def project(method: Method, inputs: LayerInputs, head_dim: int, width: int) -> Tensors:
    """What an export applies to one layer; a component that keeps its size has no entry."""
    tensors: Tensors = {}
    if head_dim < inputs.shape.head_dim:
        tensors |= method.project_attention(inputs, head_dim)
    if width < inputs.shape.intermediate_size:
        tensors |= method.project_mlp(inputs, width)
    return tensors or {"unchanged": torch.zeros(0)}


def choose_sizes(settings: SolveSettings, shape: ModelShape, curves: list[Tensors]) -> tuple[int, int]:
    """Head size and MLP width for the budget. Raises A3Error if the rounding or the components don't allow it."""
    attention_total, mlp_total = costs.attention_weights(shape, shape.sizes), costs.mlp_weights(shape, shape.sizes)
    total = {name: torch.stack([curve[name] for curve in curves]).sum(0) for name in curves[0]}
    attention = [
        Choice(
            r,
            attention_total * (shape.head_dim - r) // shape.head_dim,
            (total["qk"][r // 2] + total["ov"][r]).item(),
        )
        for r in (sizes(shape.head_dim, settings.head_multiple) if "qk" in settings.components else [shape.head_dim])
    ]
    full = shape.intermediate_size
    mlp = [
        Choice(m, mlp_total * (full - m) // full, total["mlp"][m].item())
        for m in (sizes(full, settings.mlp_multiple) if "mlp" in settings.components else [full])
    ]
    needed = weights_to_remove(settings.budget or 0.0, attention_total + mlp_total)
    if settings.attention_budget is not None:
        attention = [least(attention, settings.attention_budget, attention_total, "attention", settings)]
    if settings.mlp_budget is not None:
        mlp = [least(mlp, settings.mlp_budget, mlp_total, "MLP", settings)]
    try:
        a, m = split_budget(attention, mlp, needed)
    except ValueError:
        most = max(c.removed for c in attention) + max(c.removed for c in mlp)
        raise A3Error(
            f"budget {settings.budget} cannot be reached: {','.join(settings.components)} with head multiple "
            f"{settings.head_multiple} and MLP multiple {settings.mlp_multiple} remove at most "
            f"{most / (attention_total + mlp_total):.4f}; lower the budget or the multiples"
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


def describe_result(model: Model, settings: SolveSettings, calibration: Json, head_dim: int, width: int) -> Json:
    """Budget asked and reached, sizes, and what the compressed model costs."""
    shape, before = model.shape, model.shape.sizes
    after = [LayerSizes(head_dim, head_dim, width)] * shape.layers
    removed, total = costs.removed_parameters(shape, after), costs.linear_weights(shape, before)
    item, seq_len = model.source.dtype.itemsize, calibration["blocks"][1]
    return {
        "shape": "stock",
        "sizes": [asdict(size) for size in after],
        "budget_asked": settings.budget,
        "budget_reached": (total - costs.linear_weights(shape, after)) / total,
        "head_dim": {"before": shape.head_dim, "after": head_dim},
        "intermediate_size": {"before": shape.intermediate_size, "after": width},
        "parameters": {"before": model.source.parameters(), "after": model.source.parameters() - removed},
        "bytes": {"before": model.source.bytes(), "after": model.source.bytes() - removed * item},
        "kv_bytes_per_token": {
            "before": costs.kv_bytes_per_token(shape, before, item),
            "after": costs.kv_bytes_per_token(shape, after, item),
        },
        "prefill_flops_per_token": {
            "seq_len": seq_len,
            "before": costs.prefill_flops_per_token(shape, before, seq_len),
            "after": costs.prefill_flops_per_token(shape, after, seq_len),
        },
    }


def predicted_loss(curves: list[Tensors], head_dim: int, width: int) -> Json:
    at = {"qk": head_dim // 2, "ov": head_dim, "mlp": width}
    return {name: sum(curve[name][size].item() for curve in curves) for name, size in at.items()}


def describe_curves(shape: ModelShape, curves: Tensors, calibration: Json, settings: SolveSettings) -> Json:
    """One layer's error curves, and how many tokens they rest on."""
    head_dim, width, tokens = shape.head_dim, shape.intermediate_size, calibration["tokens"]
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
        "tokens_per_dimension": {"head": tokens / head_dim, "mlp": tokens / width},
    }


def significant(curve: torch.Tensor, at: list[int]) -> list[float]:
    """Six significant digits of a curve at some sizes: enough to choose by, and a readable manifest."""
    return [float(f"{value:.6g}") for value in curve[at].tolist()]
