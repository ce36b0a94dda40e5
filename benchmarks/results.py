"""Write the table of docs/results.md: perplexity, KL and agreement of compressed models at several budgets.

    python benchmarks/results.py SHARED --cells results.jsonl [--write docs/results.md] [--model NAME] [--samples 64]

SHARED has `models/wikitext-llama`, `models/stories260k`, `data/wikitext2` and `data/tinystories.txt`. All figures come
from the command line itself: calibrate once per model, then solve, export and eval at each budget, with `--jobs`
budgets at a time, each in a copy of the work folder. Each measured cell is appended to the file CELLS at once, and
existing cells are not measured again.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAPER = "paper"
SEQUENTIAL = ("--sequential", "--batch-size", "8")
VARIANTS = {
    PAPER: ("--method", "paper"),
    "best": (),
    "best, sequential": SEQUENTIAL,
    "best, per-layer": ("--shape", "per-layer"),
    "best, per-layer, sequential": ("--shape", "per-layer", *SEQUENTIAL),
}
BUDGETS = (0.1, 0.25, 0.4)
COLUMNS = (
    *("model", "method", "removed", "QK", "OV", "MLP", "perplexity", "increase", "of the paper's"),
    *("KL (nats)", "top-1", "KV cache"),
)
TEXT = ("--seq-len", 512, "--batch-size", 8)

Cell = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model with its text; `samples` blocks of 512 tokens are used for calibration."""

    name: str
    model: Path
    calibration: Path
    evaluation: Path
    samples: int
    rounding: tuple[str, ...]


def a3(*arguments: object) -> dict:
    command = [sys.executable, "-m", "a3cli", *map(str, arguments), "--json", "--quiet"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def split_lines(text: Path, folder: Path) -> tuple[Path, Path]:
    """Split a file's lines into halves, to calibrate and to evaluate on texts that do not overlap."""
    lines = text.read_text("utf-8").splitlines(keepends=True)
    halves = folder / f"first-half{text.suffix}", folder / f"second-half{text.suffix}"
    for path, half in zip(halves, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        path.write_text("".join(half), "utf-8")
    return halves


def subjects(shared: Path, folder: Path) -> list[Subject]:
    wikitext = shared / "data" / "wikitext2"
    # Tiny heads and MLPs need finer steps than the defaults to reach a budget.
    fine = ("--head-multiple", "2", "--mlp-multiple", "4")
    return [
        Subject(
            "wikitext-llama",
            shared / "models" / "wikitext-llama",
            wikitext / "train.txt",
            wikitext / "test.txt",
            128,
            ("--head-multiple", "8", "--mlp-multiple", "16"),
        ),
        Subject(
            "stories260k",
            shared / "models" / "stories260k",
            *split_lines(shared / "data" / "tinystories.txt", folder),
            64,
            fine,
        ),
    ]


class Cells:
    """Measured cells, one JSON object per line of a file that is only appended to: several processes can share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.all: list[Cell] = [json.loads(line) for line in lines]

    def find(self, **key: Any) -> Cell | None:
        return next((cell for cell in self.all if key.items() <= cell.items()), None)

    def add(self, cell: Cell) -> Cell:
        self.all.append(cell)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
        return cell


def measure(subject: Subject, folder: Path, cells: Cells, args: argparse.Namespace) -> list[str]:
    """Return the rows of one model: dense, then each method and budget; on the whole text or on its first blocks."""
    work = folder / f"{subject.name}-work"
    text = ("--dataset", subject.calibration, "--samples", subject.samples, *TEXT)
    a3("calibrate", subject.model, *text, "--work", work)

    def cell(wanted: tuple[str, float]) -> Cell:
        method, budget = wanted
        key = {"model": subject.name, "method": method, "budget": budget, "samples": args.samples}
        if found := cells.find(**key):
            return found
        with tempfile.TemporaryDirectory(dir=folder) as place:
            return cells.add(key | compress_and_measure(subject, *wanted, work, Path(place), args.samples))

    wanted = list(itertools.product(VARIANTS, args.budgets))
    with ThreadPoolExecutor(args.jobs) as jobs:
        measured = dict(zip(wanted, jobs.map(cell, wanted), strict=True))
    papers = {budget: measured[PAPER, budget]["perplexity_increase"] for budget in args.budgets}
    return [dense_row(measured[wanted[0]]), *(row(each, papers[each["budget"]]) for each in measured.values())]


def compress_and_measure(
    subject: Subject, method: str, budget: float, calibrated: Path, folder: Path, samples: int | None
) -> Cell:
    """Return the figures of the solution and of the evaluation."""
    work, out = shutil.copytree(calibrated, folder / "work"), folder / "out"
    solved = a3("solve", "--budget", budget, *VARIANTS[method], *subject.rounding, "--work", work)
    a3("export", out, "--work", work)
    remote = () if solved["shape"] == "stock" else ("--trust-remote-code",)
    first = () if samples is None else ("--samples", samples)
    text = ("--dataset", subject.evaluation, *TEXT, *first)
    result = a3("eval", out, "--against", subject.model, *text, *remote)
    print(subject.name, method, budget, f"+{result['perplexity_increase']:.4f}", file=sys.stderr, flush=True)
    of_solution = ("sizes", "full_size", "budget_reached", "kv_bytes_per_token")
    of_result = ("perplexity", "source_perplexity", "perplexity_increase", "kl", "top1_agreement")
    return {name: solved[name] for name in of_solution} | {name: result[name] for name in of_result}


def dense_row(cell: Cell) -> str:
    perplexity = f"{cell['source_perplexity']:.2f}"
    return line([cell["model"], "dense", "0 %", *cell["full_size"].values(), perplexity, "", "", "", "", "100 %"])


def row(cell: Cell, paper: float) -> str:
    sizes = [span([layer[component] for layer in cell["sizes"]]) for component in ("qk", "ov", "mlp")]
    kv = cell["kv_bytes_per_token"]
    return line(
        [
            cell["model"],
            cell["method"],
            f"{100 * cell['budget_reached']:.1f} %",
            *sizes,
            f"{cell['perplexity']:.2f}",
            f"+{cell['perplexity_increase']:.2f}",
            f"{cell['perplexity_increase'] / paper:.2f}",
            f"{cell['kl']:.4f}",
            f"{100 * cell['top1_agreement']:.1f} %",
            f"{100 * kv['after'] / kv['before']:.0f} %",
        ]
    )


def span(sizes: list[int]) -> str:
    return f"{sizes[0]}" if len(set(sizes)) == 1 else f"{min(sizes)}–{max(sizes)}"


def line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def heading(columns: Sequence[object]) -> tuple[str, str]:
    """Return the first two lines of a table."""
    return line(columns), "|" + "---|" * len(columns)


def write_between(path: Path, name: str, text: str) -> None:
    """Replace the text between the markers `<!-- name -->` and `<!-- end of name -->`."""
    start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    whole = path.read_text("utf-8")
    before, after = whole.split(start)[0], whole.split(end)[1]
    path.write_text(f"{before}{start}{text}{end}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--cells", type=Path, required=True, help="raw figures; cells that are there are kept")
    parser.add_argument("--write", type=Path, help="replace the table between the markers of this file")
    parser.add_argument("--model", help="one of the models only")
    parser.add_argument("--budgets", type=lambda text: tuple(map(float, text.split(","))), default=BUDGETS)
    parser.add_argument("--samples", type=int, help="evaluate on so many blocks (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="side by side, sharing the cores")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))  # for the commands
    cells = Cells(args.cells)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [each for each in subjects(args.shared, folder) if args.model in (None, each.name)]
        rows = [line for each in chosen for line in measure(each, folder, cells, args)]
    table = "\n".join([*heading(COLUMNS), *rows])
    print(table)
    if args.write:
        write_between(args.write, "table", table)


if __name__ == "__main__":
    main()
