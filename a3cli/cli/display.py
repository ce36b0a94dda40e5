"""Print what each command returns: tables and sentences on stdout, warnings as log lines."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a3cli.cli.console import log, print_line, print_sentence
from a3cli.cli.tables import new_table, print_table
from a3cli.report.figures import (
    TITLES,
    Comparison,
    asked,
    compare,
    compare_one,
    describe_budgets,
    describe_loss,
    human,
    human_bytes,
    percent,
)
from a3cli.report.names import describe_context, public_dataset
from a3cli.report.serving import Serving, serving_of
from a3cli.runtimes import NO
from a3cli.settings import COMPONENTS, Component
from a3cli.settings.gates import describe
from a3cli.work.escape import printable

if TYPE_CHECKING:
    from a3cli.report.page import Report
    from a3cli.stages.publish import Exported
    from a3cli.work.manifests import CalibrationManifest, Solution

Json = dict[str, Any]


IN_UNITS = {"bytes": human_bytes, "prefill_flops_per_token": human}


def print_calibration(manifest: "CalibrationManifest") -> None:
    blocks, length = manifest.blocks
    print_sentence(
        f"calibrated {len(manifest.layers)} layers on {manifest.tokens:,} tokens ({blocks} blocks of {length})"
    )


def print_solution(solution: "Solution", warnings: Sequence[str], memory: int | None = None) -> None:
    """Print sizes and costs before and after, also of serving in `memory`, predicted losses and warnings."""
    served = serving_of(solution, memory)
    labels = {
        "qk": "head size of QK",
        "ov": "head size of OV",
        "mlp": "MLP width",
        "parameters": "parameters",
        "bytes": "size of the weights",
        "kv_bytes_per_token": "KV cache, bytes per token",
        "prefill_flops_per_token": f"prefill FLOPs per token at {solution.prefill_flops_per_token.seq_len:,}",
    }
    _print_comparisons([*compare(solution, labels, IN_UNITS), *(served.rows() if served else [])])
    _print_context(solution)
    print_sentence(_describe_removed(solution))
    if solution.measured_loss is not None:
        print_sentence(describe_loss(solution.measured_loss))
    warn(warnings)


def solution_json(solution: "Solution", warnings: Sequence[str], memory: int | None) -> Json:
    """Return what `print_solution` prints as JSON has it, with all that the manifest records."""
    served = serving_of(solution, memory)
    return {**solution.plain(), **(served.plain() if served else {}), "warnings": warnings}


def warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        log.warning("%s", warning)


def _describe_removed(solution: "Solution") -> str:
    settings, weights, disk = solution.request.settings, solution.parameters, solution.bytes
    removed = f"{percent(solution.budget_reached, 2)} of the decoder's linear weights"
    if settings.kv_budget is not None:
        kv = solution.kv_bytes_per_token
        removed = f"{percent(1 - kv.after / kv.before, 2)} of the KV cache and {removed}"
    return (
        f"removed {removed} (asked: {describe_budgets(settings)}): {human(weights.before)} parameters become "
        f"{human(weights.after)}, {human_bytes(disk.before)} become {human_bytes(disk.after)}"
    )


def _print_comparisons(rows: Iterable[Comparison]) -> None:
    table = new_table("", figures=("before", "after", "after / before"))
    for each in rows:
        table.add_row(each.label, each.before, each.after, "–" if each.share is None else f"{each.share:.3f}")
    print_table(table)


def print_pareto(result: Json) -> None:
    points = result["points"]
    measured = any("measured" in point for point in points)
    columns = ("asked", "removed", *TITLES.values(), "KV bytes", "predicted loss")
    table = new_table("variant", figures=(*columns, *(("perplexity", "KL", "top-1") if measured else ())))
    for point in points:
        figures = ("not reached",) if "error" in point else _point_figures(**point)
        table.add_row(point["variant"], asked(point["budget_asked"]), *figures)
    print_table(table)


def _point_figures(
    *,
    budget_reached: float,
    mean_sizes: dict[str, float],
    kv_bytes_per_token: dict[str, int],
    predicted_loss: float,
    measured: dict[str, float] | None = None,
    **_others: Any,
) -> list[str]:
    """Return the figures of a point that was reached."""
    sizes = (f"{mean_sizes[component]:.4g}" for component in COMPONENTS)
    figures = [percent(budget_reached, 2), *sizes, f"{kv_bytes_per_token['after']:,}", f"{predicted_loss:.4g}"]
    if measured is None:
        return figures
    top1 = percent(measured["top1_agreement"], 1)
    return [*figures, f"{measured['perplexity']:.4g}", f"{measured['kl']:.4f}", top1]


def print_plan(result: Json) -> None:
    heads = {"head_size": "head size"}
    if result["head_size"] != result["value_head_size"]:
        heads = {"head_size": "head size of QK", "value_head_size": "head size of OV"}
    labels = {
        **heads,
        "mlp_width": "MLP width",
        "parameters": "parameters",
        "bytes": "size of the weights",
        "kv_bytes_per_token": "KV cache, bytes per token",
        "prefill_flops_per_token": f"prefill FLOPs per token at {result['prefill_flops_per_token']['seq_len']:,}",
    }
    changes = ((label, result[key], IN_UNITS.get(key)) for key, label in labels.items())
    costs = [compare_one(label, each["before"], [each["after"]], show) for label, each, show in changes]
    _print_comparisons([*costs, *_planned_serving(result).rows()])
    own = result["shape"] == "per-layer"
    only_one = len(result["components"]) == 1 and not own
    means = "are means: each layer will have its own" if own else "are the same in all layers"
    print_sentence(
        f"removes {percent(result['budget_reached'], 2)} of the decoder's linear weights (asked: {result['asked']}), "
        f"{_describe_parts(**result)}; "
        f"sizes {means}.{'' if only_one else ' a3 calibrate measures how to share the budget better.'}"
    )
    _print_stages(result["seconds"], result["peak_ram_bytes"], **result["disk_bytes"])
    statistics, hidden = result["disk_bytes"]["statistics_per_layer"], result["disk_bytes"]["hidden_states"]
    print_sentence(
        f"statistics {size(statistics)} per layer, hidden states {size(hidden)} while calibrating; "
        + _describe_memory(result["machine"], **result["device_memory_bytes"])
    )
    print_sentence(_describe_rates(result["machine"]))
    print_sentence(_describe_weights(**result["weights"]))
    _print_runtimes(result["runtimes"])
    warn(result["warnings"])


def _planned_serving(result: Json) -> Serving:
    cache, weights, memory = result["kv_cache"], result["bytes"], result.get("sequences", {}).get("memory")
    both = [(each["before"], each["after"]) for each in (cache, weights)]
    return Serving(cache["tokens"], both[0], both[1], memory)


def _describe_parts(
    components: Sequence[Component], whole_heads: str | None, mlp_width: dict[str, int], **_others: Any
) -> str:
    """Return what a plan cuts, and why it leaves the rest."""
    parts = {"qk,ov,mlp": "attention and MLP alike", "ov,mlp": "value heads and MLP alike", "mlp": "from the MLP alone"}
    said = parts.get(",".join(components), " and ".join(TITLES[component] for component in components))
    if "ov" in components and mlp_width["before"] == mlp_width["after"]:
        said = "all of them from " + ("attention" if "qk" in components else "value heads")
    return f"{said}: {whole_heads}" if whole_heads else said


def _print_stages(
    seconds: dict[str, float], memory: dict[str, int], *, solution: int, gradients: int, **disk: int
) -> None:
    """Print what each stage needs; the others are bytes in the work folder and of the export."""
    written = {
        "calibrate": disk["statistics"] + disk["hidden_states"],
        "solve --method paper": max(gradients, disk["solution_paper"]),
        "solve --method best": max(gradients, solution),
        "solve --method best --sequential": max(gradients, disk["solution_sequential"]),
        "export": disk["export"],
    }
    table = new_table("", figures=("disk", "memory", "time"))
    for stage, spent in seconds.items():
        table.add_row(stage, size(written[stage]), size(memory[stage]), duration(spent))
    print_table(table)


def _describe_memory(machine: Json, *, total: int, layer: int, batch: int, moments: int) -> str:
    least = "at least " if machine["batch_size_is"] == "the least" else ""  # auto takes more where memory is free
    return (
        f"{machine['devices']} at its peak {least}{size(total)} (layer {size(layer)}, batch {size(batch)}, "
        f"statistics {size(moments)})"
    )


def _describe_rates(machine: Json) -> str:
    origin = machine["rates_are"]
    return (
        f"time with {machine['start_seconds']:.3g} s to start a stage ({origin['start']}), at "
        f"{machine['disk_gbps']:.3g} GB/s of disk ({origin['disk']}), {machine['tflops']:.3g} TFLOP/s in "
        f"{machine['calibration_dtype']} ({origin['compute']}) and {machine['solve_tflops']:.3g} in float64 "
        f"({origin['solve']})"
    )


def _describe_weights(checked: str, reason: str | None) -> str:
    why = printable(reason or "")
    return {
        "tensors": "the weights' names, shapes and dtypes were checked",
        "names": f"only the weights' names were checked: {why}",
        "nothing": f"the weights were not checked: {why}",
    }[checked]


def size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def duration(spent: float) -> str:
    return f"{spent:.0f} s" if spent < 120 else f"{spent / 60:.0f} min" if spent < 7200 else f"{spent / 3600:.1f} h"


def print_export(exported: "Exported", out: str) -> None:
    manifest = exported.manifest
    files = [Path(out) / name for name in manifest.files if name.endswith(".safetensors")]
    written = human_bytes(sum(file.stat().st_size for file in files))
    print_sentence(
        f"wrote {len(files)} weight file{'s' if len(files) > 1 else ''}, {written} "
        f"(the source's weights: {human_bytes(manifest.solution.bytes.before)})"
    )
    _print_runtimes([each.plain() for each in manifest.runtimes])
    _print_context(manifest.solution)
    print_line(printable(out))
    if exported.pushed:
        visible = "private" if exported.pushed.private else "public"
        print_line(f"uploaded, {visible}: {printable(exported.pushed.url)}")


def _print_runtimes(verdicts: list[Json]) -> None:
    table = new_table("runtime", "loads it", "note")
    for each in verdicts:
        table.add_row(each["runtime"], each["loads"], each["note"])
    print_table(table)
    refusing = [each["runtime"] for each in verdicts if each["loads"] == NO]
    warn([f"not loaded by {', '.join(refusing)}: see the table's notes"] if refusing else [])


def _print_context(solution: "Solution") -> None:
    if said := describe_context(solution):
        print_sentence(said)


# A row of the table of an evaluation: its title and the format of its figures.
MEASURES = {
    "perplexity": ("perplexity", ",.2f"),
    "source_perplexity": ("perplexity of the source", ",.2f"),
    "perplexity_increase": ("perplexity increase", "+,.2f"),
    "perplexity_increase_percent": ("perplexity increase, %", "+,.1f"),
    "kl": ("KL divergence, nats per token", ".4f"),
    "top1_agreement": ("same most likely token", ".1%"),
    "continuation_accuracy": ("true continuation of four", ".1%"),
    "source_continuation_accuracy": ("the same of the source", ".1%"),
    "last_word_accuracy": ("last word guessed", ".1%"),
    "source_last_word_accuracy": ("the same of the source", ".1%"),
    "passages": ("passages", ","),
    "blocks": ("blocks", ","),
    "seq_len": ("tokens per block", ","),
    "predicted_tokens": ("predicted tokens", ","),
    "tokens_per_second": ("tokens per second", ",.0f"),
}


def print_evaluation(result: Json) -> None:
    datasets = result["datasets"]
    names = _names_of([each["dataset"] for each in datasets])
    if datasets:
        table = new_table("measure", figures=names)
        for key, (title, form) in MEASURES.items():
            if key in datasets[0]:
                table.add_row(title, *(_figure(each, key, form) for each in datasets))
        print_table(table)
    for name, each in zip(names, datasets, strict=True):
        for gate in each.get("gates", []):
            print_line(f"{'FAILED' if gate['failed'] else 'passed'}  {name}: {describe(gate)}")
    if "tasks" in result:
        _print_tasks(result["tasks"])


def print_generation(result: Json) -> None:
    """Print each prompt with its continuations in one row; line ends and other control characters as escapes."""
    roles = [role for role in ("model", "against") if role in result]
    names = [printable(result[role]) for role in roles]
    table = new_table("prompt", *names, figures=("same tokens",) if len(roles) > 1 else ())
    for each in result["prompts"]:
        same = [f"{each['same_tokens']:,} of {len(each['model']['tokens']):,}"] if len(roles) > 1 else []
        texts = (each["prompt"], *(each[role]["text"] for role in roles))
        table.add_row(*map(printable, texts), *same, end_section=True)
    print_table(table)


def print_verification(result: Json) -> None:
    table = new_table("check", "outcome", "detail")
    for check in result["checks"]:
        outcome = "FAILED" if check["outcome"] == "failed" else check["outcome"]
        table.add_row(check["name"], outcome, printable(check["detail"]))
    print_table(table)


def _names_of(datasets: list[str]) -> list[str]:
    """Return the data sets' names; two files of one name keep their paths."""
    names = [public_dataset(each) for each in datasets]
    return [printable(name if names.count(name) == 1 else each) for name, each in zip(names, datasets, strict=True)]


def _figure(measured: Json, key: str, form: str) -> str:
    """Return a figure with its interval."""
    value, interval = measured[key], measured.get("confidence", {}).get(key)
    plain = format(value, form)
    return plain if interval is None else f"{plain} ({format(interval[0], form)} to {format(interval[1], form)})"


def _print_tasks(tasks: Json) -> None:
    table = new_table("task", "figure", figures=tasks)
    for task, figures in tasks["model"].items():
        for key in figures:
            values = (tasks[which][task].get(key) for which in tasks)
            figures_of_key = (f"{v:.4f}" if isinstance(v, float) else str(v) for v in values)
            table.add_row(printable(task), printable(key), *figures_of_key)
    print_table(table)


def print_report(report: "Report") -> None:
    warn(report.warnings)
    print_line(printable(str(report.html)))
