"""Measure the paper's exact theorems on a small MPT, which has no RoPE, against other decompositions of the same ranks.

    python benchmarks/no_rope.py SHARED/models/wikitext-llama --training SHARED/data/wikitext2/train.txt \\
        --evaluation SHARED/data/wikitext2/test.txt --folder no-rope --write docs/no_rope.md

Each seed trains a model of 1.3 million parameters for some minutes, with the tokenizer of a model of your choice. Then
a3 is calibrated on the training text, and queries and keys, values and outputs, or both get smaller ranks. All is
computed in float32; errors and perplexity are those of the evaluation text. Models, statistics and measured cells stay
in the folder, and what is there is not computed again.

Baselines are applied to the full-size weights, by their published formulas; their own choices of ranks per layer, and
their training, are left out:

clover      CLOVER (arXiv 2411.17426): SVD of `W_qᵀ W_k` and of `W_vᵀ W_o` of each head. No data.
palu        Palu (arXiv 2407.21118): SVD of the key and of the value projection of each head. No data.
svd         SVD of each of the two matrices as a whole, at the rank of all heads together. No data.
magnitude   The dims of each head with the largest product of the norms of their rows in both matrices.
"""

import argparse
import copy
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, MptConfig, MptForCausalLM
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from a3cli.settings import TextSettings
from a3cli.solvers.linalg import JointDecomposition
from a3cli.solvers.moments import gram_blocks, unpack_upper
from a3cli.solvers.ov import output_gram_of, solve_ov
from a3cli.solvers.qk import solve_qk
from a3cli.text.blocks import evaluation_blocks
from a3cli.text.tokenizer import load_tokenizer
from benchmarks.baselines import truncate
from benchmarks.quality import a3, load
from benchmarks.results import Cell, Cells, write_between
from benchmarks.training import BATCH, fit, random_batches

CPU = torch.device("cpu")
HEADS, HEAD, HIDDEN, LAYERS, CONTEXT = 4, 32, 128, 4, 256
WARM_UP, PEAK_RATE = 100, 4e-3
RANKS = (24, 16, 12, 8, 4, 2)  # of 32
BUDGETS = (0.2, 0.4, 0.6, 0.8)  # of the KV cache
FLOOR = 1e-8
THEOREM, CENTRED, OURS, PUBLISHED = (
    "A³, exact theorem",
    "the same with centred keys",
    "a3 (default)",
    "a3, as published",
)
NAMES = {"clover": "CLOVER", "palu": "SVD per head (Palu)", "svd": "SVD", "magnitude": "magnitude"}
LABELS = {label: name for name, label in NAMES.items()}
Form = Callable[["Heads", int], None]  # reduces the two matrices of one layer's heads to a rank, in place


@dataclass(frozen=True)
class Plan:
    """The tokenizer's folder, the texts, and how much of them to use."""

    tokenizer: Path
    training: Path
    evaluation: Path
    folder: Path
    steps: int
    samples: int
    blocks: int


# The model and its text


def train(plan: Plan, seed: int, out: Path) -> None:
    """Train a model and save it with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(plan.tokenizer)
    stream = torch.tensor(tokenizer(plan.training.read_text("utf-8")).input_ids)
    batches = random_batches(stream, CONTEXT, seed)
    sizes = {"d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": CONTEXT}
    model = MptForCausalLM(MptConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes))
    rates = {"peak_rate": PEAK_RATE, "warm_up": WARM_UP, "weight_decay": 0.1}
    fit(model, batches, plan.steps, **rates, name=f"seed {seed}")
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


class Heads:
    """Two matrices of one layer that meet in each head: `first` and `second` `[H, h, d]`.

    For QK these are the query and key projections, for OV the value projection and the rows of the output projection.
    Reading gives copies; assigning writes to the model.
    """

    def __init__(self, block: Any, part: str, theorem: JointDecomposition | None = None) -> None:
        self.block, self.part, self.theorem = block, part, theorem

    def _rows(self, index: int) -> torch.Tensor:
        return self.block.attn.Wqkv.weight.view(3, HEADS, HEAD, HIDDEN)[index]

    def _views(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.part == "qk":
            return self._rows(0), self._rows(1)
        return self._rows(2), self.block.attn.out_proj.weight.view(HIDDEN, HEADS, HEAD).permute(1, 2, 0)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (view.detach().double() for view in self._views())
        return first, second

    @torch.no_grad()
    def write(self, first: torch.Tensor, second: torch.Tensor) -> None:
        for view, value in zip(self._views(), (first, second), strict=True):
            view.copy_(value)


# The methods: each gives all heads of a layer the rank


def theorem(heads: Heads, rank: int) -> None:
    """Apply the solution of `solve_qk` or `solve_ov`, both maps multiplied out."""
    assert heads.theorem is not None
    first, second = heads.read()
    shared, other = heads.theorem.shared_map[..., :rank], heads.theorem.other_map[..., :rank]
    heads.write(
        first, (other if heads.part == "qk" else shared) @ (shared if heads.part == "qk" else other).mT @ second
    )


def clover(heads: Heads, rank: int) -> None:
    first, second = heads.read()
    u, s, vh = torch.linalg.svd(first.mT @ second)
    root = s[:, :rank].sqrt()
    kept = [torch.zeros_like(first), torch.zeros_like(second)]
    kept[0][:, :rank] = (u[..., :rank] * root[:, None]).mT
    kept[1][:, :rank] = vh[:, :rank] * root[..., None]
    heads.write(*kept)


def palu(heads: Heads, rank: int) -> None:
    """Only keys and values are cached, so only their projections are of low rank."""
    first, second = heads.read()
    low = [truncate(each, rank) for each in (second if heads.part == "qk" else first)]
    heads.write(*((first, torch.stack(low)) if heads.part == "qk" else (torch.stack(low), second)))


def svd(heads: Heads, rank: int) -> None:
    heads.write(*(truncate(each.flatten(0, 1), HEADS * rank).view_as(each) for each in heads.read()))


def magnitude(heads: Heads, rank: int) -> None:
    first, second = heads.read()
    scores = first.norm(dim=-1) * second.norm(dim=-1)
    kept = torch.zeros_like(scores).scatter_(1, scores.topk(rank).indices, 1.0)[..., None]
    heads.write(first * kept, second * kept)


BASELINES: dict[str, Form] = {"clover": clover, "palu": palu, "svd": svd, "magnitude": magnitude}


class Bench:
    """One trained and calibrated model."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.source, self.work = plan.folder / f"model-{seed}", plan.folder / f"work-{seed}"
        if not (self.source / "model.safetensors").exists():
            train(plan, seed, self.source)
        text = ("--dataset", plan.training, "--samples", plan.samples, "--seq-len", CONTEXT)
        a3("calibrate --dtype float32 --batch-size 8", self.source, *text, "--work", self.work)
        self.model = load(self.source, CPU)
        measured = TextSettings(dataset=str(plan.evaluation), seq_len=CONTEXT, samples=plan.blocks)
        self.blocks = torch.stack(
            evaluation_blocks(load_tokenizer(self.source, trust_remote_code=False), measured)[: plan.blocks]
        )
        self.calls = record_calls(self.model, self.blocks)

    @cached_property
    def sums(self) -> list[dict[str, torch.Tensor]]:
        return [load_file(self.work / "calibration" / f"layer-{i:03d}.safetensors") for i in range(LAYERS)]

    def solution(self, part: str, layer: int, *, centred: bool) -> JointDecomposition:
        """Return the exact solution of one layer, from the statistics of `a3 calibrate`."""
        sums = {name: value / self.sums[layer]["tokens"] for name, value in self.sums[layer].items()}
        if part == "qk":
            mean = sums["k_sum"] * centred
            return solve_qk(sums["q_gram"], sums["k_gram"] - mean[:, :, None] * mean[:, None], floor=FLOOR)
        outputs = gram_blocks(unpack_upper(sums["o_gram"], HEADS * HEAD).double(), HEADS)
        weight = Heads(self.model.transformer.blocks[layer], "ov").read()[1]
        return solve_ov(outputs, output_gram_of(weight), floor=FLOOR)

    def reduced(self, form: Form, parts: str, rank: int, *, centred: bool = False) -> Any:
        """Return a copy of the model whose heads have the rank in these parts."""
        model = copy.deepcopy(self.model)
        for layer, block in enumerate(model.transformer.blocks):
            for part in parts.split(","):
                solved = self.solution(part, layer, centred=centred) if form is theorem else None
                form(Heads(block, part, solved), rank)
        return model

    def solved(self, part: str, rank: int, options: str) -> Any:
        """Return the per-layer export of a solution of `a3 solve`: all heads of this rank, or of its bytes."""
        budget = f"--kv-budget {1 - rank / HEAD - 1e-9}"
        if part != "kv":
            budget = f"--components {part} --min-head {rank} --attention-budget {(1 - rank / HEAD) / 2 - 1e-9}"
        a3(f"solve --shape per-layer --head-multiple 2 --overwrite {budget} {options}", "--work", self.work)
        with tempfile.TemporaryDirectory(dir=self.work.parent) as folder:
            a3("export --dtype float32", Path(folder) / "out", "--work", self.work)
            return load(Path(folder) / "out", CPU)

    def smaller(self, part: str, method: str, rank: int) -> Any:
        """Return the model whose heads have a rank by a method."""
        if method in (OURS, PUBLISHED):
            return self.solved(part, rank, "" if method == OURS else "--method paper")
        parts = "qk,ov" if part == "kv" else part
        form = theorem if method in (THEOREM, CENTRED) else BASELINES[LABELS[method]]
        return self.reduced(form, parts, rank, centred=method == CENTRED)

    def cell(self, part: str, method: str, rank: int) -> Cell:
        model = self.model if method == "source" else self.smaller(part, method, rank)
        error = score_error if part == "qk" else output_error
        return {"perplexity": perplexity(model, self.blocks), "error": error(self, model)}


def wanted() -> Iterator[tuple[str, str, int]]:
    """Yield part, method and rank of every cell: QK and OV at each rank, both at each budget of the cache."""
    yield "source", "source", HEAD
    methods = {
        "qk": (OURS, THEOREM, CENTRED, *LABELS),
        "ov": (OURS, THEOREM, *LABELS),
        "kv": (OURS, PUBLISHED, THEOREM, *LABELS),
    }
    ranks = dict.fromkeys(("qk", "ov"), RANKS) | {
        "kv": tuple(math.floor((1 - each) * HEAD / 2) * 2 for each in BUDGETS)
    }
    for part, names in methods.items():
        yield from ((part, method, rank) for rank in ranks[part] for method in names)


def measure(plan: Plan, seeds: tuple[int, ...]) -> list[Cell]:
    """Return all cells of these seeds; those that the folder has are not measured again."""
    known, found = Cells(plan.folder / "cells.jsonl"), []
    for seed in seeds:
        bench = None
        for part, method, rank in wanted():
            key = {"seed": seed, "part": part, "method": method, "rank": rank, "blocks": plan.blocks}
            cell = known.find(**key)
            if cell is None:
                bench = bench or Bench(plan, seed)
                cell = known.add(key | bench.cell(part, method, rank))
                print(json.dumps(cell, ensure_ascii=False), file=sys.stderr, flush=True)
            found.append(cell)
    return found


# Figures


@torch.inference_mode()
def record_calls(model: Any, blocks: torch.Tensor) -> list[list[tuple[tuple, dict[str, Any]]]]:
    """Return the arguments with which each layer's attention is called, for each batch."""
    calls: list[list[tuple[tuple, dict[str, Any]]]] = [[] for _ in model.transformer.blocks]
    handles = [
        block.attn.register_forward_pre_hook(
            lambda _module, args, kwargs, own=own: own.append((args, kwargs)), with_kwargs=True
        )
        for block, own in zip(model.transformer.blocks, calls, strict=True)
    ]
    for batch in blocks.split(BATCH):
        model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


@torch.inference_mode()
def perplexity(model: Any, blocks: torch.Tensor) -> float:
    losses = [
        cross_entropy(model(batch, use_cache=False).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()) * len(batch)
        for batch in blocks.split(BATCH)
    ]
    return math.exp(sum(loss.item() for loss in losses) / len(blocks))


@torch.inference_mode()
def score_error(bench: Bench, model: Any) -> float:
    """Return the relative root mean square error of scores of all pairs of tokens, over all heads and layers."""
    lost = total = 0.0
    for calls, ours, theirs in zip(bench.calls, model.transformer.blocks, bench.model.transformer.blocks, strict=True):
        x = torch.cat([args[0].flatten(0, 1) for args, _ in calls]).double()
        gram = x.T @ x / len(x)
        small, full = forms(ours.attn), forms(theirs.attn)
        for energy_of, scale in ((small - full, "lost"), (full, "total")):
            energy = ((gram @ energy_of @ gram) * energy_of).sum().item()
            lost, total = (lost + energy, total) if scale == "lost" else (lost, total + energy)
    return math.sqrt(lost / total)


def forms(attention: Any) -> torch.Tensor:
    """Return `W_qᵀ W_k` `[H, d, d]` of an attention module, stock or exported."""
    query, key, _ = attention.Wqkv.weight.double().split(getattr(attention, "widths", [HIDDEN] * 3))
    return query.view(HEADS, -1, HIDDEN).mT @ key.view(HEADS, -1, HIDDEN)


@torch.inference_mode()
def output_error(bench: Bench, model: Any) -> float:
    """Return the relative root mean square error of attention's output, over all layers, for the source's inputs."""
    lost = total = 0.0
    for calls, ours, theirs in zip(bench.calls, model.transformer.blocks, bench.model.transformer.blocks, strict=True):
        for args, kwargs in calls:
            expected = theirs.attn(*args, **kwargs)[0]
            lost += (ours.attn(*args, **kwargs)[0] - expected).square().sum().item()
            total += expected.square().sum().item()
    return math.sqrt(lost / total)


# Tables


def table(cells: list[Cell], part: str) -> str:
    """Return a table in Markdown: a row for each method, a column for each rank, with the figures of each seed."""
    own = [cell for cell in cells if cell["part"] == part]
    ranks = sorted({cell["rank"] for cell in own}, reverse=True)
    names = [f"{100 * (1 - rank / HEAD):.0f} % less" if part == "kv" else f"rank {rank}" for rank in ranks]
    lines = ["| method | " + " | ".join(names) + " |", "|---" * (len(ranks) + 1) + "|"]
    for method in dict.fromkeys(cell["method"] for cell in own):
        found = [[cell for cell in own if (cell["method"], cell["rank"]) == (method, rank)] for rank in ranks]
        lines.append(f"| {method} | " + " | ".join(figures(each, part) for each in found) + " |")
    return "\n".join(lines)


def figures(cells: list[Cell], part: str) -> str:
    increases = " / ".join(f"{cell['increase']:+.2f}" for cell in cells)
    return (
        increases if part == "kv" else " / ".join(f"{100 * cell['error']:.1f}" for cell in cells) + f" %, {increases}"
    )


def with_increase(cells: list[Cell]) -> list[Cell]:
    """Return the cells with the increase of perplexity over the source of the same seed."""
    sources = {cell["seed"]: cell["perplexity"] for cell in cells if cell["part"] == "source"}
    return [cell | {"increase": cell["perplexity"] - sources[cell["seed"]]} for cell in cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path, help="a folder with the tokenizer to use")
    parser.add_argument("--training", type=Path, required=True, help="text to train and calibrate on")
    parser.add_argument("--evaluation", type=Path, required=True, help="text to measure on")
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=(0, 1))
    parser.add_argument("--steps", type=int, default=800, help="training steps of 8 blocks")
    parser.add_argument("--samples", type=int, default=128, help="blocks to calibrate on")
    parser.add_argument("--blocks", type=int, default=64, help="measure on so many blocks")
    parser.add_argument("--folder", type=Path, required=True, help="for models, statistics and measured cells")
    parser.add_argument("--write", type=Path, help="replace the tables between the markers of this file")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    args.folder.mkdir(parents=True, exist_ok=True)
    texts = args.tokenizer, args.training, args.evaluation
    plan = Plan(*texts, args.folder, args.steps, args.samples, args.blocks)
    cells = with_increase(measure(plan, args.seeds))
    sources = ", ".join(f"{cell['perplexity']:.1f} (seed {cell['seed']})" for cell in cells if cell["part"] == "source")
    printed = {part: table(cells, part) for part in ("qk", "ov", "kv")} | {"source": f"Perplexity: {sources}."}
    print("\n\n".join(printed.values()))
    if args.write:
        for part, text in printed.items():
            write_between(args.write, part, text)


if __name__ == "__main__":
    main()
