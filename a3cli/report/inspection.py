"""Inspect a work folder at any stage, or an export, and warn. Changes nothing and takes no lock.

A work folder has its statistics and calibration text; an export has only its manifest.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from pydantic import SerializeAsAny, ValidationError

from a3cli.errors import A3Error
from a3cli.models.checkpoint import Checkpoint
from a3cli.models.config import read_experts
from a3cli.models.families import family_for, family_of, usual_entries
from a3cli.models.source import open_recorded, opened_work
from a3cli.report.concerns import find_concerns
from a3cli.report.figures import describe_budgets
from a3cli.report.health import REMEDY, Dimensions, describe_statistics
from a3cli.report.layers import LayerState, describe_layers
from a3cli.report.manifest import MANIFEST, ExportSummary, read_export_manifest
from a3cli.report.measured import Measured, as_recorded
from a3cli.settings import COMPONENTS, Component
from a3cli.text.tokenizer import load_tokenizer, tokenizer_fingerprint
from a3cli.text.tokens import TokenStatistics, describe_blocks, describe_tokens
from a3cli.work.files import Json, check_hash, hash_json, read_json, read_tensors
from a3cli.work.folder import Work
from a3cli.work.manifests import (
    SOURCE_REMEDY,
    ByComponent,
    Calibration,
    CalibrationManifest,
    Fingerprint,
    Sizes,
    Solution,
    SolutionManifest,
    SourceRecord,
    Versions,
    calibration_content,
)
from a3cli.work.record import Record
from a3cli.work.schema import Part
from a3cli.work.sealed import name_differences, read_manifest


class CalibrationProgress(CalibrationManifest):
    """What the manifest of an unfinished calibration would be now."""


class InspectedSource(Part):
    """The source that a folder records; all None if there is no source.json."""

    model: str | None = None
    revision: str | None = None
    fingerprint: Fingerprint | None = None


class SolutionSummary(Part):
    """One of a work folder's solutions in the list of all."""

    name: str | None
    current: bool  # solved from the calibration that the folder has now
    budget_asked: float | None
    asked: str  # all budgets in words
    budget_reached: float
    full_size: Sizes
    sizes: list[Sizes]
    predicted_loss: ByComponent
    sha256: str


class Inspection(Part):
    """What is known of a folder; None for what it does not have."""

    path: str
    kind: Literal["export", "work"]
    stage: Literal["calibrating", "calibrated", "solved", "exported"]
    source: InspectedSource
    calibration: SerializeAsAny[Calibration]
    text: TokenStatistics | None
    name: str | None  # of the solution
    solution: SerializeAsAny[Solution] | None
    solutions: list[SolutionSummary]
    layers: list[LayerState]
    export: ExportSummary | None
    measured: list[Measured]
    versions: Versions
    warnings: list[str]

    def plain(self, **which: Any) -> Json:
        """Return the content as JSON has it; layers and figures of a3 eval have all entries, also unknown ones."""
        layers = [each.model_dump() for each in self.layers]
        return super().plain(**which) | {"layers": layers, "measured": as_recorded(self.measured)}


def describe(path: Path, name: str | None = None, source: str | None = None) -> Inspection:
    """Return the folder's stage, source, settings, hashes, layers and warnings, and its solution of this name.

    `source` is where a work folder's source was moved. Raises A3Error for other folders, and if there is no such
    solution.
    """
    if (path / MANIFEST).is_file():
        if source is not None:
            raise A3Error(f"{path} is an export, which is inspected without its source: leave out --source")
        if name is not None:
            raise A3Error(f"{path} is an export, which has one solution: leave out --name")
        return describe_export(path)
    work = choose_solution(opened_work(path, source), name)
    if work.calibration_manifest.is_file() or work.calibration_progress.is_file():
        return describe_work(work)
    raise A3Error(f"{path} is neither a work folder with a calibration nor an a3 export; give one of these")


def choose_solution(work: Work, name: str | None) -> Work:
    """Return the work folder with its solution of this name. Raises A3Error if there is none."""
    if name is None:
        return work
    found = {each.name: each for each in work.solutions() if each.name}
    if name not in found:
        others = f"it has {', '.join(found)}" if found else "it has none with a name"
        raise A3Error(f"{work.folder} has no solution named {name}; {others} (a3 solve --name makes one)")
    return found[name]


def describe_export(folder: Path) -> Inspection:
    manifest = read_export_manifest(folder / MANIFEST)
    path = folder / "config.json"
    config = read_json(path)
    dimensions = read_dimensions(config, path, manifest.solution)
    check_hash(path, manifest.files.get(path.name, ""), "run a3 export again")
    layers = describe_layers(dimensions, manifest.calibration.tokens, manifest.solution, [])
    return Inspection(
        path=str(folder),
        kind="export",
        stage="exported",
        source=InspectedSource(**dict(manifest.source)),
        calibration=manifest.calibration,
        text=None,
        name=None,
        solution=manifest.solution,
        solutions=[],
        layers=layers,
        export=manifest.summary(),
        measured=manifest.measured,
        versions=manifest.versions,
        warnings=find_concerns(
            manifest.calibration.request, layers, None, manifest.solution, cut_of(config, manifest.solution)
        ),
    )


def cut_of(config: Json, solution: Solution | None) -> tuple[Component, ...]:
    """Return the components that the family of config.json cuts by default in some shape, or that a solution cuts."""
    family = family_for(config)
    shapes = [*family.compressible("stock"), *family.compressible("per-layer")]
    shapes += solution.request.settings.cut if solution else ()
    return tuple(component for component in COMPONENTS if component in shapes)


def read_dimensions(config: Json, path: Path, solution: Solution) -> Dimensions:
    """Return the source's dimensions from an export's config.json and its solution."""
    config = usual_entries(config)
    heads, kv = count_in(config, "num_attention_heads", path), "num_key_value_heads"
    kv_heads = heads if config.get(kv) is None else count_in(config, kv, path)
    family = family_of(config.get("model_type"))
    experts, active = read_experts(family, SimpleNamespace(**config))
    dimensions = Dimensions(
        heads=0 if family.carried_attention else heads,
        kv_heads=0 if family.carried_attention else kv_heads,
        head_dim=solution.full_size.qk,
        intermediate=solution.full_size.mlp,
        hidden=count_in(config, "hidden_size", path),
        item=round(solution.bytes.before / solution.parameters.before),
        gated=family.gated,
        experts=experts,
        active_experts=active,
    )
    count_in(config, "vocab_size", path)
    return dimensions


def count_in(config: Json, key: str, path: Path) -> int:
    """Return the positive number at `key` of config.json. Raises A3Error if it is anything else."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise A3Error(f"{path}: {key} is {value!r}, not a positive number; run a3 export again")
    return value


def describe_work(work: Work) -> Inspection:
    calibration, blocks = read_calibration(work)
    recorded, source = read_sources(work, calibration)
    every = {each.name: read_solution(each) for each in work.solutions()}
    stored = every.get(work.name)
    solution = stored if stored and stored.request.calibration == calibration.sha256 else None
    text = describe_calibration_text(blocks, source)
    dimensions, health = describe_statistics(work, calibration.layers, source)
    layers = describe_layers(dimensions, blocks.numel(), solution, health) if dimensions else []
    cut = cut_of(source.config, solution) if source else COMPONENTS
    warnings = find_concerns(calibration.request, layers, text, solution, cut)
    if stored and not solution:
        warnings.append(f"{work.solution_manifest} was solved from another calibration: {work.solve_again}")
    if source is None:
        warnings.append("the source was not found: bytes and token texts are missing; if it was moved, give --source")
    under_way = isinstance(calibration, CalibrationProgress)
    return Inspection(
        path=str(work.folder),
        kind="work",
        stage="calibrating" if under_way else "solved" if solution else "calibrated",
        source=recorded,
        calibration=calibration,
        text=text,
        name=work.name,
        solution=solution,
        solutions=[summarise(name, each, calibration) for name, each in every.items()],
        layers=layers,
        export=None,
        measured=measured_in(work, solution),
        versions=calibration.versions,
        warnings=warnings,
    )


def read_calibration(work: Work) -> tuple[CalibrationManifest, torch.Tensor]:
    """Return the manifest of a calibration, finished or not, and its blocks `[N, T]`."""
    if work.calibration_manifest.is_file():
        finished = CalibrationManifest.read(work.calibration_manifest, REMEDY)
        check_hash(work.tokens, finished.tokens_hash, REMEDY)
        return finished, read_tensors(work.tokens, REMEDY)["tokens"]
    record = Record(work.calibration_progress, {})
    sealed = record.resume_checked(REMEDY)
    check_hash(work.tokens, record.steps[work.tokens.name]["hash"], REMEDY)
    blocks = read_tensors(work.tokens, REMEDY)["tokens"]
    content = calibration_content(record.request, record.steps, list(blocks.shape))
    return CalibrationProgress.parse({**content, "sha256": sealed}, record.file, REMEDY), blocks


def read_solution(work: Work) -> SolutionManifest:
    return SolutionManifest.read(work.solution_manifest, work.solve_again)


def summarise(name: str | None, solution: SolutionManifest, calibration: Calibration) -> SolutionSummary:
    return SolutionSummary(
        name=name,
        current=solution.request.calibration == calibration.sha256,
        budget_asked=solution.budget_asked,
        asked=describe_budgets(solution.request.settings),
        budget_reached=solution.budget_reached,
        full_size=solution.full_size,
        sizes=solution.sizes,
        predicted_loss=solution.predicted_loss,
        sha256=solution.sha256,
    )


def read_sources(work: Work, calibration: CalibrationManifest) -> tuple[InspectedSource, Checkpoint | None]:
    """Return the recorded source and, if it is on this machine, its checkpoint. Raises A3Error if that is another."""
    if not work.source.is_file():
        return InspectedSource(model=None, revision=None, fingerprint=None), None
    recorded = read_source(work, calibration.request.source.plain())
    source = open_source(recorded)
    if source is not None:
        check_source(source, work, calibration)
    inspected = InspectedSource(model=recorded.model, revision=recorded.revision, fingerprint=recorded.fingerprint)
    return inspected, source


def read_source(work: Work, fingerprint: Json) -> SourceRecord:
    """Read where a calibration's checkpoint is. Raises A3Error if source.json was altered or is of another model."""
    recorded = SourceRecord.read(work.source, SOURCE_REMEDY)
    if recorded.fingerprint.plain() != fingerprint:
        raise A3Error(
            f"{work.source} is of another model ({recorded.model}) than the calibration in {work.calibration}; "
            f"{SOURCE_REMEDY}"
        )
    return recorded


def measured_in(work: Work, solution: SolutionManifest | None) -> list[Measured]:
    """Return the figures that a3 run measured for this solution's export, if that export still exists."""
    if solution is None or not work.evaluation.is_file():
        return []
    evaluation = read_manifest(work.evaluation, "run a3 run --overwrite")
    request = evaluation["request"]
    try:
        manifest = read_export_manifest(Path(request["settings"]["model"]) / MANIFEST)
        exported = hash_json(manifest.plain()) == request["export"]
        of_this = exported and manifest.solution.sha256 == solution.sha256
        return [Measured.model_validate(each) for each in evaluation["result"]["datasets"]] if of_this else []
    except (A3Error, ValidationError):  # another model was measured, the export was removed, or a figure is not finite
        return []


def open_source(recorded: SourceRecord) -> Checkpoint | None:
    """Open the source if it is on this machine; a Hub id is looked up only in the cache.

    Raises A3Error for a local folder with a damaged checkpoint.
    """
    if Path(recorded.place).is_dir():
        return open_recorded(recorded)
    try:
        return open_recorded(recorded, cached_only=True)
    except A3Error:
        return None


def check_source(source: Checkpoint, work: Work, calibration: Calibration) -> None:
    """Check that weights, configuration and tokenizer are those of the calibration. Raises A3Error."""
    request = calibration.request
    found = {**source.fingerprint(), "tokenizer": tokenizer_fingerprint(source.folder)}
    recorded = request.source.plain()
    expected = {**{key: recorded.get(key) for key in found}, "tokenizer": request.tokenizer}
    if differs := name_differences(expected, found):
        raise A3Error(
            f"{source.name} is not the checkpoint of {work.calibration} (differs in {differs}); "
            "restore the source, or run a3 calibrate again"
        )


def describe_calibration_text(blocks: torch.Tensor, source: Checkpoint | None) -> TokenStatistics:
    try:
        tokenizer = load_tokenizer(source.folder) if source else None
    except A3Error:
        tokenizer = None
    if tokenizer is None or source is None or not isinstance(source.config.get("vocab_size"), int):
        return describe_blocks(blocks)
    return describe_tokens(blocks, tokenizer, source.config["vocab_size"])
