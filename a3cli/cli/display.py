"""Print what each command returns: tables and sentences on stdout, warnings as log lines."""

from typing import Any

from rich.table import Table
from rich.text import Text

from a3cli.cli.console import log, print_line, print_sentence
from a3cli.cli.tables import print_table
from a3cli.report.long_range import solution_warnings
from a3cli.settings import LOSSES
from a3cli.settings.gates import describe
from a3cli.work.escape import printable

Json = dict[str, Any]


def print_calibration(manifest: Json) -> None:
    blocks, length = manifest["blocks"]
    print_sentence(
        f"calibrated {len(manifest['layers'])} layers on {manifest['tokens']:,} tokens ({blocks} blocks of {length})"
    )


def print_solution(manifest: Json) -> None:
    from a3cli.report.card import spread

    table = Table("", "before", "after", "after / before")
    for column in table.columns[1:]:
        column.justify = "right"
    for key, label in {"qk": "head size of QK", "ov": "head size of OV", "mlp": "MLP width"}.items():
        before, after = manifest["full_size"][key], [sizes[key] for sizes in manifest["sizes"]]
        table.add_row(label, f"{before:,}", spread(after), f"{sum(after) / len(after) / before:.3f}")
    names = {
        "parameters": "parameters",
        "bytes": "bytes",
        "kv_bytes_per_token": "KV cache, bytes per token",
        "prefill_flops_per_token": f"prefill FLOPs per token at {manifest['prefill_flops_per_token']['seq_len']}",
    }
    for key, label in names.items():
        before, after = manifest[key]["before"], manifest[key]["after"]
        table.add_row(label, f"{before:,}", f"{after:,}", f"{after / before:.3f}")
    print_table(table)
    asked = manifest["budget_asked"]
    print_sentence(
        f"removed {100 * manifest['budget_reached']:.2f} % of the decoder's linear weights"
        + ("" if asked is None else f" (asked: {100 * asked:g} %)")
    )
    losses = ", ".join(f"{name} {value:.4g}" for name, value in manifest["predicted_loss"].items())
    unit = LOSSES[manifest["request"]["settings"]["sensitivity"]]
    print_sentence(f"predicted loss, {unit}, summed over layers: {losses}")
    _print_context(manifest)
    for warning in solution_warnings(manifest):
        log.warning("warning: %s", warning)


def print_pareto(result: Json) -> None:
    measured = any("measured" in point for point in result["points"])
    columns = ("asked", "removed", "QK", "OV", "MLP", "KV bytes", "predicted loss")
    table = Table("variant", *columns, *(("perplexity", "KL", "top-1") if measured else ()))
    for column in table.columns[1:]:
        column.justify = "right"
    for point in result["points"]:
        asked = f"{100 * point['budget_asked']:g} %"
        if "error" in point:
            table.add_row(point["variant"], asked, "not reached")
            continue
        sizes = (f"{point['mean_sizes'][name]:.4g}" for name in ("qk", "ov", "mlp"))
        figures = [f"{100 * point['budget_reached']:.2f} %", *sizes, f"{point['kv_bytes_per_token']['after']:,}"]
        figures.append(f"{point['predicted_loss']:.4g}")
        if "measured" in point:
            found = point["measured"]
            figures += [f"{found['perplexity']:.4g}", f"{found['kl']:.4f}", f"{100 * found['top1_agreement']:.1f} %"]
        table.add_row(point["variant"], asked, *figures)
    print_table(table)


def print_plan(result: Json) -> None:
    table = Table("", "before", "after", "after / before")
    for column in table.columns[1:]:
        column.justify = "right"
    names = {
        "head_size": "head size",
        "mlp_width": "MLP width",
        "parameters": "parameters",
        "bytes": "bytes",
        "kv_bytes_per_token": "KV cache, bytes per token",
        "prefill_flops_per_token": f"prefill FLOPs per token at {result['prefill_flops_per_token']['seq_len']}",
    }
    for key, label in names.items():
        before, after = result[key]["before"], result[key]["after"]
        table.add_row(label, f"{before:,}", f"{after:,}", f"{after / before:.3f}")
    print_table(table)
    means = (
        "are means: each layer will have its own" if result["shape"] == "per-layer" else "are the same in all layers"
    )
    print_sentence(
        f"removes {100 * result['budget_reached']:.2f} % of the decoder's linear weights, attention and MLP alike; "
        f"sizes {means}. a3 calibrate measures how to share the budget better."
    )
    needs = Table("", "disk", "memory", "time")
    for column in needs.columns[1:]:
        column.justify = "right"
    disk, ram = result["disk_bytes"], result["peak_ram_bytes"]
    for stage, spent in result["seconds"].items():
        written = {
            "calibrate": disk["statistics"] + disk["hidden_states"],
            "solve --method paper": disk["solution_paper"],
            "solve --method best --sequential": disk["solution_sequential"],
            "export": disk["export"],
        }
        needs.add_row(stage, size(written.get(stage, disk["solution"])), size(ram[stage]), duration(spent))
    print_table(needs)
    device, machine = result["device_memory_bytes"], result["machine"]
    least = "at least " if machine["batch_size_is"] == "the least" else ""  # auto takes more where memory is free
    print_sentence(
        f"statistics {size(disk['statistics_per_layer'])} per layer, hidden states {size(disk['hidden_states'])} while "
        f"calibrating; {machine['devices']} at its peak {least}{size(device['total'])} (layer {size(device['layer'])}, "
        f"batch {size(device['batch'])}, statistics {size(device['moments'])})"
    )
    rates = machine["rates_are"]
    print_sentence(
        f"time with {machine['start_seconds']:.3g} s to start a stage ({rates['start']}), at "
        f"{machine['disk_gbps']:.3g} GB/s of disk ({rates['disk']}), {machine['tflops']:.3g} TFLOP/s in "
        f"{machine['calibration_dtype']} ({rates['compute']}) and {machine['solve_tflops']:.3g} in float64 "
        f"({rates['solve']})"
    )
    checked, reason = result["weights"]["checked"], printable(result["weights"]["reason"] or "")
    what = {
        "tensors": "the weights' names, shapes and dtypes were checked",
        "names": f"only the weights' names were checked: {reason}",
        "nothing": f"the weights were not checked: {reason}",
    }
    print_sentence(what[checked])
    _print_runtimes(result["runtimes"])


def print_run(results: Json, out: str) -> None:
    print_calibration(results["calibrate"])
    print_solution(results["solve"])
    if "eval" in results:
        print_evaluation(results["eval"])
    if "verify" in results:
        print_verification(results["verify"])
    print_export(results["export"], out)


def size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def duration(spent: float) -> str:
    return f"{spent:.0f} s" if spent < 120 else f"{spent / 60:.0f} min" if spent < 7200 else f"{spent / 3600:.1f} h"


def print_export(manifest: Json, out: str) -> None:
    size = sum(1 for name in manifest["files"] if name.endswith(".safetensors"))
    print_sentence(f"wrote {size} weight file{'s' if size > 1 else ''}")
    _print_runtimes(manifest["runtimes"])
    _print_context(manifest["solution"])
    print_line(printable(out))


def _print_runtimes(verdicts: list[Json]) -> None:
    table = Table("runtime", "loads it", "note")
    for each in verdicts:
        table.add_row(each["runtime"], each["loads"], each["note"])
    print_table(table)


def _print_context(solution: Json) -> None:
    from a3cli.report.card import describe_context

    if said := describe_context(solution):
        print_sentence(said)


def print_evaluation(result: Json) -> None:
    datasets = result["datasets"]
    if datasets:
        table = Table("measure", *(printable(each["dataset"]) for each in datasets))
        for column in table.columns[1:]:
            column.justify = "right"
        for key in (key for key, value in datasets[0].items() if isinstance(value, (int, float))):
            table.add_row(key.replace("_", " "), *(_figure(each, key) for each in datasets))
        print_table(table)
    for each in datasets:
        for gate in each.get("gates", []):
            print_line(f"{'FAILED' if gate['failed'] else 'passed'}  {printable(each['dataset'])}: {describe(gate)}")
    if "tasks" in result:
        _print_tasks(result["tasks"])


def print_verification(result: Json) -> None:
    table = Table("check", "outcome", "detail")
    for check in result["checks"]:
        outcome = "FAILED" if check["outcome"] == "failed" else check["outcome"]
        table.add_row(check["name"], outcome, printable(check["detail"]))
    print_table(table)


def _figure(measured: Json, key: str) -> str:
    """A figure with its interval."""
    value, interval = measured[key], measured.get("confidence", {}).get(key)
    plain = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
    return plain if interval is None else f"{plain} ({interval[0]:,.4f} to {interval[1]:,.4f})"


def _print_tasks(tasks: Json) -> None:
    table = Table("task", "figure", *tasks)
    for column in table.columns[2:]:
        column.justify = "right"
    for task, figures in tasks["model"].items():
        for key in figures:
            values = (tasks[which][task].get(key) for which in tasks)
            figures_of_key = (f"{v:.4f}" if isinstance(v, float) else str(v) for v in values)
            table.add_row(printable(task), printable(key), *figures_of_key)
    print_table(table)


def print_inspection(found: Json) -> None:
    """Stage and source, a table of all layers, the calibration text, and what may hurt."""
    from a3cli.report.card import describe_texts

    calibration, solution = found["calibration"], found["solution"]
    blocks, length = calibration["blocks"]
    print_line(f"{printable(found['path'])}: {found['stage']}, from {printable(str(found['source']['model']))}")
    done = f"; {len(found['layers'])} layers are done" if found["stage"] == "calibrating" else ""
    print_sentence(f"calibrated on {calibration['tokens']:,} tokens ({blocks} blocks of {length}){done}")
    print_sentence(f"text: {printable(describe_texts(calibration, quoted=str))}")
    if solution:
        removed = f"{100 * solution['budget_reached']:.2f} % of the decoder's linear weights"
        settings = solution["request"]["settings"]
        print_sentence(f"solved with --method {settings['method']} --shape {solution['shape']}: {removed} removed")
    if found["layers"]:
        print_table(_layers_table(found["layers"]))
    if found["text"]:
        print_table(_text_table(found["text"]))
    for warning in found["warnings"]:
        print_sentence(Text.assemble(("warning:", "yellow"), " ", printable(warning)))
    if not found["warnings"]:
        print_sentence("no warnings")


def print_report(result: Json) -> None:
    for warning in result["warnings"]:
        log.warning("warning: %s", warning)
    print_line(printable(result["html"]))


def _layers_table(layers: list[Json]) -> Table:
    columns = (
        "size",
        "predicted loss",
        "energy kept",
        "effective rank",
        "condition",
        "tokens per dim",
        "damping",
        "MB",
    )
    table = Table("layer", "", *columns)
    for column in table.columns[2:]:
        column.justify = "right"
    for each in layers:
        for component in ("qk", "ov", "mlp"):
            found = each[component]
            after = found["bytes"]["after"] or found["bytes"]["before"]
            table.add_row(
                str(each["layer"]) if component == "qk" else "",
                component.upper(),
                f"{found['full_size']:,}" if found["size"] is None else f"{found['size']:,} of {found['full_size']:,}",
                _or_dash(found["predicted_loss"], ".3g"),
                _or_dash(found["energy_kept"], ".2%"),
                _or_dash(found["effective_rank"], ".1f"),
                "singular" if found["singular"] or found["floored"] else _or_dash(found["condition"], ".1e"),
                f"{found['tokens_per_dimension']:,.1f}",
                _or_dash(found["damping"], ".0e"),
                _or_dash(None if after is None else after / 1e6, ",.2f"),
                end_section=component == "mlp",
            )
    return table


def _text_table(text: Json) -> Table:
    table = Table("calibration text", "")
    table.add_row("distinct tokens", f"{text['distinct_tokens']:,}")
    if "vocabulary" in text:
        table.add_row("share of the vocabulary", f"{text['share_of_vocabulary']:.1%} of {text['vocabulary']:,}")
        table.add_row("bytes per token", f"{text['bytes_per_token']:.2f}")
        table.add_row("characters", ", ".join(f"{share:.0%} {kind}" for kind, share in text["characters"].items()))
    table.add_row(f"repeated {text['ngram']}-grams", f"{text['repeated_ngrams']:.1%}")
    table.add_row("blocks that repeat another", str(len({each["block"] for each in text["overlapping_blocks"]})))
    tokens = (f"{printable(repr(t.get('text', t['token'])))} {t['share']:.1%}" for t in text["most_frequent"])
    table.add_row("most frequent tokens", ", ".join(tokens))
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
