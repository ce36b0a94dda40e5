"""Compare a3 with other published methods on a real model: equal removal, equal calibration blocks, two texts.

    python scripts/make_smollm2.py models/smollm2-135m
    python benchmarks/real.py models/smollm2-135m --cells smollm2.jsonl --write docs/real_models.md \\
        --texts wikitext=shared/data/wikitext2/train.txt:shared/data/wikitext2/test.txt c4=shared/data/c4-sample.jsonl

A text is NAME=CALIBRATION:EVALUATION, or NAME=PATH to calibrate on the first half of the lines of a file and evaluate
on the second, or, for a folder of Python sources, on every second file. The first text is the one that is calibrated
on; `mixture` calibrates on equal parts of all texts. `a3 calibrate` draws the blocks of a seed, and every method gets
the same ones. All is computed and stored in float32. Each stage runs in a process of its own; those of a3 are its
commands.

Each measured cell is appended to the file CELLS at once, and cells that are there are not measured again; calibrations
are kept in a folder beside it (`--work`). `--methods`, `--budgets`, `--calibrations` and `--seeds` measure a part.
"""

import argparse
import contextlib
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from a3cli.settings import TextSettings  # noqa: E402
from a3cli.stages.answers import LoadedModel, batches  # noqa: E402
from a3cli.stages.evaluate import describe_sums, sum_blocks  # noqa: E402
from a3cli.text.blocks import evaluation_blocks  # noqa: E402
from a3cli.text.tokenizer import load_tokenizer  # noqa: E402
from a3cli.work.folder import Work  # noqa: E402
from benchmarks.baselines import BASELINES, Calibration  # noqa: E402
from benchmarks.long_range import bucket_means, loss_by_position  # noqa: E402
from benchmarks.published import published  # noqa: E402
from benchmarks.quality import a3, load  # noqa: E402
from benchmarks.real_page import METHODS, MIXTURE, POSITIONS, PUBLISHED, page  # noqa: E402
from benchmarks.real_texts import RealText, read_texts  # noqa: E402
from benchmarks.results import Cell, Cells, write_between  # noqa: E402
from benchmarks.stages import Cost, cost_since, in_child  # noqa: E402

CPU = torch.device("cpu")
BATCH = 8  # blocks per forward, calibrating
EVALUATED_AT_ONCE = 4
FINE = "--head-multiple 2 --mlp-multiple 4"  # what is removed is then within 0.3 % of what is asked
ALL_BASELINES = {PUBLISHED: published, **BASELINES}
WITHOUT_GRAMS = ("slicegpt",)  # it computes statistics of its own, of the model sliced so far


@dataclass(frozen=True)
class Plan:
    """One model with its texts, and how much text is calibrated and measured on."""

    model: Path
    texts: tuple[RealText, ...]
    work: Path
    samples: int
    seq_len: int
    eval_blocks: int
    long_blocks: int

    @property
    def calibration_key(self) -> Cell:
        """Return what a calibration depends on, beside its text and seed."""
        read = {text.name: [text.calibration.name, text.evaluation.name] for text in self.texts}
        return {"model": self.model.name, "read": read, "samples": self.samples, "seq_len": self.seq_len}

    @property
    def key(self) -> Cell:
        """Return what the figures of a cell depend on, beside its method, budget, calibration and seed."""
        return {**self.calibration_key, "eval_blocks": self.eval_blocks, "long_blocks": self.long_blocks}

    @property
    def answers(self) -> Path:
        """Return the file of the source's answers to this plan's evaluation blocks."""
        files = [(text.name, str(text.evaluation.resolve())) for text in self.texts]
        digest = sha256(repr((files, self.seq_len, self.eval_blocks, self.long_blocks)).encode()).hexdigest()[:12]
        return self.work / f"source-{digest}.safetensors"

    def blocks(self, text: RealText, *, length: int, most: int) -> list[torch.Tensor]:
        tokenizer = load_tokenizer(self.model, trust_remote_code=False)
        settings = TextSettings(dataset=str(text.evaluation), seq_len=length, samples=most)
        return [block for block in evaluation_blocks(tokenizer, settings) if len(block) == length]

    def evaluation(self) -> dict[str, list[torch.Tensor]]:
        return {text.name: self.blocks(text, length=self.seq_len, most=self.eval_blocks) for text in self.texts}

    def long(self) -> torch.Tensor | None:
        """Return long blocks of the first text, if they are wanted."""
        if not self.long_blocks:
            return None
        return torch.stack(self.blocks(self.texts[0], length=POSITIONS[-1], most=self.long_blocks))


# --- measuring, in a process of its own -------------------------------------------------------------------------------


class KeptAnswers:
    """The source's logits, computed once and read from a file."""

    def __init__(self, plan: Plan, text: str, vocabulary: int) -> None:
        self.name, self.vocabulary, self._file, self._text = plan.model.name, vocabulary, plan.answers, text

    def logits(self, blocks: list[torch.Tensor], batch_size: int) -> Iterator[torch.Tensor]:
        with safe_open(self._file, "pt") as file:
            for index, _ in enumerate(batches(blocks, batch_size)):
                yield file.get_tensor(f"{self._text}.{index}")


@torch.inference_mode()
def keep_answers(plan: Plan) -> None:
    """Write the source's logits of all evaluation blocks, and its losses by position."""
    model = LoadedModel(load(plan.model, CPU), plan.model.name, CPU)
    kept = {
        f"{name}.{index}": logits.contiguous()
        for name, blocks in plan.evaluation().items()
        for index, logits in enumerate(model.logits(blocks, EVALUATED_AT_ONCE))
    }
    if (long := plan.long()) is not None:
        kept["long"] = mean_by_position(model.model, long)
    save_whole(kept, plan.answers)


def save_whole(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file that is complete if it is there."""
    draft = path.with_suffix(".draft")
    save_file(tensors, draft)
    draft.rename(path)


def mean_by_position(model: Any, blocks: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of each bucket of positions."""
    return bucket_means(loss_by_position(model, blocks, at_once=1), POSITIONS).mean(0)


@torch.inference_mode()
def measure(plan: Plan, model: Any) -> Cell:
    """Return perplexity, KL and agreement on each text, and the loss by position with the source's."""
    compressed, found = LoadedModel(model, "compressed model", CPU), Cell(texts={})
    for name, blocks in plan.evaluation().items():
        source = KeptAnswers(plan, name, compressed.vocabulary)
        sums, _ = sum_blocks(compressed, source, blocks, EVALUATED_AT_ONCE)
        found["texts"][name] = describe_sums(sums)
    if (long := plan.long()) is not None:
        with safe_open(plan.answers, "pt") as file:
            source_losses = file.get_tensor("long")
        found["long"] = {"source": source_losses.tolist(), "model": mean_by_position(model, long).tolist()}
    return found


def measure_export(plan: Plan, folder: Path) -> Cell:
    return measure(plan, quietly_loaded(folder))


def quietly_loaded(folder: Path) -> Any:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    return load(folder, CPU)


def keep_grams(plan: Plan, work: Path) -> None:
    """Write the second moments that the baselines need, of the blocks of a calibration."""
    grams = calibration_of(plan, work).grams
    flat = {f"{layer}.{role}": gram for layer, roles in enumerate(grams) for role, gram in roles.items()}
    save_whole(flat, grams_file(work))


def grams_file(work: Path) -> Path:
    return work.with_name(f"{work.name}-moments.safetensors")


def calibration_of(plan: Plan, work: Path) -> Calibration:
    tokens = load_file(Work(work).tokens)["tokens"]
    assert tokens.shape == (plan.samples, plan.seq_len), "every method gets the same blocks"
    return Calibration(quietly_loaded(plan.model), tokens, batch_size=BATCH)


def measure_baseline(plan: Plan, method: str, work: Path, budget: float) -> Cell:
    """Compress with a baseline and measure the result; `stages` has the cost of compressing alone."""
    started = time.perf_counter(), time.process_time()
    calibration = calibration_of(plan, work)
    if method not in WITHOUT_GRAMS:
        flat = load_file(grams_file(work))
        roles = sorted({name.partition(".")[2] for name in flat})
        calibration.grams = [
            {role: flat[f"{layer}.{role}"] for role in roles} for layer in range(calibration.shape.layers)
        ]
    result = ALL_BASELINES[method](calibration, budget)
    stages = {"whole": cost_since(*started)._asdict()}
    return {"removed": result.removed, "stages": stages, **measure(plan, result.model)}


# --- cells ------------------------------------------------------------------------------------------------------------


class Bench:
    """The cells of one plan."""

    def __init__(self, plan: Plan, cells: Cells) -> None:
        self.plan, self.cells = plan, cells

    def calibrated(self, calibration: str, seed: int, *, grams: bool) -> Path:
        """Return the work folder of a calibration, made at first use, and the baselines' second moments if wanted."""
        plan = self.plan
        work = plan.work / f"{calibration}-{seed}-{plan.samples}x{plan.seq_len}"
        if not Work(work).calibration_manifest.exists():
            shutil.rmtree(work, ignore_errors=True)  # a resumed run would have no honest time
            line = f"calibrate --samples {plan.samples} --seq-len {plan.seq_len} --batch-size {BATCH} --seed {seed}"
            _, cost = in_child(a3, f"{line} --dtype float32", plan.model, *self.datasets(calibration), "--work", work)
            self.add_stage("calibrate", calibration, seed, cost)
        if grams and not grams_file(work).exists():
            _, cost = in_child(keep_grams, plan, work)
            self.add_stage("statistics", calibration, seed, cost)
        return work

    def datasets(self, calibration: str) -> list[object]:
        if calibration == MIXTURE:
            return [word for text in self.plan.texts for word in ("--dataset", f"{text.calibration}:1")]
        (text,) = (text for text in self.plan.texts if text.name == calibration)
        return ["--dataset", text.calibration]

    def add_stage(self, stage: str, calibration: str, seed: int, cost: Cost) -> None:
        of_stage = {"calibration": calibration, "seed": seed, "stage": stage, **cost._asdict()}
        self.cells.add({**self.plan.calibration_key, **of_stage})

    def measure_missing(self, wanted: list[Cell], stop_at: float) -> None:
        """Measure cells that are not there, until it is late; the cell that is begun is finished."""
        for key in wanted:
            if self.cells.find(**self.plan.key, **key):
                continue
            if time.monotonic() > stop_at:
                print("stopped; run the same command again to measure the rest", file=sys.stderr)
                return
            self.cells.add({**self.plan.key, **key, **self.cell(**key)})
            print(summary(self.cells.all[-1]), file=sys.stderr, flush=True)

    def cell(self, method: str, calibration: str, seed: int, budget: float) -> Cell:
        baseline = method in ALL_BASELINES
        work = self.calibrated(calibration, seed, grams=baseline and method not in WITHOUT_GRAMS)
        if not self.plan.answers.exists():
            in_child(keep_answers, self.plan)
        if baseline:
            return in_child(measure_baseline, self.plan, method, work, budget)[0]
        options = f"--budget {budget} {FINE} {METHODS[method].options}"
        solved, solving = in_child(a3, f"solve {options} --overwrite --dtype float32", "--work", work)
        with tempfile.TemporaryDirectory(dir=self.plan.work) as folder:
            out = Path(folder) / "out"
            _, exporting = in_child(a3, "export --dtype float32", out, "--work", work)
            figures, _ = in_child(measure_export, self.plan, out)
        stages = {"solve": solving._asdict(), "export": exporting._asdict()}
        return {"removed": solved["budget_reached"], "stages": stages, **figures}


def summary(cell: Cell) -> str:
    increases = ", ".join(f"{name} {each['perplexity_increase']:+.2f}" for name, each in cell["texts"].items())
    seconds = sum(stage["seconds"] for stage in cell["stages"].values())
    key = f"{cell['calibration']} {cell['budget']:.0%} seed {cell['seed']} {cell['method']}"
    return f"{key}: removed {cell['removed']:.2%}, {increases}; made in {seconds:.0f} s"


# --- command line -----------------------------------------------------------------------------------------------------


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", nargs="+", required=True, help="NAME=CALIBRATION:EVALUATION or NAME=PATH")
    parser.add_argument("--cells", type=Path, required=True, help="raw figures; cells that are there are kept")
    parser.add_argument("--write", type=Path, help="replace the tables between the markers of this file")
    parser.add_argument("--work", type=Path, help="folder for calibrations (default: beside the cells)")
    parser.add_argument("--methods", type=words, default=tuple(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--calibrations", type=words, help="names of texts, or mixture (default: first text, mixture)")
    parser.add_argument("--budgets", type=lambda text: tuple(map(float, text.split(","))), default=(0.1, 0.2, 0.3))
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=(0,))
    parser.add_argument("--samples", type=int, default=32, help="blocks to calibrate on")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per block")
    parser.add_argument("--eval-blocks", type=int, default=12, help="blocks of each text to measure on")
    parser.add_argument("--long-blocks", type=int, default=2, help=f"of {POSITIONS[-1]} tokens, of the first text")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="stop between cells after these")
    parser.add_argument("--only-write", action="store_true", help="measure nothing: tables of the cells that are there")
    args = parser.parse_args()
    if unknown := [name for name in args.methods if name not in METHODS]:
        parser.error(f"--methods {','.join(unknown)}: choose from {', '.join(METHODS)}")
    return args


def wanted_cells(args: argparse.Namespace, calibrations: tuple[str, ...]) -> list[Cell]:
    return [
        {"method": method, "calibration": calibration, "seed": seed, "budget": budget}
        for calibration in calibrations
        for seed in args.seeds
        for budget in args.budgets
        for method in args.methods
    ]


def command() -> str:
    """Return the command that measures and writes everything, for the page."""
    left_out = ("--only-write",)
    return f"python benchmarks/real.py {shlex.join(word for word in sys.argv[1:] if word not in left_out)}"


def main() -> None:
    args = parse()
    work = args.work or args.cells.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    texts = read_texts(args.texts, work)
    sizes = (args.samples, args.seq_len, args.eval_blocks, args.long_blocks)
    bench = Bench(Plan(args.model, texts, work, *sizes), Cells(args.cells))
    wanted = wanted_cells(args, args.calibrations or (texts[0].name, MIXTURE))
    if not args.only_write:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the stage that runs ends with this process
        with contextlib.suppress(KeyboardInterrupt):
            bench.measure_missing(wanted, time.monotonic() + 60 * args.max_minutes)
    keys = {True: bench.plan.calibration_key, False: bench.plan.key}
    own = [cell for cell in bench.cells.all if keys["stage" in cell].items() <= cell.items()]
    printed = page(own, wanted, command())
    print(printed)
    if args.write:
        write_between(args.write, args.model.name, printed)


if __name__ == "__main__":
    main()
