"""Compare a3 with other published methods: equal stored weights, equal calibration blocks, equal texts.

    python benchmarks/quality.py SHARED --cells quality.jsonl --write docs/quality.md

SHARED has `models/wikitext-llama`, `models/stories260k`, `data/wikitext2`, `data/tinystories.txt` and
`data/c4-sample.jsonl`; the third model is the one shipped in demo/model. For each seed `a3 calibrate` draws the
blocks, and the baselines (`benchmarks/baselines.py`) get the same ones. Everything is computed and stored in float32.
Each measured cell is appended to the file CELLS at once, and existing cells are not measured again: processes with
different `--models` or `--seeds` can share the work and the file.
"""

import argparse
import contextlib
import gc
import io
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import demo_text  # noqa: E402

from a3cli.cli.app import app  # noqa: E402
from a3cli.report.manifest import MANIFEST  # noqa: E402
from a3cli.settings import TextSettings  # noqa: E402
from a3cli.stages.answers import LoadedModel  # noqa: E402
from a3cli.stages.evaluate import describe_sums, sum_blocks  # noqa: E402
from a3cli.text.blocks import evaluation_blocks  # noqa: E402
from a3cli.text.tokenizer import load_tokenizer  # noqa: E402
from a3cli.work.folder import Work  # noqa: E402
from benchmarks.baselines import BASELINES, Calibration  # noqa: E402
from benchmarks.results import Cell, Cells, heading, line, split_lines, write_between  # noqa: E402

BUDGETS = (0.1, 0.2, 0.3, 0.4)
SEEDS = (0, 1, 2)
SEQ_LEN = 512
BATCH = 8
OTHER_BLOCKS = 256
QUICK_BLOCKS = 64
PAPER = "a3 paper"
# Label, and the options of `a3 solve`; {budget} is filled in. Uniform cuts need finer heads to meet the budget.
OURS = [
    (PAPER, "--budget {budget} --method paper"),
    ("a3 paper, uniform", "--attention-budget {budget} --mlp-budget {budget} --head-multiple 2 --method paper"),
    ("a3 best", "--budget {budget}"),
    ("a3 best, sequential", "--budget {budget} --sequential --batch-size 8"),
    ("a3 best, per-layer", "--budget {budget} --shape per-layer"),
    ("a3 best, per-layer, sequential", "--budget {budget} --shape per-layer --sequential --batch-size 8"),
]
LABELS = {
    "svd": "SVD",
    "svd_llm": "SVD-LLM",
    "slicegpt": "SliceGPT",
    "magnitude": "magnitude",
    "wanda_structured": "Wanda, structured",
    "modegpt": "MoDeGPT",
    "magnitude_mlp": "magnitude, MLP only",
    "wanda_mlp": "Wanda, MLP only",
    "modegpt_mlp": "MoDeGPT, MLP only",
}
# Baselines whose result is an ordinary checkpoint; the others need their own code to load at their size.
STOCK = ("magnitude_mlp", "wanda_mlp", "modegpt_mlp")
WITHOUT_TEXT = ("svd", "magnitude", "magnitude_mlp")  # the same for every seed
COLUMNS = (
    "model",
    "removed",
    "method",
    "stock",
    "stored less",
    "increase",
    "relative to the paper's",
    "KL (nats)",
    "top-1",
    "increase, C4",
    "KL, C4",
)


@dataclass(frozen=True)
class Subject:
    """A model with its texts; `samples` blocks are used for calibration."""

    name: str
    folder: Path
    calibration: Path
    evaluation: Path
    samples: int
    rounding: str


def subjects(shared: Path, scratch: Path) -> Iterator[Subject]:
    wikitext, models = shared / "data" / "wikitext2", shared / "models"
    yield Subject(
        "wikitext-llama",
        models / "wikitext-llama",
        wikitext / "train.txt",
        wikitext / "test.txt",
        128,
        "--head-multiple 8 --mlp-multiple 16",
    )
    halves = split_lines(shared / "data" / "tinystories.txt", scratch)
    yield Subject("stories260k", models / "stories260k", *halves, 64, "--head-multiple 2 --mlp-multiple 4")
    demo = scratch / "demo"
    demo_text.main(demo)
    texts = demo / "calibration.txt", demo / "evaluation.txt"
    yield Subject("demo model", ROOT / "demo" / "model", *texts, 128, "--head-multiple 8 --mlp-multiple 16")


@dataclass(frozen=True)
class Plan:
    """The models, methods and seeds to measure, and the device."""

    shared: Path
    scratch: Path
    results: Path
    device: torch.device
    budgets: tuple[float, ...]
    seeds: tuple[int, ...]
    blocks: int | None
    only: tuple[str, ...]


def a3(line: str, *arguments: object) -> dict[str, Any]:
    """Run one command of a3 in this process, given as words and further arguments; return its JSON result."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        app([*line.split(), *map(str, arguments), "--json", "--quiet"], standalone_mode=False)
    return json.loads(printed.getvalue())  # type: ignore[no-any-return]


def load(folder: Path, device: torch.device) -> Any:
    """Load a source, or an a3 export, which may contain its own code."""
    options = {"dtype": torch.float32, "device_map": str(device), "trust_remote_code": (folder / MANIFEST).is_file()}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


class Remembered(LoadedModel):
    """A model whose logits for each data set's blocks are computed once and kept."""

    def __init__(self, model: Any, name: str, device: torch.device) -> None:
        super().__init__(model, name, device)
        self._known: dict[int, list[torch.Tensor]] = {}

    def logits(self, blocks: Sequence[torch.Tensor], batch_size: int) -> Iterator[torch.Tensor]:
        if id(blocks) not in self._known:
            self._known[id(blocks)] = list(super().logits(blocks, batch_size))
        return iter(self._known[id(blocks)])


class Bench:
    """One model with its evaluation blocks."""

    def __init__(self, subject: Subject, plan: Plan, other: Path | None = None) -> None:
        self.subject, self.plan = subject, plan
        self.source = load(subject.folder, plan.device)
        self.remembered = Remembered(self.source, subject.name, plan.device)
        tokenizer = load_tokenizer(subject.folder, trust_remote_code=False)
        of_other = min(OTHER_BLOCKS, plan.blocks or OTHER_BLOCKS)
        texts = {
            "own": (subject.evaluation, plan.blocks),
            "other": (other or plan.shared / "data" / "c4-sample.jsonl", of_other),
        }
        self.blocks = {
            name: evaluation_blocks(tokenizer, TextSettings(dataset=str(path), seq_len=SEQ_LEN, samples=samples))
            for name, (path, samples) in texts.items()
        }

    def measure(self, model: Any) -> Cell:
        """Return perplexity, increase, KL and agreement on both texts."""
        found = {}
        for name, blocks in self.blocks.items():
            compressed = LoadedModel(model, "compressed model", self.plan.device)
            sums, _ = sum_blocks(compressed, self.remembered, blocks, BATCH)
            found[name] = describe_sums(sums)
        return found

    def measure_missing(self, results: Cells) -> None:
        for seed in self.plan.seeds:
            one = SeedRun(self, seed)
            for budget in self.plan.budgets:
                for method in methods(seed):
                    key = {"model": self.subject.name, "budget": budget, "seed": seed, "method": method}
                    if not results.find(**key, blocks=self.plan.blocks):
                        results.add({**key, "blocks": self.plan.blocks, **self.cell(one, method, budget)})
                        print(summary(results.all[-1]), file=sys.stderr, flush=True)

    def cell(self, one: "SeedRun", method: str, budget: float) -> Cell:
        """Compress and measure; `seconds` is the time to compress, with the statistics if they were computed for it."""
        started = time.perf_counter()
        model, removed = one.compress(method, budget)
        made = time.perf_counter() - started
        gc.collect()  # frees the last model, which its hooks reference
        return {"removed": removed, **self.measure(model), "seconds": made}


def methods(seed: int) -> list[str]:
    """Return the baselines and our methods, without those that do not depend on the seed if it is not the first."""
    wanted = [name for name in BASELINES if seed == 0 or name not in WITHOUT_TEXT]
    return wanted + [label for label, _ in OURS]


class SeedRun:
    """The blocks of one seed: a3 calibrates on them, and the baselines receive them."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.seed = bench, seed
        self.subject, self.plan = bench.subject, bench.plan
        self.device = f"--device {self.plan.device} --dtype float32"

    @cached_property
    def work(self) -> Work:
        work = Work(self.plan.scratch / f"{self.subject.name}-{self.seed}".replace(" ", "-"))
        line = f"calibrate --samples {self.subject.samples} --seq-len {SEQ_LEN} --batch-size {BATCH} --seed {self.seed}"
        text = ("--dataset", self.subject.calibration)
        a3(f"{line} {self.device}", self.subject.folder, *text, "--work", work.folder)
        return work

    @cached_property
    def calibration(self) -> Calibration:
        return Calibration(self.bench.source, load_file(self.work.tokens)["tokens"], batch_size=BATCH)

    def compress(self, method: str, budget: float) -> tuple[Any, float]:
        """Return the model and the share of the linear weights that it does not store."""
        if method in BASELINES:
            result = BASELINES[method](self.calibration, budget)
            return result.model, result.removed
        ours, rounding = dict(OURS)[method].format(budget=budget), self.subject.rounding
        if "--head-multiple" in ours:  # a method's own option replaces the subject's
            rounding = re.sub(r"--head-multiple \d+ ?", "", rounding)
        line = f"solve {rounding} {ours} --overwrite"
        solved = a3(line, "--work", self.work.folder)
        with tempfile.TemporaryDirectory(dir=self.plan.scratch) as folder:
            out = Path(folder) / "out"
            a3("export --dtype float32", out, "--work", self.work.folder)
            return load(out, self.plan.device), solved["budget_reached"]


def summary(cell: Cell) -> str:
    own, other = cell["own"], cell["other"]
    return (
        f"{cell['model']} {cell['budget']:.0%} seed {cell['seed']} {cell['method']}: removed {cell['removed']:.2%}, "
        f"+{own['perplexity_increase']:.2f}, KL {own['kl']:.4f}; other text +{other['perplexity_increase']:.2f}; "
        f"made in {cell['seconds']:.0f} s"
    )


def table(cells: list[Cell]) -> str:
    """Return the table in Markdown: the dense model, then every method at each budget."""
    lines = [*heading(COLUMNS)]
    for model in unique(cell["model"] for cell in cells):
        ours = [cell for cell in cells if cell["model"] == model]
        lines.append(dense_row(model, ours[0]))
        for budget in sorted({cell["budget"] for cell in ours}):
            of_budget = [cell for cell in ours if cell["budget"] == budget]
            for method in unique([*LABELS, *dict(OURS), *(cell["method"] for cell in of_budget)]):
                of_method = [cell for cell in of_budget if cell["method"] == method]
                if of_method:
                    lines.append(method_row(of_method, of_budget))
    return "\n".join(lines)


def unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def dense_row(model: str, cell: Cell) -> str:
    own, other = (cell[name]["source_perplexity"] for name in ("own", "other"))
    return f"| {model} | 0 % | dense, perplexity | yes |  | {own:.2f} |  |  |  | {other:.2f} |  |"


def method_row(cells: list[Cell], of_budget: list[Cell]) -> str:
    first = cells[0]
    removed = statistics.mean(cell["removed"] for cell in cells)
    figures = [
        first["model"],
        f"{first['budget']:.0%}".replace("%", " %"),
        LABELS.get(first["method"], first["method"]),
        "yes" if is_stock(first["method"]) else "",
        f"{removed:.1%}".replace("%", " %"),
        spread_of([cell["own"]["perplexity_increase"] for cell in cells], "+.2f"),
        spread_of(relative(cells, of_budget), ".2f"),
        spread_of([cell["own"]["kl"] for cell in cells], ".4f"),
        spread_of([100 * cell["own"]["top1_agreement"] for cell in cells], ".1f") + " %",
        spread_of([cell["other"]["perplexity_increase"] for cell in cells], "+.2f"),
        spread_of([cell["other"]["kl"] for cell in cells], ".4f"),
    ]
    return line(figures)


def is_stock(method: str) -> bool:
    """Return whether the result is an ordinary checkpoint: ours is, unless another shape was requested."""
    return method in STOCK or "--shape" not in dict(OURS).get(method, "--shape")


def relative(cells: list[Cell], of_budget: list[Cell]) -> list[float]:
    """Return the increase of each cell relative to that of the paper's method with the same blocks."""
    paper = {cell["seed"]: cell["own"]["perplexity_increase"] for cell in of_budget if cell["method"] == PAPER}
    return [cell["own"]["perplexity_increase"] / paper[cell["seed"]] for cell in cells if cell["seed"] in paper]


def spread_of(values: list[float], form: str) -> str:
    """Return the mean, with the sample standard deviation if there are several values."""
    if not values:
        return ""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--cells", type=Path, required=True, help="raw figures; cells that are there are kept")
    parser.add_argument("--write", type=Path, help="replace the table between the markers of this file")
    parser.add_argument("--work", type=Path, help="folder for calibrations, to keep them (default: a temporary one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default="", help="comma-separated; default: all")
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=SEEDS)
    parser.add_argument("--blocks", type=int, help="evaluate on so many blocks only")
    parser.add_argument("--quick", action="store_true", help="two models, one seed, two budgets, few blocks")
    return parser.parse_args()


def main() -> None:
    args = parse()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        plan = Plan(
            shared=args.shared,
            scratch=args.work or Path(temporary),
            results=args.cells,
            device=torch.device(args.device),
            budgets=BUDGETS,
            seeds=args.seeds,
            blocks=args.blocks,
            only=tuple(args.models.split(",")) if args.models else (),
        )
        if args.quick:
            models = plan.only or ("wikitext-llama", "stories260k")
            plan = replace(plan, only=models, budgets=(0.2, 0.4), seeds=(0,), blocks=args.blocks or QUICK_BLOCKS)
        plan.scratch.mkdir(parents=True, exist_ok=True)
        results = Cells(plan.results)
        for subject in subjects(plan.shared, plan.scratch):
            if not plan.only or subject.name in plan.only:
                Bench(subject, plan).measure_missing(results)
    printed = table([cell for cell in results.all if cell["blocks"] == plan.blocks])
    print(printed)
    if args.write:
        write_between(args.write, "quality", printed)


if __name__ == "__main__":
    main()
