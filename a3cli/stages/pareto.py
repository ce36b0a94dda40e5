"""Loss against size for every method at many budgets: predicted, and measured if text is given.

Error curves are computed once per method; each budget is then only an allocation. Measuring projects, exports and
evaluates in a temporary folder inside the work folder; an existing solution is not touched.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from a3cli.errors import A3Error
from a3cli.methods import Curves
from a3cli.models import costs
from a3cli.models.families import Family, LayerSizes, usual_entries
from a3cli.models.model import Model
from a3cli.settings import LOSSES, EvalSettings, ExportSettings, ParetoSettings, SolveSettings, TextSettings
from a3cli.stages.context import AGAIN, Run, check_settings, open_run, read_calibration
from a3cli.stages.evaluate import evaluate
from a3cli.stages.export import export
from a3cli.stages.result import describe_result, predicted_loss
from a3cli.stages.sizes import choose_sizes
from a3cli.stages.solve import Analysed, analyse, write_solution
from a3cli.text.blocks import CONTEXT
from a3cli.text.identity import as_compared, describe_text, files_now
from a3cli.text.sources import check_texts
from a3cli.work.files import Json, making_scratch, replacing
from a3cli.work.folder import Work
from a3cli.work.interrupt import Stop
from a3cli.work.machine import return_freed_memory
from a3cli.work.manifests import SOURCE_REMEDY, CalibrationManifest, SourceRecord
from a3cli.work.progress import Progress, reporting
from a3cli.work.record import Record
from a3cli.work.sealed import read_undamaged, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

MEASURED = ("perplexity", "source_perplexity", "perplexity_increase", "kl", "top1_agreement")
WITHOUT_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
VARIANTS = {
    "paper": {"method": "paper", "shape": "stock"},
    "best": {"method": "best", "shape": "stock"},
    "best, per-layer": {"method": "best", "shape": "per-layer"},
}


def pareto(settings: ParetoSettings, work: Work, *, progress: Progress, stop: Stop | None = None) -> Json:
    """Compute the points of every variant at every budget; a budget that a variant cannot reach has an `error`.

    Raises A3Error if the statistics are missing, altered or of another source, or if no point can be reached, and
    Interrupted at the end of the layer or point in which `stop` was set off.
    """
    return_freed_memory(batches=True)
    check_texts([settings.text] if settings.text else [])
    calibration = read_calibration(work)
    with work.locked():
        run = open_run(settings_of(settings, {}, settings.budgets[0]), work, calibration, progress, stop or Stop())
        settings = for_model(settings, run.model)
        points = Points(settings, work, calibration)
        for name, variant in variants_of(settings, run.model.family):
            if variant["method"] == "best" and calibration.request.mlp_stats == "diagonal":
                log.info("%s is left out: it needs a3 calibrate --mlp-stats full", name)
            else:
                add_variant(settings, run, points, name, variant)
        if all("error" in each for each in points.found):
            raise A3Error(points.found[0]["error"])
        found = points.found
        points.forget()
    return {
        "model": run.model.source.name,
        "calibration": calibration.sha256,
        "sensitivity": settings.sensitivity,
        "points": found,
    }


def for_model(settings: ParetoSettings, model: Model) -> ParetoSettings:
    """Return settings whose text has its tokens per block."""
    text = settings.text and settings.text.for_context(usual_entries(model.source.config).get(CONTEXT))
    return settings.model_copy(update={"text": text})


def add_variant(settings: ParetoSettings, run: Run, points: "Points", name: str, variant: Json) -> None:
    """Compute the missing points of one variant, all from one analysis."""
    runs = [replace(run, settings=settings_of(settings, variant, budget)) for budget in settings.budgets]
    missing = [each for each in runs if not points.has(name, each.settings)]
    if not missing:
        return
    log.info("error curves: %s", name)
    check_settings(missing[0].settings, run.model.family)
    analysed = analyse(missing[0])
    with reporting(run.progress, f"points of {name}", len(missing), "points") as finished:
        for each in missing:
            run.stop.before(f"{name} at {each.settings.budget:g}", AGAIN)
            found = {"variant": name, **point(each, analysed.curves)}
            if settings.text and "error" not in found:
                measured = measure_in_scratch(each, analysed, settings.text)
                points.note_text(measured)
                found["measured"] = {key: measured[key] for key in MEASURED}
            points.add(found)
            finished()


def measure_in_scratch(run: Run, analysed: Analysed, text: TextSettings) -> Json:
    """Write and export the solution in a temporary folder and return its evaluation."""
    with making_scratch(run.work.scratch):
        borrowed = replace(run, work=run.work.borrowed_by(run.work.scratch / "work"))
        write_solution(borrowed, analysed, measured=False)  # on this text instead
        return measure(borrowed.settings, text, borrowed.work, run.work.scratch / "export", run.progress)


def variants_of(settings: ParetoSettings, family: Family) -> Iterator[tuple[str, Json]]:
    """Yield the variants to compare by name: the method as published, and ours with the given options.

    Each compresses all components that the family allows; a shape that allows none is left out.
    """
    for name, variant in VARIANTS.items():
        corrected = settings.sequential and variant["method"] == "best"
        components = family.compressible(variant["shape"])
        if not components:
            continue
        described = {**variant, "sequential": corrected, "components": components}
        if components:
            yield f"{name}, sequential" if corrected else name, described


class Points:
    """The finished points, in a file of the work folder, since measuring one point can take long.

    An evaluation says which files of the text it has read; later points must have read the same.
    """

    def __init__(self, settings: ParetoSettings, work: Work, calibration: CalibrationManifest) -> None:
        self._settings, self._calibration = settings, calibration.sha256
        begun = read_undamaged(work.points)
        read = begun["request"].get("text_read") if begun else None
        if read and settings.text:
            read = {**read, "files": files_now(settings.text, read["files"], whole=read["whole"])}
        self._record = Record(work.points, self._request(read))
        if not self._record.resume():
            self._record.request = self._request(None)

    def _request(self, read: Json | None) -> Json:
        """Return everything that points depend on, with what was read of the text."""
        text = self._settings.text and as_compared(describe_text(self._settings.text), read["files"] if read else {})
        return {
            "settings": {**self._settings.model_dump(mode="json"), "text": text},
            "text_read": read,
            "calibration": self._calibration,
            "versions": versions(),
        }

    @property
    def found(self) -> list[Json]:
        return list(self._record.steps.values())

    def has(self, variant: str, settings: SolveSettings) -> bool:
        return step_name(variant, settings.budget) in self._record.steps

    def add(self, point: Json) -> None:
        self._record.finish(step_name(point["variant"], point["budget_asked"]), **point)

    def note_text(self, measured: Json) -> None:
        """Record which files an evaluation has read."""
        self._record.request = self._request({"files": measured["text_files"], "whole": measured["text_read"]["whole"]})

    def forget(self) -> None:
        self._record.forget()


def step_name(variant: str, budget: float | None) -> str:
    return f"{variant} at {budget}"


def settings_of(settings: ParetoSettings, variant: Json, budget: float) -> SolveSettings:
    shared = ("head_multiple", "mlp_multiple", "sensitivity", "device", "dtype", "batch_size")
    return SolveSettings.model_validate(
        {"budget": budget, **variant, **{name: getattr(settings, name) for name in shared}}
    )


def point(run: Run, curves: list[Curves]) -> Json:
    """Return sizes, costs and predicted loss at one budget."""
    try:
        sizes = choose_sizes(run.settings, run.model.shape, curves, run.stored, run.model.family)
    except A3Error as error:
        return {"budget_asked": run.settings.budget, "error": str(error)}
    wanted = ("budget_asked", "budget_reached", "parameters", "bytes", "kv_bytes_per_token", "sizes")
    described = describe_result(run, sizes)
    return {
        **{key: described[key] for key in wanted},
        "decoder_weights_left": costs.linear_weights(run.model.shape, sizes),
        "predicted_loss": sum(predicted_loss(curves, sizes).values()),
        "mean_sizes": mean_sizes(sizes),
    }


def mean_sizes(sizes: list[LayerSizes]) -> Json:
    return {name: sum(getattr(size, name) for size in sizes) / len(sizes) for name in ("qk", "ov", "mlp")}


def measure(settings: SolveSettings, text: TextSettings, work: Work, out: Path, progress: Progress) -> Json:
    """Export the solution in `work` to `out` and return its evaluation."""
    source = SourceRecord.read(work.source, SOURCE_REMEDY)
    log.info("measuring %s, %s, at %g", settings.method, settings.shape, settings.budget)
    export(out, ExportSettings(), work, progress=progress)
    return evaluate(
        EvalSettings(
            model=str(out),
            against=source.place,
            against_revision=None if source.folder else source.revision,
            follow_symlinks=source.follow_symlinks,
            texts=(text,),
            bootstrap=0,
            device=settings.device,
            dtype=settings.dtype,
            batch_size=settings.batch_size,
            trust_remote_code=settings.shape == "per-layer",  # the code is a3's
        ),
        progress=progress,
    )


def draw(result: Json, path: Path) -> None:
    """Write the `plot` of a sweep's points as PNG, SVG or PDF, by the file's suffix."""
    with replacing(path) as partial:
        plot(result).savefig(partial, format=path.suffix[1:], dpi=150, metadata=WITHOUT_DATE.get(path.suffix))


def plot(result: Json) -> "Figure":
    """Draw loss against the share of the decoder's weights removed, one line per variant."""
    from matplotlib.figure import Figure

    reached = [each for each in result["points"] if "error" not in each]
    predicted = f"predicted loss\n({LOSSES[result['sensitivity']]})"  # two lines: one would be longer than the axis
    panels: dict[str, Callable[[Json], float]] = {predicted: lambda each: each["predicted_loss"]}
    if any("measured" in each for each in reached):
        panels["KL(source ‖ compressed), nats per token"] = lambda each: each["measured"]["kl"]
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for axes, (label, loss) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name in dict.fromkeys(each["variant"] for each in reached):
            of_variant = [each for each in reached if each["variant"] == name]
            axes.plot([100 * p["budget_reached"] for p in of_variant], [loss(p) for p in of_variant], "o-", label=name)
        axes.set(xlabel="decoder weights removed, %", ylabel=label, yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
