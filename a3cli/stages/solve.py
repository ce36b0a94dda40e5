"""Stage 2, solve: compute error curves from statistics and weights, choose sizes, and write projections."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from a3cli.methods import Analysis, Curves, LayerGradients, Method, Prediction, Slots, Table
from a3cli.models import costs
from a3cli.models.families import LayerSizes
from a3cli.settings import COMPONENTS, SolveSettings
from a3cli.settings.budgets import SINCE
from a3cli.stages.allowed import resolve_for_work
from a3cli.stages.context import AGAIN, Run, check_settings_of_model, open_run, read_calibration
from a3cli.stages.correction import correct, cuts_of, drop_steps, one_shot_file
from a3cli.stages.gradients import Factors, convert, loss_factors, with_gradients
from a3cli.stages.measured_loss import measure_loss
from a3cli.stages.probe import probe, weigh
from a3cli.stages.result import (
    describe_layers,
    describe_result,
    describe_slots,
    mean_by_distance,
    predicted_loss,
    score_errors,
)
from a3cli.stages.sizes import check_budgets, choose_sizes
from a3cli.work.draft import Draft, drafting
from a3cli.work.files import Json, write_tensors
from a3cli.work.folder import Work, layer_file
from a3cli.work.interrupt import Stop
from a3cli.work.machine import explaining_memory, return_freed_memory
from a3cli.work.manifests import CalibrationManifest, SolutionManifest, finished_manifest
from a3cli.work.processes import spread
from a3cli.work.progress import Progress, portion, reporting
from a3cli.work.sealed import versions

NOT_IN_BYTES = {"num_processes", "name", "memory"}  # settings that do not change the bytes of a solution


@dataclass(frozen=True)
class Analysed:
    """A method, what it found, and the curves to choose sizes from, converted as the settings' sensitivity says.

    `factors` are those of the conversion by `gradients`, if these were used.
    """

    method: Method[Any]
    analysis: Analysis[Any]
    curves: list[Curves]
    gradients: Sequence[LayerGradients] | None = None
    factors: list[Factors] | None = None


def solve(
    settings: SolveSettings, work: Work, *, overwrite: bool, progress: Progress, stop: Stop | None = None
) -> SolutionManifest:
    """Choose sizes for a budget and write each layer's projections; return the manifest.

    Raises A3Error if the statistics are missing, altered or of another source, or if the budget cannot be
    reached under the rounding, and Interrupted at the end of the layer in which `stop` was set off.
    """
    return_freed_memory(batches=True)
    work = work.named(settings.name)
    settings = resolve_for_work(settings, work)
    calibration = read_calibration(work)
    with work.locked():
        if work.solution_manifest.is_file() and not overwrite:
            return finished_solution(work, describe_request(settings, calibration))
        run = open_run(settings, work, calibration, progress, stop or Stop())
        check_settings_of_model(settings, run.model)
        allowed = {component: run.method().sizes(component) for component in COMPONENTS}
        check_budgets(settings, run.model.shape, allowed, run.stored, run.model.family)
        return write_solution(run, analyse(run))


def describe_request(settings: SolveSettings, calibration: CalibrationManifest) -> Json:
    """Return everything that a solution depends on."""
    unsaid = {name for name in SINCE if getattr(settings, name) is None}
    chosen = settings.model_dump(mode="json", exclude={*NOT_IN_BYTES, *unsaid})
    return {"settings": chosen, "calibration": calibration.sha256}


def finished_solution(work: Work, request: Json) -> SolutionManifest:
    """Return the manifest of the finished solution. Raises A3Error if it is of another request."""
    return finished_manifest(
        SolutionManifest,
        work.solution_manifest,
        request,
        holder=f"{work.solution} holds a solution with other settings",
        nested="settings",
        otherwise="another --name or --work",
    )


def analyse(run: Run) -> Analysed:
    """Analyse all layers with the method; the result does not depend on the budget."""
    check_settings_of_model(run.settings, run.model)
    if run.settings.sensitivity == "gradient":
        run = with_gradients(run)
    method = run.method()

    def analyse_layer(layer: int) -> Any:
        run.stop.before(f"analysing layer {layer + 1} of {run.layers}", AGAIN)
        inputs = run.inputs(layer)
        inputs.check()
        return method.analyse(inputs)

    layers = run.for_each_layer("analysing", analyse_layer)

    def prepare_slots(analysed: list[Any]) -> list[Table]:
        with reporting(run.progress, "preparing RoPE slots") as finished, portion(of=finished):
            return method.tables(analysed)

    [tables] = spread(prepare_slots, [layers], 1)  # many small matrices

    def predict_layer(layer: int) -> Prediction:
        run.stop.before(f"predicting the losses of layer {layer + 1} of {run.layers}", AGAIN)
        return method.predict(layers, tables, layer)

    predictions = run.for_each_layer("predicting losses", predict_layer)
    analysis = Analysis(layers, tables, predictions)
    curves = [prediction.losses for prediction in predictions]
    if run.settings.sensitivity == "probe":
        return Analysed(method, analysis, weigh(curves, probe(run, method, analysis)))
    if run.gradients:
        factors = [loss_factors(run.inputs(layer), own) for layer, own in enumerate(run.gradients)]
        converted = [convert(own, factor) for own, factor in zip(curves, factors, strict=True)]
        return Analysed(method, analysis, converted, run.gradients, factors)
    return Analysed(method, analysis, curves)


def write_solution(run: Run, analysed: Analysed, *, measured: bool = True) -> SolutionManifest:
    """Choose sizes from a finished analysis and write each layer's projections; return the manifest.

    Unless `measured`, its loss is not measured.
    """
    run = replace(run, gradients=analysed.gradients)
    with reporting(run.progress, "choosing sizes") as finished, portion(of=finished):
        sizes = choose_sizes(run.settings, run.model.shape, analysed.curves, run.stored, run.model.family)
    slots = analysed.method.choose_slots(analysed.analysis, sizes, run.for_each_layer)
    request = describe_request(run.settings, run.calibration)
    with drafting(run.work.solution, {**request, **describe_choice(run, sizes, slots)}) as draft, explaining_memory():
        draft.check_space(bytes_needed(run, sizes), "the solution")
        written = run.for_each_layer(
            "projecting", lambda layer: write_layer(run, analysed, draft, layer, slots[layer], sizes[layer])
        )
        hashes = correct(run, draft, sizes, slots) if run.settings.sequential else [each["hash"] for each in written]
        manifest = {
            "request": request,
            **describe_result(run, sizes),
            "rope_slots": describe_slots(run, sizes, slots),
            "context": run.context,
            "predicted_loss": predicted_loss(analysed.curves, sizes),
            "measured_loss": measure_loss(run, cuts_of(draft, sizes, slots, layer_file)) if measured else None,
            "predicted_score_error": mean_by_distance([each["score_error"] for each in written]),
            "per_layer": describe_layers(run, written, analysed.curves, analysed.factors),
            "layers": hashes,
            "versions": versions(),
        }
        sealed = SolutionManifest.write(draft.folder / run.work.solution_manifest.name, manifest)
        if run.settings.sequential:
            drop_steps(draft, range(run.layers))
        return sealed


def describe_choice(run: Run, sizes: list[LayerSizes], slots: list[Slots]) -> Json:
    """Return what else a draft's layers depend on: another machine may choose other sizes or another dtype."""
    return {
        **run.machine.describe(),
        "sizes": [asdict(size) for size in sizes],
        "slots": [own.pairs for own in slots],
        "versions": versions(),
    }


def bytes_needed(run: Run, sizes: list[LayerSizes]) -> int:
    shape, settings = run.model.shape, run.settings
    if settings.sequential:
        return sum(costs.corrected_bytes(shape, size, settings.method, settings.refit_rounds) for size in sizes)
    return sum(costs.solution_bytes(shape, size, settings.method) for size in sizes)


def write_layer(run: Run, analysed: Analysed, draft: Draft, layer: int, slots: Slots, sizes: LayerSizes) -> Json:
    """Project one layer and write its file, unless the draft has it; return what the draft records of it."""
    name = one_shot_file(layer) if run.settings.sequential else layer_file(layer)
    if known := draft.finished_info(name):
        return known
    run.stop.before(f"projecting layer {layer + 1} of {run.layers}", AGAIN)
    method, found = analysed.method, analysed.analysis.layers[layer]
    projection = method.project(run.inputs(layer), found, slots, sizes)
    write_tensors(draft.folder / name, projection.tensors)
    errors = score_errors(run, layer, slots, sizes.qk, projection.tensors)
    described = {**method.describe(found), **projection.describe()}
    return draft.finish(name, described=described, score_error=errors)
