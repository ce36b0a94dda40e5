"""The table of docs/results.md: perplexity, KL and agreement of compressed models at several budgets.

    python benchmarks/results.py SHARED [--write docs/results.md] [--model NAME] [--budgets 0.25,0.4] [--samples 64]

SHARED holds `models/wikitext-llama`, `models/stories260k`, `data/wikitext2` and `data/tinystories.txt`. Every figure is
made by the command line itself, in one run: calibrate once a model, then solve, export and eval at each budget.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEQUENTIAL = ("--sequential", "--batch-size", "8")
VARIANTS = {
    "paper": ("--method", "paper"),
    "best": (),
    "best, sequential": (*SEQUENTIAL, "--refit-rounds", "0"),
    "best, sequential, gate and up": SEQUENTIAL,
    "best, per-layer": ("--shape", "per-layer"),
    "best, per-layer, sequential": ("--shape", "per-layer", *SEQUENTIAL, "--refit-rounds", "0"),
    "best, per-layer, sequential, gate and up": ("--shape", "per-layer", *SEQUENTIAL),
}
BUDGETS = (0.1, 0.25, 0.4)
HEADER = (
    "| model | method | removed | QK | OV | MLP | perplexity | increase | of the paper's "
    "| KL (nats) | top-1 | KV cache |"
)


@dataclass(frozen=True)
class Subject:
    """A model with its text; `samples` blocks of 512 tokens are calibrated on."""

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
    """First and second half of a file's lines: calibration and evaluation text that do not overlap."""
    lines = text.read_text("utf-8").splitlines(keepends=True)
    halves = folder / "calibration.txt", folder / "evaluation.txt"
    for path, half in zip(halves, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        path.write_text("".join(half), "utf-8")
    return halves


def subjects(shared: Path, folder: Path) -> list[Subject]:
    wikitext = shared / "data" / "wikitext2"
    # Tiny heads and MLPs need finer steps than the defaults for a budget to be hit at all.
    fine = ("--head-multiple", "2", "--mlp-multiple", "4")
    return [
        Subject(
            "wikitext-llama",
            shared / "models" / "wikitext-llama",
            wikitext / "train.txt",
            wikitext / "test.txt",
            128,
            ("--mlp-multiple", "16"),
        ),
        Subject(
            "stories260k",
            shared / "models" / "stories260k",
            *split_lines(shared / "data" / "tinystories.txt", folder),
            64,
            fine,
        ),
    ]


def measure(subject: Subject, folder: Path, budgets: Sequence[float], samples: int | None) -> list[str]:
    """Table rows of one model: dense, then each budget; on all of its evaluation text, or its first blocks."""
    work = folder / f"{subject.name}-work"
    text = ("--seq-len", 512, "--batch-size", 8)
    a3(
        "calibrate",
        subject.model,
        "--dataset",
        subject.calibration,
        "--samples",
        subject.samples,
        *text,
        "--work",
        work,
    )
    rows, papers = [], {}
    for (method, options), budget in itertools.product(VARIANTS.items(), budgets):
        solved = a3("solve", "--budget", budget, *options, *subject.rounding, "--work", work, "--overwrite")
        out = folder / "out"
        a3("export", out, "--work", work, "--overwrite")
        remote = () if solved["shape"] == "stock" else ("--trust-remote-code",)
        first = () if samples is None else ("--samples", samples)
        result = a3("eval", out, "--against", subject.model, "--dataset", subject.evaluation, *text, *first, *remote)
        if not rows:
            rows.append(dense_row(subject.name, solved, result))
        papers.setdefault(budget, result["perplexity_increase"])
        rows.append(row(subject.name, method, solved, result, papers[budget]))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def dense_row(name: str, solved: dict, result: dict) -> str:
    full = solved["full_size"]
    figures = [name, "dense", "0 %", *full.values(), f"{result['source_perplexity']:.2f}", "", "", "", "", "100 %"]
    return line(figures)


def row(name: str, method: str, solved: dict, result: dict, paper: float) -> str:
    sizes = [span([layer[component] for layer in solved["sizes"]]) for component in ("qk", "ov", "mlp")]
    kv = solved["kv_bytes_per_token"]
    return line(
        [
            name,
            method,
            f"{100 * solved['budget_reached']:.1f} %",
            *sizes,
            f"{result['perplexity']:.2f}",
            f"+{result['perplexity_increase']:.2f}",
            f"{result['perplexity_increase'] / paper:.2f}",
            f"{result['kl']:.4f}",
            f"{100 * result['top1_agreement']:.1f} %",
            f"{100 * kv['after'] / kv['before']:.0f} %",
        ]
    )


def span(sizes: list[int]) -> str:
    return f"{sizes[0]}" if len(set(sizes)) == 1 else f"{min(sizes)}–{max(sizes)}"


def line(cells: list[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between the markers `<!-- name -->` and `<!-- end of name -->`."""
    start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    whole = path.read_text("utf-8")
    before, after = whole.split(start)[0], whole.split(end)[1]
    path.write_text(f"{before}{start}{text}{end}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--write", type=Path, help="replace the table between the markers of this file")
    parser.add_argument("--model", help="one of the models only")
    parser.add_argument("--budgets", type=lambda text: tuple(map(float, text.split(","))), default=BUDGETS)
    parser.add_argument("--samples", type=int, help="evaluate on so many blocks (default: all)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [each for each in subjects(args.shared, folder) if args.model in (None, each.name)]
        rows = [line for each in chosen for line in measure(each, folder, args.budgets, args.samples)]
    table = "\n".join([HEADER, "|" + "---|" * HEADER.count(" |"), *rows])
    print(table)
    if args.write:
        write_between(args.write, "table", table)


if __name__ == "__main__":
    main()
