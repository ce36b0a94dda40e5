"""Stage 2, solve: compute error curves from statistics and weights, choose sizes, and write projections."""

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from typing import Any, TypeVar

import torch

from a3cli.errors import A3Error
from a3cli.methods import METHODS, Curves, LayerInputs, Method
from a3cli.models import costs
from a3cli.models.families import LayerSizes, ModelShape
from a3cli.models.families.base import pair_dims
from a3cli.models.model import Model, open_calibrated_source
from a3cli.models.projections import head_maps
from a3cli.settings import COMPONENTS, Component, SolveSettings
from a3cli.solvers.allocate import Choice, allocate
from a3cli.solvers.moments import Tensors
from a3cli.solvers.rope import frequency_at
from a3cli.solvers.slots import score_error
from a3cli.stages.probe import probe, weigh
from a3cli.stream.decoder import Decoder
from a3cli.stream.sequential import refit_sequentially
from a3cli.stream.smaller import Cut, SmallerDecoder
from a3cli.stream.sweep import Progress
from a3cli.work.draft import Draft, drafting
from a3cli.work.files import (
    Json,
    bytes_on_disk,
    check_hashes,
    check_space,
    hash_file,
    read_tensors,
    write_tensors,
    writing,
)
from a3cli.work.folder import Work, layer_file
from a3cli.work.interrupt import Stop
from a3cli.work.machine import choose_machine, explaining_memory, load_linear_algebra, return_freed_memory
from a3cli.work.manifests import CalibrationManifest, SolutionManifest
from a3cli.work.processes import spread
from a3cli.work.sealed import differences, versions

log = logging.getLogger(__name__)

T = TypeVar("T")

AGAIN = "rerun the same command to resume"
REMOVE = "remove it and rerun the same command, which computes it again"
STREAMS = "streams"  # folder of the sequential correction's hidden states, in the draft


def solve(
    settings: SolveSettings, work: Work, *, overwrite: bool, progress: Progress, stop: Stop | None = None
) -> SolutionManifest:
    """Choose sizes for a budget and write each layer's projections; return the manifest.

    Raises A3Error if the statistics are missing, altered or of another source, or if the budget cannot be
    reached under the rounding, and Interrupted at the end of the layer in which `stop` was set off.
    """
    stop = stop or Stop()
    return_freed_memory()
    check_settings(settings)
    calibration = read_calibration(work)
    with work.locked():
        if finished := finished_manifest(work, describe_request(settings, calibration), overwrite=overwrite):
            return finished
        model = open_calibrated_source(work, calibration)
        check_statistics(work, calibration)
        method, curves = analyse(settings, model, work, calibration, progress, stop)
        return write_solution(settings, work, calibration, method, curves, progress, stop)


def describe_request(settings: SolveSettings, calibration: CalibrationManifest) -> Json:
    """Return everything that a solution depends on."""
    chosen = settings.model_dump(mode="json", exclude={"num_processes"})  # does not change the bytes
    return {"settings": chosen, "calibration": calibration.sha256}


def write_solution(
    settings: SolveSettings,
    work: Work,
    calibration: CalibrationManifest,
    method: Method,
    curves: list[Curves],
    progress: Progress,
    stop: Stop,
) -> SolutionManifest:
    """Choose sizes from a finished analysis and write each layer's projections; return the manifest."""
    model = method.model
    layers = range(model.shape.layers)
    sizes = choose_sizes(settings, model.shape, curves)
    method.finalize_slots(sizes)
    slots = [method.slots_or_pairs(layer, size.qk) for layer, size in enumerate(sizes)]
    request = describe_request(settings, calibration)
    chosen = describe_choice(settings, model, sizes, slots)
    with drafting(work.solution, {**request, **chosen}) as draft, explaining_memory():
        draft.check_space(bytes_needed(model.shape, sizes, settings), "the solution")

        def write_layer(layer: int) -> Json:
            name = one_shot_file(layer) if settings.sequential else layer_file(layer)
            if known := draft.finished_info(name):
                return known
            stop.before(f"projecting layer {layer + 1} of {len(layers)}", AGAIN)
            inputs = LayerInputs(model, work, layer)
            solution = method.project(inputs, sizes[layer])
            write_tensors(draft.folder / name, solution)
            errors = score_errors(method, inputs, solution, sizes[layer].qk)
            return draft.finish(name, described=method.describe(layer), score_error=errors)

        written = for_each_layer(write_layer, model, settings)
        if settings.sequential:
            hashes = correct(model, settings, work, sizes, slots, draft, progress, stop)
        else:
            hashes = [each["hash"] for each in written]
        manifest = {
            "request": request,
            **describe_result(model, settings, calibration, sizes),
            "rope_slots": slots if method.per_layer else slots[0] if sizes[0].qk < model.shape.head_dim else None,
            "context": settings.context or model.rope.context,
            "predicted_loss": predicted_loss(curves, sizes),
            "predicted_score_error": mean_by_distance([each["score_error"] for each in written]),
            "per_layer": [
                {
                    **each["described"],
                    "curves": describe_curves(curves[layer]),
                    "score_error": each["score_error"],
                    "tokens_per_dimension": tokens_per_dimension(model.shape, calibration),
                }
                for layer, each in enumerate(written)
            ],
            "layers": hashes,
            "versions": versions(),
        }
        sealed = SolutionManifest.write(draft.folder / work.solution_manifest.name, manifest)
        if settings.sequential:
            drop_steps(draft, layers)
        return sealed


def describe_choice(settings: SolveSettings, model: Model, sizes: list[LayerSizes], slots: list[list[float]]) -> Json:
    """Return what else a draft's layers depend on: another machine may choose other sizes or another dtype."""
    return {
        **choose_machine(settings.device, settings.dtype, model.source.dtype).describe(),
        "sizes": [asdict(size) for size in sizes],
        "slots": slots,
        "versions": versions(),
    }


def analyse(
    settings: SolveSettings, model: Model, work: Work, calibration: CalibrationManifest, progress: Progress, stop: Stop
) -> tuple[Method, list[Curves]]:
    """Analyse all layers with the method; return it and the error curves, which do not depend on the budget."""
    check_settings_of_model(settings, model)

    def look_at(layer: int) -> Any:
        stop.before(f"analysing layer {layer + 1} of {model.shape.layers}", AGAIN)
        alone = METHODS[settings.method](model, settings)
        inputs = LayerInputs(model, work, layer)
        inputs.check()
        alone.add_layer(inputs)
        return alone.layers[0]

    method = METHODS[settings.method](model, settings)
    method.layers = for_each_layer(look_at, model, settings)
    method.build_slot_tables()
    curves = for_each_layer(method.curves, model, settings)
    if settings.sensitivity == "probe":
        curves = weigh(curves, probe(method, curves, work, calibration, progress, stop))
    return method, curves


def for_each_layer(work: Callable[[int], T], model: Model, settings: SolveSettings) -> list[T]:
    """Run `work` for every layer, small ones in parallel."""
    layers = range(model.shape.layers)
    if not costs.side_by_side(model.shape):
        return [work(layer) for layer in layers]
    load_linear_algebra(choose_machine(settings.device, settings.dtype, model.source.dtype).device)
    return list(spread(work, layers, settings.num_processes or os.cpu_count() or 1))


def check_settings_of_model(settings: SolveSettings, model: Model) -> None:
    """Raise A3Error for settings that this model does not allow."""
    if settings.context is not None and settings.context > model.rope.context:
        raise A3Error(
            f"--context {settings.context} is longer than the context of {model.source.name} ({model.rope.context})"
        )
    if settings.rope_form in ("theta", "linear") and model.rope.kind in ("yarn", "longrope"):
        raise A3Error(
            f"--rope-form {settings.rope_form}: {model.source.name} has RoPE type {model.rope.kind}, which a changed "
            "theta cannot express for smaller heads; use --rope-form auto, or --components mlp to keep heads whole"
        )
    allowed = model.family.compressible(settings.shape)
    if refused := [component for component in settings.components if component not in allowed]:
        raise A3Error(
            f"--components {','.join(settings.components)}: a3 cannot compress {' and '.join(refused)} of model_type "
            f"{model.family.model_type!r} with --shape {settings.shape}; use --components {','.join(allowed)}"
        )


def check_settings(settings: SolveSettings) -> None:
    """Check that settings do not contradict each other. Raises A3Error naming all problems."""
    problems = []
    if settings.budget is None and settings.attention_budget is None and settings.mlp_budget is None:
        problems.append("no budget: give --budget (or --attention-budget and --mlp-budget)")
    if None not in (settings.budget, settings.attention_budget, settings.mlp_budget):
        problems.append("--budget, --attention-budget and --mlp-budget contradict each other: give two at most")
    attention = {"qk", "ov"} & set(settings.components)
    if len(attention) == 1 and settings.shape == "stock":
        problems.append(
            f"--components {','.join(settings.components)}: the stock shape has one head size for QK and OV, "
            "so both are cut or neither: name both, or mlp alone, or use --shape per-layer"
        )
    if settings.attention_budget and not attention:
        problems.append("--attention-budget needs qk and ov among --components")
    if settings.mlp_budget and "mlp" not in settings.components:
        problems.append("--mlp-budget needs mlp among --components")
    if settings.rope_form != "auto" and (settings.method, settings.shape) != ("best", "stock"):
        problems.append(
            f"--rope-form {settings.rope_form} needs --method best and --shape stock: the paper's method keeps the "
            "pairs that it selects, and a per-layer export holds its slots itself"
        )
    if settings.head_multiple % 2 and attention:
        problems.append(f"--head-multiple {settings.head_multiple}: RoPE rotates pairs of dims, so it must be even")
    if problems:
        raise A3Error("bad settings: " + "; ".join(problems))


def read_calibration(work: Work) -> CalibrationManifest:
    if not work.calibration_manifest.is_file():
        raise A3Error(f"{work.folder} has no finished calibration; run a3 calibrate first (--work names the folder)")
    return CalibrationManifest.read(work.calibration_manifest, "run a3 calibrate --overwrite")


def bytes_needed(shape: ModelShape, sizes: list[LayerSizes], settings: SolveSettings) -> int:
    if settings.sequential:
        return sum(costs.corrected_bytes(shape, size, settings.method, settings.refit_rounds) for size in sizes)
    return sum(costs.solution_bytes(shape, size, settings.method) for size in sizes)


def finished_manifest(work: Work, request: Json, *, overwrite: bool) -> SolutionManifest | None:
    """Return the manifest of a finished solution with this request, or None. Raises A3Error for another one."""
    if work.solution_manifest.is_file() and not overwrite:
        found = SolutionManifest.read(work.solution_manifest, "use --overwrite")
        recorded = found.request.plain()
        if recorded == request:
            return found
        raise A3Error(
            f"{work.solution} holds a solution with other settings (differs in "
            f"{differences(recorded, request, 'settings')}); use --overwrite or another --work"
        )
    return None


def check_statistics(work: Work, calibration: CalibrationManifest) -> None:
    """Check the hashes of the calibration's files. Raises A3Error."""
    files = {work.statistics(layer): expected for layer, expected in enumerate(calibration.layers)}
    check_hashes({work.tokens: calibration.tokens_hash, **files}, "run a3 calibrate --overwrite")


def correct(
    model: Model,
    settings: SolveSettings,
    work: Work,
    sizes: list[LayerSizes],
    slots: list[list[float]],
    draft: Draft,
    progress: Progress,
    stop: Stop,
) -> list[str]:
    """Refit the one-shot layers of a draft in a second sweep over the calibration's blocks.

    Write the refit layers and return the hashes of their files.
    """
    layers = range(model.shape.layers)
    corrected = [known for layer in layers if (known := draft.finished_info(layer_file(layer)))]
    if len(corrected) < len(layers):
        cuts = [
            Cut(layer, size, own, partial(read_tensors, draft.folder / one_shot_file(layer), REMOVE))
            for layer, (size, own) in enumerate(zip(sizes, slots, strict=True))
        ]
        refit_layers(model, settings, work, cuts, draft, progress, stop)
        corrected = [write_corrected(draft, layer) for layer in layers]
    return [each["hash"] for each in corrected]


def drop_steps(draft: Draft, layers: Iterable[int]) -> None:
    """Remove the inputs of the corrected layers. Call this last: a resumed command needs them."""
    shutil.rmtree(draft.folder / STREAMS, ignore_errors=True)
    for layer in layers:
        for name in (one_shot_file, refit_file):
            (draft.folder / name(layer)).unlink(missing_ok=True)


def write_corrected(draft: Draft, layer: int) -> Json:
    one_shot, refit = (read_tensors(draft.folder / name(layer), REMOVE) for name in (one_shot_file, refit_file))
    write_tensors(draft.folder / layer_file(layer), one_shot | refit)
    return draft.finish(layer_file(layer))


def refit_layers(
    model: Model,
    settings: SolveSettings,
    work: Work,
    cuts: list[Cut],
    draft: Draft,
    progress: Progress,
    stop: Stop,
) -> None:
    """Run the second sweep, from the first unfinished layer on."""
    return_freed_memory(batches=True)
    machine = choose_machine(settings.device, settings.dtype, model.source.dtype)
    blocks = read_tensors(work.tokens, "run a3 calibrate --overwrite")["tokens"]
    streams = draft.folder / STREAMS
    with writing(streams):
        streams.mkdir(exist_ok=True)
    samples, seq_len = blocks.shape
    needed = costs.stream_bytes(model.shape, samples, seq_len, machine.dtype.itemsize, settings.refit_rounds)
    check_space(streams, needed - bytes_on_disk(streams.iterdir()), "the sequential correction")
    first = count_refits(draft, model.shape.layers)
    if 0 < first < model.shape.layers:
        log.info("resuming at layer %d of %d", first + 1, model.shape.layers)
    swept = refit_sequentially(
        Decoder(model, machine),
        SmallerDecoder(model, machine, cuts),
        blocks,
        folder=streams,
        batch_size=settings.batch_size,
        rounds=settings.refit_rounds,
        first=first,
        progress=progress,
    )
    for layer, refit, following in swept:
        write_tensors(draft.folder / refit_file(layer), refit)
        draft.finish(refit_file(layer), following={file.name: hash_file(file) for file in following})
        if layer + 1 < len(cuts):
            stop.before(f"correcting layer {layer + 2} of {len(cuts)}", AGAIN)


def count_refits(draft: Draft, layers: int) -> int:
    """Return how many layers an earlier sweep has corrected; 0 if the next layer's inputs are damaged."""
    done, last = 0, None
    while done < layers and (found := draft.finished_info(refit_file(done))):
        done, last = done + 1, found
    for name, expected in (last or {}).get("following", {}).items():
        file = draft.folder / STREAMS / name
        if done < layers and not (file.is_file() and hash_file(file) == expected):
            log.warning("%s has changed since it was written; the sequential correction starts again", file)
            return 0
    return done


def one_shot_file(layer: int) -> str:
    return f"one-shot-{layer:03d}.safetensors"


def refit_file(layer: int) -> str:
    return f"refit-{layer:03d}.safetensors"


def choose_sizes(settings: SolveSettings, shape: ModelShape, curves: list[Curves]) -> list[LayerSizes]:
    """Return each layer's sizes for the budget. Raises A3Error if rounding or components do not allow it."""
    attention, mlp = per_layer_items(shape, curves) if settings.shape == "per-layer" else stock_items(shape, curves)
    weights = costs.attention_weights(shape, shape.sizes), costs.mlp_weights(shape, shape.sizes)
    attention = keep_to_budget(attention, settings.attention_budget, weights[0], "attention", settings)
    mlp = keep_to_budget(mlp, settings.mlp_budget, weights[1], "MLP", settings)
    total = sum(weights)
    try:
        chosen = allocate([*attention, *mlp], weights_to_remove(settings.budget or 0.0, total))
    except ValueError:
        most = sum(max(choice.removed for choice in item) for item in [*attention, *mlp])
        raise A3Error(
            f"budget {settings.budget} cannot be reached: {','.join(settings.components)} with head multiple "
            f"{settings.head_multiple} and MLP multiple {settings.mlp_multiple} remove at most "
            f"{most / total:.4f}; lower the budget, the multiples or the least sizes (--min-head, --min-mlp)"
        ) from None
    heads, widths = [c.size for c in chosen[: len(attention)]], [c.size for c in chosen[len(attention) :]]
    if settings.shape == "stock":
        return [LayerSizes(heads[0], heads[0], widths[0])] * shape.layers
    return [LayerSizes(*sizes) for sizes in zip(heads[0::2], heads[1::2], widths, strict=True)]


Items = list[list[Choice]]


def stock_items(shape: ModelShape, curves: list[Curves]) -> tuple[Items, Items]:
    """Return two items to choose: one head size for QK and OV of all layers, and one MLP width."""
    total = {c: {size: sum(curve[c][size] for curve in curves) for size in curves[0][c]} for c in curves[0]}
    heads = sorted(total["qk"].keys() & total["ov"].keys())
    attention = [
        Choice(r, shape.layers * removed_weights(shape, qk=r, ov=r), total["qk"][r] + total["ov"][r]) for r in heads
    ]
    mlp = [Choice(m, shape.layers * removed_weights(shape, mlp=m), loss) for m, loss in total["mlp"].items()]
    return [attention], [mlp]


def per_layer_items(shape: ModelShape, curves: list[Curves]) -> tuple[Items, Items]:
    """Return the items to choose: QK and OV of each layer in turn, and the MLP of each layer."""
    items: dict[Component, Items] = {
        component: [
            [Choice(size, removed_weights(shape, **{component: size}), loss) for size, loss in curve[component].items()]
            for curve in curves
        ]
        for component in COMPONENTS
    }
    return [item for pair in zip(items["qk"], items["ov"], strict=True) for item in pair], items["mlp"]


def removed_weights(shape: ModelShape, **sizes: int) -> int:
    """Return the weights removed from one layer if its components `qk`, `ov` or `mlp` have these sizes."""
    full = shape.sizes[0]
    return costs.linear_weights(shape, [full]) - costs.linear_weights(shape, [replace(full, **sizes)])


def keep_to_budget(items: Items, budget: float | None, weights: int, name: str, settings: SolveSettings) -> Items:
    """Restrict the choices of attention or the MLP to those that its own budget selects."""
    if budget is None:
        return items
    try:
        return [[choice] for choice in allocate(items, weights_to_remove(budget, weights))]
    except ValueError:
        multiple = settings.head_multiple if name == "attention" else settings.mlp_multiple
        most = sum(max(choice.removed for choice in item) for item in items) / weights
        raise A3Error(
            f"{name} budget {budget} cannot be reached: multiples of {multiple} remove at most {most:.4f}; "
            "lower the budget, the multiple or the least size"
        ) from None


def weights_to_remove(budget: float, weights: int) -> int:
    """Return the budget's share of the weights, rounded up; exact for the decimal number as typed."""
    return math.ceil(Fraction(str(budget)) * weights)


def describe_result(
    model: Model, settings: SolveSettings, calibration: CalibrationManifest, sizes: list[LayerSizes]
) -> Json:
    """Return the requested and reached budget, sizes, and the costs of the compressed model."""
    shape, before = model.shape, model.shape.sizes
    removed, total = costs.removed_parameters(shape, sizes), costs.linear_weights(shape, before)
    item, seq_len = model.source.dtype.itemsize, calibration.blocks[1]
    return {
        "shape": settings.shape,
        "full_size": asdict(before[0]),
        "sizes": [asdict(size) for size in sizes],
        **(stock_sizes(shape, sizes[0]) if settings.shape == "stock" else {}),
        "budget_asked": settings.budget,
        "budget_reached": (total - costs.linear_weights(shape, sizes)) / total,
        "parameters": {"before": model.source.parameters(), "after": model.source.parameters() - removed},
        "bytes": {"before": model.source.bytes(), "after": model.source.bytes() - removed * item},
        "kv_bytes_per_token": {
            "before": costs.kv_bytes_per_token(shape, before, item),
            "after": costs.kv_bytes_per_token(shape, sizes, item),
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


def score_errors(method: Method, inputs: LayerInputs, solution: Tensors, rank: int) -> Json:
    """Return the predicted relative error of one layer's attention scores at distances up to the context."""
    context = method.settings.context or method.model.rope.context
    distances = [0, *(2**i for i in range(int(math.log2(max(1, context - 1))) + 1)), context - 1]
    if rank == inputs.shape.head_dim:
        return {"distance": distances, "relative": [0.0] * len(distances)}
    pairs = method.model.rope.short
    slots = frequency_at(pairs, torch.tensor(method.rope_slots(inputs.layer, rank), dtype=torch.float64))
    dims, kept = pair_dims(len(pairs), inputs.shape.turning_pairs), pair_dims(len(slots), int(slots.count_nonzero()))
    queries, keys = (inputs.mean(name)[:, dims][..., dims] for name in ("q_gram", "k_gram"))
    query_map, key_map = (each[:, dims][..., kept] for each in head_maps(solution, inputs.shape))
    grams, maps = (queries, keys), (query_map, key_map)
    return {
        "distance": distances,
        "relative": [float(f"{score_error(grams, maps, pairs, slots, distance):.4g}") for distance in distances],
    }


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
    """Return the number of tokens per dimension for a head and for the MLP."""
    tokens = calibration.tokens
    return {"head": tokens / shape.head_dim, "mlp": tokens / shape.intermediate_size}
