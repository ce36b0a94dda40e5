"""Measure the effect of compression on long-range recall and on loss by position.

    python benchmarks/long_range.py [--model DIR] [--shared SHARED] [--write docs/long_range.md]

Recall: a small model that finds a token anywhere in its context of 1024 (`scripts/train_recall_model.py`, trained in a
few minutes, or taken from `--model`) is calibrated on its own task, compressed and tested again, by distance from the
query to the answer. `--shared` (the models and texts of `benchmarks/results.py`) adds the increase of the loss at each
position of a block of 512 tokens. Calibration, solutions and exports come from the command line itself.

The exit code is 1 if a variant is worse than the paper's method at any distance by more than chance explains.
"""

import argparse
import itertools
import math
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from recall_task import accuracy_by_distance, answer_queries, make_batch, to_text  # noqa: E402

from benchmarks.results import Subject, a3, heading, line, subjects, write_between  # noqa: E402

VARIANTS = ("paper", "best", "best --shape per-layer")  # the others are compared with the first
SIZES = (
    "--budget 0.1",
    "--budget 0.25",
    "--attention-budget 0.25 --mlp-budget 0",
    "--attention-budget 0.5 --mlp-budget 0",
)
TEXT_SIZES = ("--budget 0.1", "--budget 0.25", "--attention-budget 0.25 --mlp-budget 0")
RECALL_ROUNDING = ("--head-multiple", 2, "--mlp-multiple", 8)
CONTEXT, SHORTEST_ASKED = 1024, 8
CALIBRATION_SEED, TEST_SEED = 2**41, 2**42  # training uses none of them
POSITIONS = (1, 32, 64, 128, 256, 384, 512)  # of the predicted token: the start of each bucket, and the end of the last
SIGMAS = 3
SCORE_ERROR = "predicted score error, %"


@dataclass(frozen=True)
class Variant:
    """A method with its flags (`best`, `best --shape per-layer`) at one size (`--budget 0.25`)."""

    name: str
    size: str

    def options(self) -> list[str]:
        method, *flags = shlex.split(self.name)
        return ["--method", method, *flags, *shlex.split(self.size)]


@dataclass(frozen=True)
class Recall:
    """Whether each query was answered correctly `[Q]`, and the filler's loss in nats."""

    hits: torch.Tensor
    filler_loss: float


def load(model: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    own_code = (model / "a3_manifest.json").is_file()  # an a3 export may contain its own code
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=own_code).eval()


def compress(work: Path, out: Path, options: Sequence[object]) -> dict:
    """Solve and export from finished statistics; return the solution's manifest."""
    solved = a3("solve", *options, "--work", work, "--overwrite")
    a3("export", out, "--work", work)
    return solved


# --- recall -----------------------------------------------------------------------------------------------------------


def train_model(folder: Path) -> Path:
    out = folder / "recall-model"
    command = [sys.executable, str(ROOT / "scripts" / "train_recall_model.py"), str(out)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return out


def recall_rows(model: Path, folder: Path, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the table, and one line for each distance at which a variant is worse than the first one."""
    length = args.calibration_length
    text, work = folder / "recall.txt", folder / "recall-work"
    # As many sequences as blocks, with the length of a block: each block is one whole sequence.
    samples = args.calibration_tokens // length
    text.write_text(to_text(make_batch(samples, length, seed=CALIBRATION_SEED).tokens), "utf-8")
    a3(
        "calibrate",
        model,
        "--dataset",
        text,
        "--samples",
        samples,
        "--seq-len",
        length,
        "--batch-size",
        4,
        "--work",
        work,
    )
    batch = make_batch(args.sequences, CONTEXT, seed=TEST_SEED)
    distances = batch.queries[:, 2]
    measured = [("dense", "", None, Recall(*answer_queries(load(model), batch)))]
    failures = []
    for size in args.sizes:
        of_size = []
        for name in args.variants:
            solved = compress(
                work, folder / f"recall-{len(measured)}", (*RECALL_ROUNDING, *Variant(name, size).options())
            )
            recall = Recall(*answer_queries(load(folder / f"recall-{len(measured)}"), batch))
            measured.append((name, size, solved, recall))
            of_size.append((name, recall.hits))
            print(recall_row(*measured[-1], distances), file=sys.stderr, flush=True)
        failures += worse_than_first(of_size, distances, size)
    return [*recall_header(distances), *(recall_row(*one, distances) for one in measured)], failures


def recall_header(distances: torch.Tensor) -> list[str]:
    longest = int(distances.max())
    buckets = [f"{low}–{min(2 * low - 1, longest)}" for low in asked_buckets(distances)]
    columns = ["model", "size", "QK / OV / MLP", "filler loss", *buckets, SCORE_ERROR]
    return [*heading(columns)]


def asked_buckets(distances: torch.Tensor) -> dict[int, tuple[int, int]]:
    everything = accuracy_by_distance(torch.ones_like(distances, dtype=torch.bool), distances)
    return {low: counts for low, counts in everything.items() if low >= SHORTEST_ASKED}


def recall_row(name: str, size: str, solved: dict | None, recall: Recall, distances: torch.Tensor) -> str:
    accuracy = accuracy_by_distance(recall.hits, distances)
    cells = [name, f"`{size}`" if size else ""]
    cells += [sizes(solved), f"{recall.filler_loss:.3f}"]
    cells += [f"{100 * right / asked:.1f}" for low, (right, asked) in accuracy.items() if low >= SHORTEST_ASKED]
    return line([*cells, score_error(solved)])


def sizes(solved: dict | None) -> str:
    """Return the mean sizes over the layers."""
    if solved is None:
        return ""
    layers = solved["sizes"]
    return " / ".join(f"{sum(layer[name] for layer in layers) / len(layers):.3g}" for name in ("qk", "ov", "mlp"))


def score_error(solved: dict | None) -> str:
    """Return the predicted error of the scores next to a query, at 64 positions and at the end of the context."""
    if solved is None:
        return ""
    predicted = solved["predicted_score_error"]
    at = dict(zip(predicted["distance"], predicted["relative"], strict=True))
    return " / ".join(f"{100 * at[distance]:.1f}" for distance in (1, 64, max(at)))


def worse_than_first(measured: list[tuple[str, torch.Tensor]], distances: torch.Tensor, size: str) -> list[str]:
    """Return a line for each variant and bucket in which it misses more of the same queries than the first variant.

    The limit is `SIGMAS` times √n for the n queries that only one of the two answers, the spread of n fair coin flips.
    """
    (first, reference), *others = measured
    lines = []
    for name, hits in others:
        lost = accuracy_by_distance(reference & ~hits, distances)
        gained = accuracy_by_distance(hits & ~reference, distances)
        for low, (more, asked) in lost.items():
            excess = more - gained[low][0]
            if low >= SHORTEST_ASKED and excess > SIGMAS * math.sqrt(more + gained[low][0]):
                share = 100 * excess / asked
                lines.append(f"{name}, {size}, distance {low}–{2 * low - 1}: {share:.1f} % worse than {first}")
    return lines


# --- loss by position -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def loss_by_position(model: Callable[..., Any], blocks: torch.Tensor, *, at_once: int = 4) -> torch.Tensor:
    """Return the negative log-likelihood `[N, T - 1]` in nats of every token of blocks `[N, T]` but the first."""
    losses = []
    for batch in blocks.split(at_once):
        log_p = model(batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        losses.append(-log_p.gather(-1, batch[:, 1:, None])[..., 0].double())
    return torch.cat(losses)


def bucket_means(losses: torch.Tensor, starts: Sequence[int] = POSITIONS) -> torch.Tensor:
    """Return means `[N, buckets]` of losses `[N, T - 1]`; the token at position t (t >= 1) has t tokens before it."""
    return torch.stack([losses[:, a - 1 : b - 1].mean(1) for a, b in itertools.pairwise(starts)], 1)


def position_rows(subject: Subject, folder: Path, args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the table of mean increases, and a line for each variant whose increase grows more than the first's."""
    work = folder / f"{subject.name}-work"
    text = ("--samples", subject.samples, "--seq-len", 512, "--batch-size", 8)
    a3("calibrate", subject.model, "--dataset", subject.calibration, *text, "--work", work)
    blocks = text_blocks(subject.model, subject.evaluation, args.blocks)
    dense = bucket_means(loss_by_position(load(subject.model), blocks))
    columns = [f"{a}–{b - 1}" for a, b in itertools.pairwise(POSITIONS)]
    columns = [subject.name, "size", "QK / OV / MLP", *columns, "last − first", SCORE_ERROR]
    rows = [*heading(columns)]
    rows.append("| dense | | | " + " | ".join(f"{x:.3f}" for x in dense.mean(0).tolist()) + " | | |")
    flags = []
    for size in args.text_sizes:
        of_size = []
        for name in args.variants:
            out = folder / f"{subject.name}-{len(rows)}"
            solved = compress(work, out, (*subject.rounding, *Variant(name, size).options()))
            increase = bucket_means(loss_by_position(load(out), blocks)) - dense
            of_size.append((name, increase))
            rows.append(position_row(name, size, solved, increase))
            print(rows[-1], file=sys.stderr, flush=True)
        flags += growing_faster(of_size, f"{subject.name}, {size}")
    return rows, flags


def text_blocks(model: Path, text: Path, most: int) -> torch.Tensor:
    """Return the first `most` whole blocks of a text, cut as `a3 eval` cuts them."""
    from a3cli.settings import TextSettings
    from a3cli.text.blocks import evaluation_blocks
    from a3cli.text.tokenizer import load_tokenizer

    settings = TextSettings(dataset=str(text), samples=most, seq_len=POSITIONS[-1])
    blocks = evaluation_blocks(load_tokenizer(model), settings)
    return torch.stack([block for block in blocks if len(block) == POSITIONS[-1]])


def position_row(name: str, size: str, solved: dict, increase: torch.Tensor) -> str:
    cells = [name, f"`{size}`", sizes(solved)]
    cells += [f"+{x:.4f}" if x >= 0 else f"{x:.4f}" for x in increase.mean(0).tolist()]
    mean, error = mean_and_error(growth(increase))
    return line([*cells, f"{mean:+.4f} ± {error:.4f}", score_error(solved)])


def growth(increase: torch.Tensor) -> torch.Tensor:
    """Return the last bucket minus the first, of each block `[N]`."""
    return increase[:, -1] - increase[:, 0]


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def growing_faster(measured: list[tuple[str, torch.Tensor]], size: str) -> list[str]:
    """Return a line for each variant whose increase grows with position, and beyond chance more than the first's."""
    (first, reference), *others = measured
    lines = []
    for name, increase in others:
        excess, error = mean_and_error(growth(increase) - growth(reference))
        if growth(increase).mean() > 0 and excess > SIGMAS * error:
            lines.append(f"{name}, {size}: loss grows with position by {excess:.4f} ± {error:.4f} more than {first}'s")
    return lines


# --- output -----------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a recall model that is trained already")
    parser.add_argument(
        "--shared", type=Path, help="also measure loss by position, with the models and texts found there"
    )
    parser.add_argument("--write", type=Path, help="replace the tables between the markers of this file")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="methods with flags: 'best --shape per-layer'")
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="options of a3 solve for the recall model")
    parser.add_argument("--text-sizes", nargs="*", default=TEXT_SIZES, help="options of a3 solve for --shared")
    parser.add_argument("--calibration-length", type=int, default=CONTEXT, help="tokens a sequence, recall")
    parser.add_argument("--calibration-tokens", type=int, default=64 * CONTEXT, help="tokens in all, recall")
    parser.add_argument("--sequences", type=int, default=192, help="sequences of 1024 tokens to ask in")
    parser.add_argument("--blocks", type=int, default=200, help="blocks of text for the loss by position")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, failures = recall_rows(args.model or train_model(folder), folder, args)
        tables = "\n".join(rows)
        for subject in subjects(args.shared, folder) if args.shared else ():
            rows, flags = position_rows(subject, folder, args)
            tables += "\n\n" + "\n".join(rows)
            failures += flags
    print(tables)
    print("\n".join(failures) or "no variant is worse than the first at any distance or position", file=sys.stderr)
    if args.write:
        write_between(args.write, "long range", tables)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
