"""Write one self-contained HTML page with the results of `inspection.describe` and figures of `a3 eval`.

The template requests nothing from the network, and its content policy forbids it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from a3cli.errors import A3Error
from a3cli.report import charts
from a3cli.report.card import calibrate_commands, export_command, public_name, solve_command, spread
from a3cli.report.measured import as_recorded, read_evaluation
from a3cli.runtimes import Verdict, summarise
from a3cli.settings import COMPONENTS, LOSSES
from a3cli.work.escape import printable
from a3cli.work.files import Json, replacing

TITLES = {"qk": "QK", "ov": "OV", "mlp": "MLP"}


def check_place(html: Path | None) -> Path:
    """Check that the page can be written, before any work starts. Raises A3Error."""
    if html is None:
        raise A3Error("no file to write: give --html FILE")
    if html.is_dir() or not html.parent.is_dir():
        raise A3Error(f"--html {html}: {'is a folder' if html.is_dir() else f'there is no folder {html.parent}'}")
    return html


def read_evaluations(files: Sequence[Path]) -> list[Json]:
    return as_recorded([each for file in files for each in read_evaluation(file)])


def write_report(found: Json, measured: list[Json], html: Path) -> Json:
    """Write the page, with known figures if none are given; return its path and its content."""
    measured = measured or found["measured"]
    page = render(found, measured)
    with replacing(html) as partial:
        partial.write_text(page, "utf-8")
    return {"html": str(html), "warnings": found["warnings"], "measured": measured}


def render(found: Json, measured: list[Json]) -> str:
    environment = Environment(
        loader=PackageLoader("a3cli.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_finalize,
    )
    return environment.get_template("report.html").render(**content(found, measured)) + "\n"


def _finalize(value: Any) -> Any:
    """Escape control characters of names; keep markup made by the template."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def content(found: Json, measured: list[Json]) -> Json:
    """Return the template's content, by section."""
    solution, calibration = found["solution"], found["calibration"]
    return {
        "name": public_name(found["source"]),
        "stage": found["stage"],
        "warnings": found["warnings"],
        "tiles": tiles(solution, measured, calibration),
        "changes": changes(solution) if solution else [],
        "measured": measured,
        "curves": [
            {"key": c, "title": TITLES[c], "chart": charts.error_curves(curve_inputs(found, c), c)} for c in COMPONENTS
        ]
        if solution
        else [],
        "loss": LOSSES[solution["request"]["settings"]["sensitivity"]] if solution else None,
        "map": size_map(found["layers"]) if solution else [],
        "rope": rope(solution) if solution else None,
        "score_error": score_error(solution) if solution else None,
        "context": solution["context"] if solution else None,
        "layers": found["layers"],
        "components": TITLES,
        "text": found["text"],
        "calibration": calibration,
        "settings": settings(found),
        "commands": commands(found),
        "hashes": hashes(found),
        "files": sorted((found["export"] or {}).get("files", {}).items()),
        "loads_with": describe_runtimes(found["export"]),
        "versions": found["versions"] or {},
    }


def describe_runtimes(export: Json | None) -> str | None:
    return summarise([Verdict(**each) for each in export["runtimes"]]) if export else None


def curve_inputs(found: Json, component: str) -> list[Json]:
    solved = found["solution"]
    return [
        {"curves": each["curves"], "size": sizes[component]}
        for each, sizes in zip(solved["per_layer"], solved["sizes"], strict=True)
    ]


def tiles(solution: Json | None, measured: list[Json], calibration: Json) -> list[Json]:
    """Return the main figures."""
    found = []
    if solution:
        kv = solution["kv_bytes_per_token"]
        asked = solution["budget_asked"]
        found = [
            tile(
                "decoder weights", f"−{solution['budget_reached']:.1%}", "" if asked is None else f"asked: {asked:.1%}"
            ),
            tile(
                "checkpoint", human_bytes(solution["bytes"]["after"]), f"was {human_bytes(solution['bytes']['before'])}"
            ),
            tile("KV cache", f"−{1 - kv['after'] / kv['before']:.1%}", f"{kv['after']:,} bytes per token"),
        ]
    if measured:
        first = measured[0]
        before = first["source_perplexity"]
        increase = f" ({first['perplexity'] / before - 1:+.1%})" if before else ""
        found.append(
            tile(
                "perplexity",
                f"{first['perplexity']:.2f}",
                f"was {before:.2f}{increase}" if before else first["dataset"],
            )
        )
        if first["kl"] is not None:
            found.append(tile("KL from the source", f"{first['kl']:.4f}", "nats per token"))
    if not solution:
        blocks, length = calibration["blocks"]
        found.append(tile("calibrated on", f"{calibration['tokens']:,}", f"tokens in {blocks} blocks of {length}"))
    return found


def tile(label: str, value: str, note: str) -> Json:
    return {"label": label, "value": value, "note": note}


def changes(solution: Json) -> list[Json]:
    """Return the rows of the before/after table; `share` is the remaining fraction, from 0 to 1."""
    names = {"qk": "query and key head size", "ov": "value head size", "mlp": "MLP width"}
    rows = []
    for key, label in names.items():
        before, after = solution["full_size"][key], [sizes[key] for sizes in solution["sizes"]]
        rows.append(change(label, f"{before:,}", spread(after), sum(after) / len(after) / before))
    for key, label, show in (
        ("parameters", "parameters", "{:,}".format),
        ("bytes", "bytes", human_bytes),
        ("kv_bytes_per_token", "KV cache, bytes per token", "{:,}".format),
        (
            "prefill_flops_per_token",
            f"FLOPs per token, prompt of {solution['prefill_flops_per_token']['seq_len']:,}",
            human,
        ),
    ):
        before, after_all = solution[key]["before"], solution[key]["after"]
        rows.append(change(label, show(before), show(after_all), after_all / before))
    return rows


def change(label: str, before: str, after: str, share: float) -> Json:
    return {"label": label, "before": before, "after": after, "share": share}


def size_map(layers: list[Json]) -> list[Json]:
    """Return each layer's sizes as numbers and shares."""
    return [
        {
            "layer": each["layer"],
            "cells": [
                {"key": c, "size": each[c]["size"], "share": each[c]["size"] / each[c]["full_size"]} for c in COMPONENTS
            ],
        }
        for each in layers
    ]


def rope(solution: Json) -> Json:
    pairs = solution["full_size"]["qk"] // 2
    slots = solution["rope_slots"]
    return {"pairs": pairs, "rows": charts.slot_rows(slots, pairs) if slots else []}


def score_error(solution: Json) -> Json | None:
    """Return the chart of score errors, or None if no head lost a dimension."""
    mean = solution["predicted_score_error"]
    if not any(mean["relative"]):
        return None
    return charts.score_error(mean, [each["score_error"] for each in solution["per_layer"]])


def settings(found: Json) -> list[tuple[str, Json]]:
    """Return titled groups of settings."""
    request = found["calibration"]["request"]
    kept = {key: request[key] for key in ("batch_size", "mlp_stats", "device", "dtype")}
    groups = [("calibrate", {**request["text"], **kept})]
    if found["solution"]:
        groups.append(("solve", found["solution"]["request"]["settings"]))
    if found["export"]:
        groups.append(("export", {"dtype": found["export"]["dtype"]}))
    return groups


def commands(found: Json) -> list[str]:
    source = found["source"]
    calls = calibrate_commands(public_name(source), source["revision"], found["calibration"])
    if found["solution"]:
        calls.append(solve_command(found["solution"]["request"]["settings"]))
    if found["export"]:
        calls.append(export_command(found["export"]))
    return calls


def hashes(found: Json) -> list[tuple[str, str]]:
    """Return the hashes that link the stages."""
    fingerprint = found["calibration"]["request"]["source"]
    rows = [("source config.json", fingerprint["config.json"])]
    rows += [(f"source {name} (sampled)", value) for name, value in sorted(fingerprint["shards"].items())]
    rows += [(f"source {name} (in full)", value) for name, value in sorted((fingerprint.get("in_full") or {}).items())]
    rows += [(f"source {name}", value) for name, value in sorted(found["calibration"]["request"]["tokenizer"].items())]
    rows += [
        ("calibration tokens", found["calibration"]["tokens_hash"]),
        ("calibration", found["calibration"]["sha256"]),
    ]
    return rows + ([("solution", found["solution"]["sha256"])] if found["solution"] else [])


def human_bytes(count: float) -> str:
    return human(count) + "B"


def human(count: float) -> str:
    """Format a count with three digits and a unit: `1.23 G`."""
    units = ["", "k", "M", "G", "T", "P"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"
