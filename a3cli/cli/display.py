"""What a person sees: progress on stderr, results on stdout. The only importer of `rich` beside the CLI."""

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from a3cli.report.long_range import solution_warnings
from a3cli.settings import LOSSES
from a3cli.settings.gates import describe
from a3cli.work.escape import printable

Json = dict[str, Any]
log = logging.getLogger("a3cli")
LINE_EVERY = 10.0  # seconds between log lines within a layer, off a terminal
LOG_WIDTH = 160  # columns of a table off a terminal; more where a word is longer
LONG_HEADING = 30  # columns of a word in a heading; a longer one is listed below a table that does not fit


def set_up_logging(*, quiet: bool = False) -> None:
    """Our own log lines on stderr: plain when it is no terminal, warnings only when quiet."""
    stderr = _console(stderr=True, soft_wrap=False)
    handler = TerminalHandler(stderr) if stderr.is_terminal else logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.propagate = False


class TerminalHandler(logging.Handler):
    """Print log lines above the progress bar, if its console draws one."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        _print_wrapped(self.console, self.format(record))


class PrintableFormatter(logging.Formatter):
    """Whatever control characters a file name in a message may carry."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, the library's name
        return printable(super().formatMessage(record))


class SweepProgress:
    """A bar with layer, tokens/s and time left on a terminal; a line a layer elsewhere."""

    def __init__(self, bar: Progress | None) -> None:
        self.bar = bar
        self.task: Any = None
        self.first: int | None = None
        self.started = self.last_line = time.monotonic()

    def __call__(self, *, layer: int, layers: int, tokens: int, total_tokens: int) -> None:
        if self.first is None:
            self.first = layer
            self.started = time.monotonic()
        done = layer * total_tokens + tokens
        # The first batch has just ended when the clock starts, so it does not count for the speed.
        rate = (done - self.first * total_tokens) / max(time.monotonic() - self.started, 1e-3)
        if self.bar is not None:
            self._draw(f"layer {layer + 1} of {layers}", f"{rate:,.0f} tokens/s", done, layers * total_tokens)
        elif tokens == total_tokens or time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            left = (layers * total_tokens - done) / rate
            log.info("layer %d of %d: %d/%d tokens, %s left", layer + 1, layers, tokens, total_tokens, f"{left:,.0f} s")

    def _draw(self, layer: str, speed: str, done: int, total: int) -> None:
        """Update the bar. It starts here: a sweep that has nothing to do draws nothing."""
        assert self.bar is not None
        if self.task is None:
            self.task = self.bar.add_task(layer, total=total, speed=speed)
            self.bar.start()
        self.bar.update(self.task, completed=done, description=layer, speed=speed)


@contextmanager
def sweep_progress(*, quiet: bool) -> Iterator[SweepProgress]:
    """Progress for one sweep, on stderr."""
    console = _log_console()
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield SweepProgress(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console)
    try:
        yield SweepProgress(bar)
    finally:
        bar.stop()


def _log_console() -> Console:
    """Return the console of the log lines: one console must print them and draw the bar below them."""
    handlers = (handler for handler in log.handlers if isinstance(handler, TerminalHandler))
    return next((handler.console for handler in handlers), _console(stderr=True, soft_wrap=False))


def print_error(message: str) -> None:
    """One line on stderr, whatever control characters a file name may carry."""
    line = printable(" ".join(message.split()))
    _console(stderr=True).print(Text.assemble(("error:", "bold red"), " ", line))


def print_json(value: Json) -> None:
    """On stdout. A figure that is no finite number is null: JSON has neither NaN nor Infinity."""
    sys.stdout.write(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_calibration(manifest: Json) -> None:
    blocks, length = manifest["blocks"]
    _say(f"calibrated {len(manifest['layers'])} layers on {manifest['tokens']:,} tokens ({blocks} blocks of {length})")


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
    _print_table(table)
    asked = manifest["budget_asked"]
    _say(
        f"removed {100 * manifest['budget_reached']:.2f} % of the decoder's linear weights"
        + ("" if asked is None else f" (asked: {100 * asked:g} %)")
    )
    losses = ", ".join(f"{name} {value:.4g}" for name, value in manifest["predicted_loss"].items())
    unit = LOSSES[manifest["request"]["settings"]["sensitivity"]]
    _say(f"predicted loss, {unit}, summed over layers: {losses}")
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
    _print_table(table)


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
    _print_table(table)
    means = (
        "are means: each layer will have its own" if result["shape"] == "per-layer" else "are the same in all layers"
    )
    _say(
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
    _print_table(needs)
    device, machine = result["device_memory_bytes"], result["machine"]
    least = "at least " if machine["batch_size_is"] == "the least" else ""  # auto takes more where memory is free
    _say(
        f"statistics {size(disk['statistics_per_layer'])} per layer, hidden states {size(disk['hidden_states'])} while "
        f"calibrating; {machine['devices']} at its peak {least}{size(device['total'])} (layer {size(device['layer'])}, "
        f"batch {size(device['batch'])}, statistics {size(device['moments'])})"
    )
    rates = machine["rates_are"]
    _say(
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
    _say(what[checked])
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
    _say(f"wrote {size} weight file{'s' if size > 1 else ''}")
    _print_runtimes(manifest["runtimes"])
    _print_context(manifest["solution"])
    _print(printable(out))


def _print_runtimes(verdicts: list[Json]) -> None:
    table = Table("runtime", "loads it", "note")
    for each in verdicts:
        table.add_row(each["runtime"], each["loads"], each["note"])
    _print_table(table)


def _print_context(solution: Json) -> None:
    from a3cli.report.card import describe_context

    if said := describe_context(solution):
        _say(said)


def print_evaluation(result: Json) -> None:
    datasets = result["datasets"]
    if datasets:
        table = Table("measure", *(printable(each["dataset"]) for each in datasets))
        for column in table.columns[1:]:
            column.justify = "right"
        for key in (key for key, value in datasets[0].items() if isinstance(value, (int, float))):
            table.add_row(key.replace("_", " "), *(_figure(each, key) for each in datasets))
        _print_table(table)
    for each in datasets:
        for gate in each.get("gates", []):
            _print(f"{'FAILED' if gate['failed'] else 'passed'}  {printable(each['dataset'])}: {describe(gate)}")
    if "tasks" in result:
        _print_tasks(result["tasks"])


def print_verification(result: Json) -> None:
    table = Table("check", "outcome", "detail")
    for check in result["checks"]:
        outcome = "FAILED" if check["outcome"] == "failed" else check["outcome"]
        table.add_row(check["name"], outcome, printable(check["detail"]))
    _print_table(table)


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
    _print_table(table)


def print_inspection(found: Json) -> None:
    """Stage and source, a table of all layers, the calibration text, and what may hurt."""
    from a3cli.report.card import describe_texts

    calibration, solution = found["calibration"], found["solution"]
    blocks, length = calibration["blocks"]
    _print(f"{printable(found['path'])}: {found['stage']}, from {printable(str(found['source']['model']))}")
    done = f"; {len(found['layers'])} layers are done" if found["stage"] == "calibrating" else ""
    _say(f"calibrated on {calibration['tokens']:,} tokens ({blocks} blocks of {length}){done}")
    _say(f"text: {printable(describe_texts(calibration, quoted=str))}")
    if solution:
        removed = f"{100 * solution['budget_reached']:.2f} % of the decoder's linear weights"
        settings = solution["request"]["settings"]
        _say(f"solved with --method {settings['method']} --shape {solution['shape']}: {removed} removed")
    if found["layers"]:
        _print_table(_layers_table(found["layers"]))
    if found["text"]:
        _print_table(_text_table(found["text"]))
    for warning in found["warnings"]:
        _say(Text.assemble(("warning:", "yellow"), " ", printable(warning)))
    if not found["warnings"]:
        _say("no warnings")


def print_report(result: Json) -> None:
    for warning in result["warnings"]:
        log.warning("warning: %s", warning)
    _print(printable(result["html"]))


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


def _print(line: str) -> None:
    """Print a line as it is. The terminal breaks it where it likes, so that a name can be copied whole."""
    _console().print(line)


def _say(sentence: str | Text) -> None:
    """Print a sentence: on a terminal wrapped between words, elsewhere as one line."""
    if sys.stdout.isatty():
        _print_wrapped(_console(soft_wrap=False), sentence)
    else:
        _console().print(sentence)


def _print_wrapped(console: Console, text: str | Text) -> None:
    """Print text that is wrapped between words; a word that is longer than a line stays whole."""
    whole = Text(text) if isinstance(text, str) else text
    console.print(Text(break_lines(whole.plain, console.width), spans=whole.spans), soft_wrap=True)


def break_lines(text: str, width: int) -> str:
    """Put line ends in place of spaces, so that no line but one of a single word is wider than `width` columns."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def _print_table(table: Table) -> None:
    """Print a table with every figure and every word whole.

    Columns that are justified to the right hold figures, which are never wrapped; other cells wrap between words. A
    table that is too wide for the terminal becomes several, which repeat the columns before the first figure. A word
    that is too long even for that is not put in a table at all.
    """
    if not sys.stdout.isatty():
        room = max(LOG_WIDTH, _outer_width(_least_widths(table)))
        _console(width=room).print(_sized(table, range(len(table.columns)), room))
        return
    console = _console(soft_wrap=False)
    for part in arrange(table, console.width):
        if isinstance(part, Table):
            console.print(part)
        else:
            _print_wrapped(console, part)


def arrange(table: Table, room: int) -> list[Table | str]:
    """Return what shows a table within `room` columns: tables of some of its columns each, and lines of text."""
    notes: list[str] = []
    if _outer_width(_full_widths(table)) > room:
        table, notes = _number_long_headings(table)
    groups = _group_columns(_least_widths(table), _key_columns(table), room)
    if groups is None:
        return [*_as_lines(table), *notes]
    return [*(_sized(table, group, room) for group in groups), *notes]


def _key_columns(table: Table) -> int:
    """Count the columns before the first one of figures: they say what a row is about. One, if there are no figures."""
    figures = [index for index, column in enumerate(table.columns) if column.justify == "right"]
    return figures[0] if figures else 1


def _least_widths(table: Table) -> list[int]:
    """Return the width that each column needs for its words, and for its figures, to stay whole."""
    return [
        max([_longest_word(heading), *map(cell_len if column.justify == "right" else _longest_word, cells)])
        for column, (heading, *cells) in zip(table.columns, _texts(table), strict=True)
    ]


def _full_widths(table: Table) -> list[int]:
    """Return the width of each column in which nothing is wrapped."""
    return [max(1, *map(cell_len, texts)) for texts in _texts(table)]


def _texts(table: Table) -> list[list[str]]:
    """Return heading and cells of each column."""
    return [[str(text) for text in (column.header, *column.cells)] for column in table.columns]


def _longest_word(text: str) -> int:
    return max((cell_len(word) for word in text.split()), default=1)


def _outer_width(widths: Sequence[int]) -> int:
    """Return the width of a table with columns of these widths: each has a space on both sides and a line."""
    return sum(widths) + 3 * len(widths) + 1


def _number_long_headings(table: Table) -> tuple[Table, list[str]]:
    """Put numbers for headings with long words, such as paths; return also what they stand for."""
    names = [heading for heading, *_ in _texts(table)]
    long = [name for name in names if _longest_word(name) > LONG_HEADING]
    numbers = {name: f"[{number}]" for number, name in enumerate(long, 1)}
    headings = [numbers.get(name, name) for name in names]
    return _select(table, range(len(names)), headings), [f"{number} {name}" for name, number in numbers.items()]


def _group_columns(widths: list[int], keys: int, room: int) -> list[list[int]] | None:
    """Divide the columns after the first `keys` among tables that all have those; None if one does not fit."""
    groups = [list(range(keys))]
    for column in range(keys, len(widths)):
        if _outer_width([widths[index] for index in (*groups[-1], column)]) <= room:
            groups[-1].append(column)
        else:
            groups.append([*range(keys), column])
    fit = all(_outer_width([widths[index] for index in group]) <= room for group in groups)
    return [group for group in groups if len(group) > keys or len(widths) == keys] if fit else None


def _sized(table: Table, columns: Sequence[int], room: int) -> Table:
    """Return a table of some columns that fits in `room`: the widest columns of text give way first."""
    part = _select(table, columns)
    least = _least_widths(part)
    widths = _full_widths(part)
    while _outer_width(widths) > room:
        widest = max((i for i, width in enumerate(widths) if width > least[i]), key=lambda i: widths[i])
        widths[widest] -= 1
    for column, width in zip(part.columns, widths, strict=True):
        column.width = width
    return part


def _select(table: Table, columns: Sequence[int], headings: Sequence[str] | None = None) -> Table:
    """Copy some columns of a table, with other headings if they are given."""
    texts = [_texts(table)[index] for index in columns]
    part = Table(*(headings or [heading for heading, *_ in texts]))
    for column, index in zip(part.columns, columns, strict=True):
        column.justify = table.columns[index].justify
    for index, row in enumerate(table.rows, 1):
        part.add_row(*(column[index] for column in texts), end_section=row.end_section)
    return part


def _as_lines(table: Table) -> list[str]:
    """Return each row as lines of `heading: cell`, with an empty line after it."""
    headings, *rows = zip(*_texts(table), strict=True)
    lines = []
    for row in rows:
        lines += [f"{heading}: {cell}" if heading else cell for heading, cell in zip(headings, row, strict=True)]
        lines.append("")
    return lines


def _console(*, stderr: bool = False, soft_wrap: bool = True, width: int | None = None) -> Console:
    """Text as it is: in a name, `[b]` is no markup and `:cat:` no emoji."""
    return Console(stderr=stderr, soft_wrap=soft_wrap, width=width, markup=False, emoji=False, highlight=False)
