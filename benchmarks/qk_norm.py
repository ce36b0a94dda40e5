"""Measure what smaller query and key heads behind norms cost, on small Qwen3 models trained from a Llama.

    python benchmarks/qk_norm.py SHARED/models/wikitext-llama --training SHARED/data/wikitext2/train.txt \\
        --evaluation SHARED/data/wikitext2/test.txt --folder qk-norm --write docs/experiments.md

Each seed trains one model for some minutes: the Llama's weights in the class of Qwen3, whose norms start as the heads'
mean lengths. Then a3 cuts it at equal removed weights, with whole query and key heads and with smaller ones, and at
equal bytes of the KV cache. All is computed in float32. Models, statistics and measured cells stay in the folder, and
what is there is not computed again.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from a3cli.settings import TextSettings
from a3cli.stages.answers import LoadedModel
from a3cli.stages.evaluate import describe_sums, sum_blocks
from a3cli.text.blocks import evaluation_blocks
from a3cli.text.tokenizer import load_tokenizer
from benchmarks.quality import Remembered, a3, load
from benchmarks.results import Cell, Cells, heading, write_between
from benchmarks.training import fit, random_batches

CPU = torch.device("cpu")
PEAK_RATE, WARM_UP = 6e-4, 40
ROUNDING = "--overwrite --head-multiple 8 --mlp-multiple 16"
WAYS = {
    "weights": {
        "MLP alone": "--budget {budget} --components mlp",
        "smaller heads too": "--budget {budget} --components qk,ov,mlp",
        "MLP and values, per-layer": "--budget {budget} --shape per-layer --components ov,mlp",
        "all, per-layer": "--budget {budget} --shape per-layer --components qk,ov,mlp",
    },
    "KV cache": {
        "smaller heads": "--kv-budget {budget} --components qk,ov",
        "values alone, per-layer": "--kv-budget {budget} --shape per-layer --components ov",
        "both, per-layer": "--kv-budget {budget} --shape per-layer --components qk,ov",
    },
}
COLUMNS = ("removed of", "share", "what is cut", "heads / values / MLP", "increase", "KL (nats)", "KV cache")


@dataclass(frozen=True)
class Plan:
    """The Llama to start from, the texts, and what to measure."""

    start: Path
    training: Path
    evaluation: Path
    budgets: dict[str, tuple[float, ...]]
    steps: int
    samples: int
    seq_len: int
    blocks: int | None
    folder: Path

    def cells(self) -> Iterator[tuple[str, float, str]]:
        """Yield what is removed, how much of it, and the name of the way."""
        for of, ways in WAYS.items():
            yield from ((of, budget, way) for budget in self.budgets[of] for way in ways)


def train(plan: Plan, seed: int, out: Path) -> None:
    """Write a Qwen3 with the Llama's weights, trained until it has got used to its norms."""
    torch.manual_seed(seed)
    tokenizer, llama = AutoTokenizer.from_pretrained(plan.start), load(plan.start, CPU)
    stream = torch.tensor(tokenizer(plan.training.read_text("utf-8")).input_ids)
    batches = random_batches(stream, plan.seq_len, seed)
    model = with_norms(llama, next(batches))
    rates = {"peak_rate": PEAK_RATE, "warm_up": WARM_UP, "weight_decay": 0.01}
    fit(model, batches, plan.steps, **rates, name=f"seed {seed}")
    tokenizer.save_pretrained(out)
    model.to(torch.bfloat16).save_pretrained(out)


@torch.no_grad()
def with_norms(llama: Any, batch: torch.Tensor) -> Qwen3ForCausalLM:
    """Return a Qwen3 with a Llama's weights; each norm's weight is the mean length of the heads before it."""
    known = llama.config.to_dict()
    shared = {key: known[key] for key in Qwen3Config().to_dict() if key in known and key not in ("architectures",)}
    model = Qwen3ForCausalLM(Qwen3Config(**{**shared, "model_type": "qwen3"}))
    model.load_state_dict(llama.state_dict(), strict=False)
    lengths: dict[Any, float] = {}
    for ours, theirs in zip(model.model.layers, llama.model.layers, strict=True):
        for norm, projection in (("q_norm", theirs.self_attn.q_proj), ("k_norm", theirs.self_attn.k_proj)):
            weight = getattr(ours.self_attn, norm).weight
            projection.register_forward_hook(
                lambda _module, _args, heads, of=weight: lengths.update({of: heads.square().mean().sqrt().item()})
            )
    llama(batch)
    for weight, length in lengths.items():
        weight.fill_(length)
    return model


class Bench:
    """One trained and calibrated model, with the blocks to measure on."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.source, self.work = plan.folder / f"model-{seed}", plan.folder / f"work-{seed}"
        if not (self.source / "model.safetensors").exists():
            train(plan, seed, self.source)
        text = ("--dataset", plan.training, "--samples", plan.samples, "--seq-len", plan.seq_len)
        a3("calibrate --dtype float32 --batch-size 8", self.source, *text, "--work", self.work)
        self.remembered = Remembered(load(self.source, CPU), "source", CPU)
        measured = TextSettings(dataset=str(plan.evaluation), seq_len=plan.seq_len, samples=plan.blocks)
        self.blocks = evaluation_blocks(load_tokenizer(self.source, trust_remote_code=False), measured)

    def cell(self, options: str) -> Cell:
        """Solve, export and measure; `seconds` is the time to solve."""
        started = time.perf_counter()
        solved = a3(f"solve {ROUNDING} {options}", "--work", self.work)
        seconds = time.perf_counter() - started
        with tempfile.TemporaryDirectory(dir=self.work.parent) as place:
            a3("export --dtype float32", Path(place) / "out", "--work", self.work)
            model = LoadedModel(load(Path(place) / "out", CPU), "smaller", CPU)
            figures = describe_sums(sum_blocks(model, self.remembered, self.blocks, 8)[0])
        kept = {key: solved[key] for key in ("sizes", "kv_bytes_per_token", "predicted_loss", "budget_reached")}
        return {**figures, **kept, "seconds": seconds}


def measure(plan: Plan, seeds: int) -> list[Cell]:
    """Return the figures of each way at each budget, of each seed's model."""
    known, found = Cells(plan.folder / "cells.jsonl"), []
    for seed in range(seeds):
        bench = None
        for of, budget, name in plan.cells():
            key = {"of": of, "budget": budget, "way": name, "seed": seed, "blocks": plan.blocks}
            cell = known.find(**key)
            if cell is None:
                bench = bench or Bench(plan, seed)
                cell = known.add(key | bench.cell(WAYS[of][name].format(budget=budget)))
                print(json.dumps(cell), file=sys.stderr, flush=True)
            found.append(cell)
    return found


def table(found: list[Cell]) -> str:
    """Return the table in Markdown, with the figures of each seed."""
    lines = [*heading(COLUMNS)]
    alike: dict[tuple[str, float, str], list[Cell]] = {}
    for cell in found:
        alike.setdefault((cell["of"], cell["budget"], cell["way"]), []).append(cell)
    for (of, budget, way), each in alike.items():
        figures = (
            of,
            f"{100 * budget:.0f} %",
            way,
            ", ".join(mean_sizes(cell["sizes"]) for cell in each),
            ", ".join(f"{cell['perplexity_increase']:+.2f}" for cell in each),
            ", ".join(f"{cell['kl']:.4f}" for cell in each),
            ", ".join(f"{100 * share(cell['kv_bytes_per_token']):.0f} %" for cell in each),
        )
        lines.append("| " + " | ".join(figures) + " |")
    dense = ", ".join(f"{value:.2f}" for value in dict.fromkeys(cell["source_perplexity"] for cell in found))
    return "\n".join([f"Perplexity of the sources: {dense}.", "", *lines])


def mean_sizes(sizes: list[dict[str, int]]) -> str:
    return " / ".join(f"{statistics.mean(size[part] for size in sizes):.0f}" for part in ("qk", "ov", "mlp"))


def share(change: dict[str, int]) -> float:
    return change["after"] / change["before"]


def fractions(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("start", type=Path, help="a Llama to start from")
    parser.add_argument("--training", type=Path, required=True, help="text to train and calibrate on")
    parser.add_argument("--evaluation", type=Path, required=True, help="text to measure on")
    parser.add_argument("--budgets", type=fractions, default=(0.1, 0.25), help="fractions of the linear weights")
    parser.add_argument("--kv-budgets", type=fractions, default=(0.25, 0.4), help="fractions of the KV cache")
    parser.add_argument("--seeds", type=int, default=2, help="how many models to train")
    parser.add_argument("--steps", type=int, default=300, help="training steps of 8 blocks")
    parser.add_argument("--samples", type=int, default=64, help="blocks to calibrate on")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per block")
    parser.add_argument("--blocks", type=int, default=64, help="measure on so many blocks")
    parser.add_argument("--folder", type=Path, required=True, help="for models, statistics and measured cells")
    parser.add_argument("--write", type=Path, help="replace the table between the markers of this file")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    budgets = {"weights": args.budgets, "KV cache": args.kv_budgets}
    texts = args.start, args.training, args.evaluation
    args.folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(*texts, budgets, args.steps, args.samples, args.seq_len, args.blocks, args.folder)
    printed = table(measure(plan, args.seeds))
    print(printed)
    if args.write:
        write_between(args.write, "qk-norm", printed)


if __name__ == "__main__":
    main()
