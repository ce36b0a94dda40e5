"""What a solution's manifest records: sizes, costs, and predicted errors."""

import math
from dataclasses import asdict

import torch

from a3cli.methods import Curves, Slots
from a3cli.methods.normed import maps_at_mean_length
from a3cli.models import costs
from a3cli.models.families import LayerSizes, ModelShape
from a3cli.models.families.base import pair_dims
from a3cli.models.projections import head_maps
from a3cli.settings import COMPONENTS
from a3cli.solvers.moments import Tensors
from a3cli.solvers.rope import frequency_at
from a3cli.solvers.slots import score_error
from a3cli.stages.context import Run
from a3cli.stages.gradients import Factors
from a3cli.work.files import Json
from a3cli.work.manifests import CalibrationManifest


def describe_result(run: Run, sizes: list[LayerSizes]) -> Json:
    """Return the requested and reached budget, sizes, and the costs of the compressed model."""
    settings, shape, source = run.settings, run.model.shape, run.model.source
    before, item, seq_len = shape.sizes, source.dtype.itemsize, run.calibration.blocks[1]
    removed, total = costs.removed_parameters(shape, sizes), costs.linear_weights(shape, before)
    return {
        "shape": settings.shape,
        "full_size": asdict(before[0]),
        "sizes": [asdict(size) for size in sizes],
        **(stock_sizes(shape, sizes[0]) if settings.shape == "stock" else {}),
        "budget_asked": settings.budget,
        "budget_reached": (total - costs.linear_weights(shape, sizes)) / total,
        "parameters": {"before": source.parameters(), "after": source.parameters() - removed},
        "bytes": {"before": source.bytes(), "after": source.bytes() - removed * item},
        "kv_bytes_per_token": {
            "before": costs.kv_bytes_per_token(shape, before, item),
            "after": costs.kv_bytes_per_token(shape, sizes, item),
        },
        "kv_cache": {
            "tokens": run.context,
            "before": costs.kv_cache_bytes(shape, before, item, run.context),
            "after": costs.kv_cache_bytes(shape, sizes, item, run.context),
        },
        "prefill_flops_per_token": {
            "seq_len": seq_len,
            "before": costs.prefill_flops_per_token(shape, before, seq_len),
            "after": costs.prefill_flops_per_token(shape, sizes, seq_len),
        },
    }


def stock_sizes(shape: ModelShape, sizes: LayerSizes) -> Json:
    """Return the common sizes by their names in config.json."""
    return {
        "head_dim": {"before": shape.head_dim, "after": sizes.qk},
        "intermediate_size": {"before": shape.intermediate_size, "after": sizes.mlp},
    }


def score_errors(run: Run, layer: int, slots: Slots, rank: int, solution: Tensors) -> Json:
    """Return the predicted relative error of one layer's attention scores at distances up to the context."""
    shape, pairs, inputs = run.model.shape, run.model.table_of(layer).short, run.inputs(layer)
    distances = [0, *(2**i for i in range(int(math.log2(max(1, run.context - 1))) + 1)), run.context - 1]
    if rank == shape.head_dim:
        return {"distance": distances, "relative": [0.0] * len(distances)}
    kept = frequency_at(pairs, torch.tensor(slots.pairs, dtype=torch.float64))
    dims, columns = pair_dims(len(pairs), shape.turning_pairs), pair_dims(len(kept), int(kept.count_nonzero()))
    queries, keys = (inputs.mean(name)[:, dims][..., dims] for name in ("q_gram", "k_gram"))
    at_mean = maps_at_mean_length(inputs, solution) if "query_norm" in solution else head_maps(solution, shape)
    query_map, key_map = (each[:, dims][..., columns] for each in at_mean)
    grams, maps = (queries, keys), (query_map, key_map)
    return {
        "distance": distances,
        "relative": [float(f"{score_error(grams, maps, pairs, kept, distance):.4g}") for distance in distances],
    }


def describe_slots(run: Run, sizes: list[LayerSizes], slots: list[Slots]) -> list[float] | list[list[float]] | None:
    """Return the pairs of each layer's slots, or of those that all layers share with one RoPE.

    None if heads keep their size, or there is no RoPE.
    """
    if run.model.rope.absent:
        return None
    if run.settings.shape == "stock" and sizes[0].qk == run.model.shape.head_dim:
        return None
    shared = run.settings.shape == "stock" and run.model.local_rope is None
    return slots[0].pairs if shared else [own.pairs for own in slots]


def describe_layers(run: Run, written: list[Json], curves: list[Curves], factors: list[Factors] | None) -> list[Json]:
    """Return what is known of each layer, with its curves; `written` is what the draft records of the layers.

    `factors` convert the energies to the curves' unit.
    """
    units = factors or [dict.fromkeys(COMPONENTS, 1.0)] * len(curves)
    return [
        {
            **each["described"],
            "energy": {c: each["described"]["energy"][c] * unit[c] for c in COMPONENTS},
            "curves": describe_curves(own),
            "score_error": each["score_error"],
            "tokens_per_dimension": tokens_per_dimension(run.model.shape, run.calibration),
        }
        for each, own, unit in zip(written, curves, units, strict=True)
    ]


def mean_by_distance(errors: list[Json]) -> Json:
    """Return the root mean square over the layers."""
    squares = torch.tensor([error["relative"] for error in errors], dtype=torch.float64).square()
    return {"distance": errors[0]["distance"], "relative": [float(f"{v:.4g}") for v in squares.mean(0).sqrt().tolist()]}


def predicted_loss(curves: list[Curves], sizes: list[LayerSizes]) -> Json:
    """Return the predicted loss by component, summed over the layers."""
    pairs = [(curve, asdict(size)) for curve, size in zip(curves, sizes, strict=True)]
    return {c: sum(curve[c][size[c]] for curve, size in pairs) for c in COMPONENTS}


def describe_curves(curves: Curves) -> Json:
    """Return one layer's error curves with six significant digits, for a readable manifest."""
    return {
        component: {"size": list(curve), "loss": [float(f"{loss:.6g}") for loss in curve.values()]}
        for component, curve in curves.items()
    }


def tokens_per_dimension(shape: ModelShape, calibration: CalibrationManifest) -> Json:
    """Return the number of tokens per dimension for a head and for the MLP, of experts on average."""
    tokens = calibration.tokens
    of_mlp = tokens * shape.active_experts / shape.experts if shape.experts else tokens
    return {"head": tokens / shape.head_dim, "mlp": of_mlp / shape.intermediate_size}
