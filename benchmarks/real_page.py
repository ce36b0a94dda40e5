"""The tables of benchmarks/real.py, in Markdown."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.quality import spread_of, unique
from benchmarks.results import Cell, heading, line

PUBLISHED, MIXTURE = "published", "mixture"
POSITIONS = (1, 64, 256, 512, 1024, 2048)  # of the predicted token: the start of each bucket, and the end of the last
GIGABYTE = 1e9


class Method(NamedTuple):
    """How a method is called on the page, what loads its result, and the options of `a3 solve` if it is ours."""

    label: str
    loads: str
    options: str = ""


SEQUENTIAL = "--sequential --batch-size 8"
METHODS = {
    PUBLISHED: Method("paper as published", "nothing"),
    "a3-paper": Method("`a3 --method paper`", "stock", "--method paper"),
    "a3-best": Method("`a3`", "stock", "--method best"),
    "a3-per-layer": Method("`a3 --shape per-layer`", "remote code", "--shape per-layer"),
    "modegpt": Method("MoDeGPT", "own code"),
    "modegpt_mlp": Method("MoDeGPT, MLP only", "stock"),
    "slicegpt": Method("SliceGPT", "own code"),
    "svd_llm": Method("SVD-LLM", "own code"),
    "wanda_structured": Method("Wanda, structured", "own code"),
    "a3-sequential": Method("`a3 --sequential`", "stock", SEQUENTIAL),
    "a3-per-layer-sequential": Method(
        "`a3 --shape per-layer --sequential`", "remote code", f"--shape per-layer {SEQUENTIAL}"
    ),
}


def page(cells: Sequence[Cell], wanted: Sequence[Cell], command: str) -> str:
    """Return the command, a table for each calibration, and what of it is not measured."""
    measured = [cell for cell in cells if "method" in cell and any(key.items() <= cell.items() for key in wanted)]
    parts = [f"```\n{command}\n```"]
    if measured:
        parts.append(dense(measured[0]))
    for calibration in unique(key["calibration"] for key in wanted):
        own = [cell for cell in measured if cell["calibration"] == calibration]
        if own:
            stages = [cell for cell in cells if "stage" in cell and cell["calibration"] == calibration]
            parts += [f"### Calibrated on {described(calibration, own[0])}", *tables(own, stages)]
    return "\n\n".join([*parts, missing(measured, wanted)])


def described(calibration: str, cell: Cell) -> str:
    if calibration != MIXTURE:
        return calibration
    return f"{' and '.join(cell['texts'])}, in equal parts"


def dense(cell: Cell) -> str:
    """Return a sentence about the source and what it is measured on."""
    figures = ", ".join(f"{each['source_perplexity']:.2f} on {name}" for name, each in cell["texts"].items())
    return (
        f"Perplexity of the source: {figures} ({cell['eval_blocks']} blocks of {cell['seq_len']} tokens of each). "
        f"Calibrated on {cell['samples']} blocks of {cell['seq_len']} tokens."
    )


def tables(own: list[Cell], stages: list[Cell]) -> Iterator[str]:
    yield quality(own)
    if any("long" in cell for cell in own):
        yield "Increase of the loss in nats, by position of the predicted token in long blocks of the first text:"
        yield by_position(own)
    yield "Seconds and peak memory of each stage (one process each, imports included in the memory):"
    yield costs(own, stages)


def grouped(cells: list[Cell]) -> Iterator[tuple[float, str, list[Cell]]]:
    """Yield the cells of each budget and method, one for each seed, in the order of `METHODS`."""
    for budget in sorted({cell["budget"] for cell in cells}):
        for method in METHODS:
            of_method = [cell for cell in cells if (cell["budget"], cell["method"]) == (budget, method)]
            if of_method:
                yield budget, method, of_method


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def quality(cells: list[Cell]) -> str:
    """Return increase, KL and agreement on each text, and the increase relative to the paper's as published."""
    texts = list(cells[0]["texts"])
    columns = ["asked", "method", "loads in", "removed"]
    columns += [f"{figure}, {text}" for text in texts for figure in ("increase", "KL", "top-1")]
    rows = list(heading([*columns, "relative", *(f"relative, {text}" for text in texts)]))
    for budget, method, own in grouped(cells):
        papers = {cell["seed"]: cell for cell in cells if (cell["budget"], cell["method"]) == (budget, PUBLISHED)}
        removed = 100 * statistics.mean(cell["removed"] for cell in own)
        row = [percent(budget), METHODS[method].label, METHODS[method].loads, f"{removed:.2f} %"]
        for text in texts:
            row += [
                spread_of([cell["texts"][text]["perplexity_increase"] for cell in own], "+.2f"),
                spread_of([cell["texts"][text]["kl"] for cell in own], ".3f"),
                spread_of([100 * cell["texts"][text]["top1_agreement"] for cell in own], ".1f") + " %",
            ]
        row += [relative(own, papers, names) for names in (texts, *([text] for text in texts))]
        rows.append(line(row))
    return "\n".join(rows)


def relative(own: list[Cell], papers: dict[int, Cell], texts: list[str]) -> str:
    """Return the increase summed over texts, divided by that of the paper's method with the same blocks."""

    def increase(cell: Cell) -> float:
        return sum(cell["texts"][text]["perplexity_increase"] for text in texts)

    return spread_of([increase(cell) / increase(papers[cell["seed"]]) for cell in own if cell["seed"] in papers], ".2f")


def by_position(cells: list[Cell]) -> str:
    """Return the increase of the loss in each bucket of positions."""
    rows = list(heading(["asked", "method", *(f"{first}–{end - 1}" for first, end in itertools.pairwise(POSITIONS))]))
    source = next(cell["long"]["source"] for cell in cells if "long" in cell)
    rows.append(line(["0 %", "source, loss", *(f"{value:.3f}" for value in source)]))
    for budget, method, own in grouped(cells):
        found = [cell["long"] for cell in own if "long" in cell]
        buckets = zip(
            *([m - s for m, s in zip(one["model"], one["source"], strict=True)] for one in found), strict=True
        )
        figures = [spread_of(list(values), "+.3f") for values in buckets]
        rows.append(line([percent(budget), METHODS[method].label, *figures]))
    return "\n".join(rows)


def costs(cells: list[Cell], stages: list[Cell]) -> str:
    """Return mean seconds and the largest peak of every stage."""
    rows = list(heading(["asked", "method", "stage", "seconds", "CPU seconds", "peak GB"]))
    shared = {"calibrate": "every `a3`", "statistics": "the others, except SliceGPT"}
    for name, users in shared.items():
        if found := [cell for cell in stages if cell["stage"] == name]:
            rows.append(cost_row("", users, name, found))
    for budget, method, own in grouped(cells):
        for name in own[0]["stages"]:
            found = [cell["stages"][name] for cell in own]
            rows.append(cost_row(percent(budget), METHODS[method].label, name, found))
    return "\n".join(rows)


def cost_row(budget: str, users: str, stage: str, found: list[Cell]) -> str:
    seconds = [f"{statistics.mean(each[figure] for each in found):.0f}" for figure in ("seconds", "cpu_seconds")]
    return line([budget, users, stage, *seconds, f"{max(each['peak'] for each in found) / GIGABYTE:.1f}"])


def missing(measured: Sequence[Cell], wanted: Sequence[Cell]) -> str:
    """Return a list of the wanted cells that are not measured."""
    lines = [] if any("long" in cell for cell in measured) else ["- loss by position"]
    for calibration, budget, seed in unique(map(place, wanted)):
        asked = [key for key in wanted if place(key) == (calibration, budget, seed)]
        lacking = [key for key in asked if not any(key.items() <= cell.items() for cell in measured)]
        if lacking:
            names = [METHODS[key["method"]].label for key in lacking]
            which = "every method" if len(lacking) == len(asked) else "; ".join(names)
            lines.append(f"- {calibration}, {percent(budget)}, seed {seed}: {which}")
    if not lines:
        return "Everything that the command asks for is measured."
    return "Not measured yet:\n\n" + "\n".join(lines)


def place(key: Cell) -> tuple[str, float, int]:
    return key["calibration"], key["budget"], key["seed"]
