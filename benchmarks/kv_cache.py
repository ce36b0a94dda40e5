"""Compare ways to make the KV cache smaller at equal bytes: a3's, and SVD of each head's keys and values.

    python benchmarks/kv_cache.py SHARED/models/wikitext-llama --calibration SHARED/data/wikitext2/train.txt \\
        --evaluation SHARED/data/wikitext2/test.txt --write docs/kv_cache.md

The MLP is left as it is. `a3 calibrate` draws the blocks once, and all methods get the same ones. A
budget is rounded to a head size, and all methods get the bytes of heads of this size. All is computed in float32.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from a3cli.settings import TextSettings
from a3cli.stages.answers import LoadedModel
from a3cli.stages.evaluate import describe_sums, sum_blocks
from a3cli.text.blocks import evaluation_blocks
from a3cli.text.tokenizer import load_tokenizer
from a3cli.work.folder import Work
from benchmarks.baselines import Calibration, per_head_svd
from benchmarks.quality import Remembered, a3, load
from benchmarks.results import heading, line, write_between

CPU = torch.device("cpu")
MULTIPLE = 2  # of head sizes; larger ones are further from the budget
SOLVE = f"solve --overwrite --head-multiple {MULTIPLE}"
STOCK = "a3"
OURS = {STOCK: "", "a3, per-layer": "--shape per-layer", "a3, as published": "--method paper"}
SVD = {"SVD per head": False, "whitened SVD per head": True}
LOADS = {STOCK: "yes", "a3, as published": "yes"}
COLUMNS = ("removed", "method", "stock", "perplexity", "increase", "KL (nats)", "top-1")


@dataclass(frozen=True)
class Plan:
    """One model, its texts, and what to measure."""

    model: Path
    calibration: Path
    evaluation: Path
    budgets: tuple[float, ...]
    samples: int
    seq_len: int
    blocks: int | None


class Bench:
    """A calibrated model in a folder, with the blocks to measure on."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder, self.work = plan, folder, Work(folder / "work")
        text = ("--dataset", plan.calibration, "--samples", plan.samples, "--seq-len", plan.seq_len)
        a3("calibrate --dtype float32 --batch-size 8", plan.model, *text, "--work", self.work.folder)
        source = load(plan.model, CPU)
        self.source = Remembered(source, "source", CPU)
        self.calibration = Calibration(source, load_file(self.work.tokens)["tokens"])
        measured = TextSettings(dataset=str(plan.evaluation), seq_len=plan.seq_len, samples=plan.blocks)
        self.blocks = evaluation_blocks(load_tokenizer(plan.model, trust_remote_code=False), measured)

    def cells(self) -> Iterator[dict[str, Any]]:
        """Yield the figures of each method at each budget; all have the bytes of heads of the same size."""
        head = self.calibration.shape.head_dim
        for budget in self.plan.budgets:
            rank = math.floor((1 - budget) * head / MULTIPLE) * MULTIPLE
            share = math.floor((1 - rank / head) * 1e9) / 1e9
            ways: dict[str, Callable[[], Any]] = {
                name: partial(self.compress, f"--kv-budget {share} {options}", rank) for name, options in OURS.items()
            }
            ways |= {
                name: partial(per_head_svd, self.calibration, rank, whitened=whitened) for name, whitened in SVD.items()
            }
            for name, way in ways.items():
                cell = {"method": name, "removed": 1 - rank / head, **self.measure(way())}
                print(json.dumps(cell), file=sys.stderr, flush=True)
                yield cell

    def compress(self, options: str, rank: int) -> Any:
        """Solve, export and load; check that the cache has the bytes of heads of this size."""
        kv, shape = a3(f"{SOLVE} {options}", "--work", self.work.folder)["kv_bytes_per_token"], self.calibration.shape
        assert kv["after"] * shape.head_dim == kv["before"] * rank, "methods with other bytes are not comparable"
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            a3("export --dtype float32", Path(folder) / "out", "--work", self.work.folder)
            return load(Path(folder) / "out", CPU)

    def measure(self, model: Any) -> dict[str, Any]:
        sums, _ = sum_blocks(LoadedModel(model, "smaller", CPU), self.source, self.blocks, 8)
        return describe_sums(sums)


def table(cells: list[dict[str, Any]]) -> str:
    """Return the table in Markdown: the source, then every method at each budget."""
    lines = [*heading(COLUMNS)]
    lines.append(f"| 0 % | source | yes | {cells[0]['source_perplexity']:.2f} |  |  |  |")
    for cell in cells:
        figures = (
            f"{100 * cell['removed']:.1f} %",
            cell["method"],
            LOADS.get(cell["method"], ""),
            f"{cell['perplexity']:.2f}",
            f"{cell['perplexity_increase']:+.2f}",
            f"{cell['kl']:.4f}",
            f"{100 * cell['top1_agreement']:.1f} %",
        )
        lines.append(line(figures))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--evaluation", type=Path, required=True, help="text to measure on")
    parser.add_argument("--budgets", type=lambda text: tuple(map(float, text.split(","))), default=(0.2, 0.4, 0.6))
    parser.add_argument("--samples", type=int, default=128, help="blocks to calibrate on")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per block")
    parser.add_argument("--blocks", type=int, help="measure on so many blocks (default: all)")
    parser.add_argument("--write", type=Path, help="replace the table between the markers of this file")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    texts = args.model, args.calibration, args.evaluation
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Plan(*texts, args.budgets, args.samples, args.seq_len, args.blocks), Path(folder))
        printed = table(list(bench.cells()))
    print(printed)
    if args.write:
        write_between(args.write, "kv-cache", printed)


if __name__ == "__main__":
    main()
