"""The table of docs/results.md: perplexity, KL and agreement of compressed models at several budgets.

    python benchmarks/results.py SHARED [--write docs/results.md]

SHARED holds `models/wikitext-llama`, `models/stories260k`, `data/wikitext2` and `data/tinystories.txt`. Every figure is
made by the command line itself, in one run: calibrate once a model, then solve, export and eval at each budget.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

METHODS = ("paper", "best")
BUDGETS = (0.1, 0.25, 0.4)
HEADER = "| model | method | removed | head_dim | MLP width | perplexity | increase | KL (nats) | top-1 | KV cache |"


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


def measure(subject: Subject, folder: Path) -> list[str]:
    """Table rows of one model: dense, then each budget."""
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
    rows = []
    for method, budget in itertools.product(METHODS, BUDGETS):
        solved = a3("solve", "--budget", budget, "--method", method, *subject.rounding, "--work", work, "--overwrite")
        out = folder / f"{subject.name}-{method}-{budget}"
        a3("export", out, "--work", work)
        result = a3("eval", out, "--against", subject.model, "--dataset", subject.evaluation, *text)
        if not rows:
            rows.append(row(subject.name, "dense", solved, result, "before"))
        rows.append(row(subject.name, method, solved, result, "after"))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def row(name: str, method: str, solved: dict, result: dict, when: str) -> str:
    head, width, kv = (solved[key][when] for key in ("head_dim", "intermediate_size", "kv_bytes_per_token"))
    if when == "before":
        measured = ["0 %", head, width, f"{result['source_perplexity']:.2f}", "", "", ""]
    else:
        measured = [
            f"{100 * solved['budget_reached']:.1f} %",
            head,
            width,
            f"{result['perplexity']:.2f}",
            f"+{result['perplexity_increase']:.2f}",
            f"{result['kl']:.4f}",
            f"{100 * result['top1_agreement']:.1f} %",
        ]
    share = f"{100 * kv / solved['kv_bytes_per_token']['before']:.0f} %"
    return "| " + " | ".join(map(str, [name, method, *measured, share])) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--write", type=Path, help="replace the table between the markers of this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [line for subject in subjects(args.shared, Path(folder)) for line in measure(subject, Path(folder))]
    table = "\n".join([HEADER, "|" + "---|" * HEADER.count(" |"), *rows])
    print(table)
    if args.write:
        text = args.write.read_text("utf-8")
        start, end = "<!-- table -->\n", "\n<!-- end of table -->"
        before, after = text.split(start)[0], text.split(end)[1]
        args.write.write_text(f"{before}{start}{table}{end}{after}", "utf-8")


if __name__ == "__main__":
    main()
