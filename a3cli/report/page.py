"""Write one self-contained HTML page with an inspection and figures of `a3 eval`.

The template requests nothing from the network, and its content policy forbids it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from a3cli.report import charts
from a3cli.report.commands import calibrate_commands, export_command, recorded_settings, solve_command
from a3cli.report.figures import TITLES, Comparison, compare, describe_budgets, human, human_bytes
from a3cli.report.inspection import Inspection
from a3cli.report.layers import LayerState
from a3cli.report.manifest import ExportSummary
from a3cli.report.measured import Measured, as_recorded, read_evaluation
from a3cli.report.names import describe_texts, public_name
from a3cli.report.serving import Serving, serving_of, serving_warnings
from a3cli.runtimes import Verdict, summarise
from a3cli.settings import COMPONENTS, LOSSES, Component
from a3cli.work.escape import printable
from a3cli.work.files import Json, replacing
from a3cli.work.manifests import Calibration, Solution


@dataclass(frozen=True)
class Report:
    """A written page and its content."""

    html: Path
    warnings: list[str]
    measured: list[Measured]
    served: Serving | None = None

    def plain(self) -> Json:
        """Return the content as JSON has it."""
        return {
            "html": str(self.html),
            "warnings": self.warnings,
            "measured": as_recorded(self.measured),
            **(self.served.plain() if self.served else {}),
        }


@dataclass(frozen=True)
class Tile:
    """One of the main figures."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class ErrorCurves:
    """The chart of one component's error curves."""

    key: Component
    title: str
    chart: charts.Chart


@dataclass(frozen=True)
class SizeCell:
    """One component's size in one layer, and its share of the full size."""

    key: Component
    size: int
    share: float


def read_evaluations(files: Sequence[Path]) -> list[Measured]:
    return [each for file in files for each in read_evaluation(file)]


def write_report(found: Inspection, measured: list[Measured], html: Path, memory: int | None = None) -> Report:
    """Write the page, with known figures if none are given; return its path and its content.

    A file that is this page already is left as it is.
    """
    measured, served = measured or found.measured, find_serving(found, memory)
    page = render(found, measured, served)
    if not holds(html, page):
        with replacing(html) as partial:
            partial.write_text(page, "utf-8")
    unknown = serving_warnings(found.solution, memory) if found.solution else []
    return Report(html, [*found.warnings, *unknown], measured, served)


def is_page(html: Path, found: Inspection, measured: list[Measured], memory: int | None = None) -> bool:
    """Return whether a file is the page with this content."""
    return holds(html, render(found, measured, find_serving(found, memory)))


def holds(html: Path, page: str) -> bool:
    return html.is_file() and html.read_bytes() == page.encode()


def find_serving(found: Inspection, memory: int | None) -> Serving | None:
    """Return what serving the result takes; None without a solution."""
    dtype = found.export.dtype if found.export else "source"
    return serving_of(found.solution, memory, dtype) if found.solution else None


def render(found: Inspection, measured: list[Measured], served: Serving | None = None) -> str:
    environment = Environment(
        loader=PackageLoader("a3cli.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_finalize,
    )
    return environment.get_template("report.html").render(**content(found, measured, served)) + "\n"


def _finalize(value: Any) -> Any:
    """Escape control characters of names; keep markup made by the template."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def content(found: Inspection, measured: list[Measured], served: Serving | None) -> Json:
    """Return the template's content, by section."""
    return {
        "name": public_name(str(found.source.model), found.source.revision),
        "stage": found.stage,
        "warnings": found.warnings,
        "tiles": tiles(found, measured),
        "measured": measured,
        "layers": found.layers,
        "components": TITLES,
        "text": found.text,
        "calibration": found.calibration,
        "settings": settings(found),
        "commands": commands(found),
        "hashes": hashes(found),
        "files": sorted(found.export.files.items()) if found.export else [],
        "loads_with": describe_runtimes(found.export) if found.export else None,
        "versions": found.versions.plain(),
        **solution_content(found, served),
    }


def solution_content(found: Inspection, served: Serving | None) -> Json:
    """Return the content of the sections about a solution; None for each if there is no solution."""
    solution = found.solution
    if solution is None:
        return dict.fromkeys(("changes", "curves", "loss", "map", "rope", "score_error", "context"))
    return {
        "changes": changes(solution, served),
        "curves": [error_curves(solution, component) for component in COMPONENTS],
        "loss": LOSSES[solution.request.settings.sensitivity],
        "map": size_map(found.layers),
        "rope": rope(solution),
        "score_error": score_error(solution),
        "context": solution.context,
    }


def describe_runtimes(export: ExportSummary) -> str:
    return summarise([Verdict(each.runtime, each.loads, each.note) for each in export.runtimes])


def error_curves(solution: Solution, component: Component) -> ErrorCurves:
    curves = [
        (getattr(layer.curves, component), getattr(sizes, component))
        for layer, sizes in zip(solution.per_layer, solution.sizes, strict=True)
    ]
    return ErrorCurves(component, TITLES[component], charts.error_curves(curves))


def tiles(found: Inspection, measured: list[Measured]) -> list[Tile]:
    """Return the main figures."""
    shown = solution_tiles(found.solution) if found.solution else []
    shown += measured_tiles(measured[0]) if measured else []
    return shown if found.solution else [*shown, calibration_tile(found.calibration)]


def solution_tiles(solution: Solution) -> list[Tile]:
    kv, size, asked = solution.kv_bytes_per_token, solution.bytes, describe_budgets(solution.request.settings)
    return [
        Tile("decoder weights", f"−{solution.budget_reached:.1%}", f"asked: {asked}"),
        Tile("checkpoint", human_bytes(size.after), f"was {human_bytes(size.before)}"),
        Tile("KV cache", f"−{1 - kv.after / kv.before:.1%}", f"{kv.after:,} bytes per token"),
    ]


def measured_tiles(first: Measured) -> list[Tile]:
    before, after = first.source_perplexity, first.perplexity
    note = f"was {before:.2f} ({after / before - 1:+.1%})" if before else first.dataset
    shown = [Tile("perplexity", f"{after:.2f}", note)]
    return shown if first.kl is None else [*shown, Tile("KL from the source", f"{first.kl:.4f}", "nats per token")]


def calibration_tile(calibration: Calibration) -> Tile:
    blocks, length = calibration.blocks
    return Tile("calibrated on", f"{calibration.tokens:,}", f"tokens in {blocks} blocks of {length}")


def changes(solution: Solution, served: Serving | None) -> list[Comparison]:
    """Return the rows of the before/after table."""
    labels = {
        "qk": "query and key head size",
        "ov": "value head size",
        "mlp": "MLP width",
        "parameters": "parameters",
        "bytes": "bytes",
        "kv_bytes_per_token": "KV cache, bytes per token",
        "prefill_flops_per_token": f"FLOPs per token, prompt of {solution.prefill_flops_per_token.seq_len:,}",
    }
    rows = compare(solution, labels, {"bytes": human_bytes, "prefill_flops_per_token": human})
    return rows + (served.rows() if served else [])


def size_map(layers: list[LayerState]) -> list[tuple[int, list[SizeCell]]]:
    """Return each layer's index and sizes."""
    return [(each.layer, [size_cell(each, component) for component in COMPONENTS]) for each in layers]


def size_cell(layer: LayerState, component: Component) -> SizeCell:
    part = layer.part(component)
    assert part.size is not None  # only for layers of a solution
    return SizeCell(component, part.size, part.size / part.full_size)


def rope(solution: Solution) -> Json:
    pairs = solution.full_size.qk // 2
    return {"pairs": pairs, "rows": charts.slot_rows(solution.rope_slots, pairs) if solution.rope_slots else []}


def score_error(solution: Solution) -> charts.Chart | None:
    """Return the chart of score errors, or None if no head lost a dimension."""
    mean = solution.predicted_score_error
    if not any(mean.relative):
        return None
    return charts.score_error(mean, [each.score_error for each in solution.per_layer])


def settings(found: Inspection) -> list[tuple[str, Json]]:
    """Return titled groups of settings."""
    request = found.calibration.request
    calibrating = {
        **recorded_settings(request.text),
        "batch_size": request.batch_size,
        "mlp_stats": request.mlp_stats,
        "device": request.device,
        "dtype": request.dtype,
    }
    if request.mixture:
        calibrating["mixture"] = describe_texts(found.calibration, quoted=str)
    groups = [("calibrate", calibrating)]
    if found.solution:
        groups.append(("solve", recorded_settings(found.solution.request.settings)))
    if found.export:
        groups.append(("export", {"dtype": found.export.dtype}))
    return groups


def commands(found: Inspection) -> list[str]:
    source, calibration = found.source, found.calibration
    base = public_name(str(source.model), source.revision)
    calls = calibrate_commands(base, source.revision, calibration.request, calibration.made_with)
    if found.solution:
        calls.append(solve_command(found.solution.request.settings))
    if found.export:
        calls.append(export_command(found.export.dtype, found.export.max_shard_size, found.export.as_type))
    return calls


def hashes(found: Inspection) -> list[tuple[str, str]]:
    """Return the hashes that link the stages."""
    calibration, source = found.calibration, found.calibration.request.source
    rows = [("source config.json", source.config)]
    rows += [(f"source {name} (sampled)", value) for name, value in sorted(source.shards.items())]
    rows += [(f"source {name} (in full)", value) for name, value in sorted((source.in_full or {}).items())]
    rows += [(f"source {name}", value) for name, value in sorted(calibration.request.tokenizer.items())]
    rows += [("calibration tokens", calibration.tokens_hash), ("calibration", calibration.sha256)]
    return rows + ([("solution", found.solution.sha256)] if found.solution else [])
