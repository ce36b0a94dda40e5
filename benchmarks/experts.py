"""Train a tiny model with experts, and compare a3 with magnitude pruning at equal sizes.

    python benchmarks/experts.py [--seeds 0 1] [--steps 300] [--write docs/experiments.md]

The model is a Mixtral with 3 layers of 8 experts of width 128, of which a token goes through two. It is trained on the
standard library's source with the demo model's tokenizer, about three minutes per seed on one core. Magnitude pruning
keeps the channels with the largest weights in each expert, at the width that a3 chooses when it cuts only the MLP.
"""

import argparse
import contextlib
import io
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from demo_text import CALIBRATION, EVALUATION, read_modules, training_modules  # noqa: E402

from a3cli.cli.app import app  # noqa: E402
from benchmarks.results import heading, write_between  # noqa: E402

BUDGETS = (0.1, 0.25)
CONTEXT, BATCH, PEAK_LR, WARMUP_STEPS = 256, 8, 3e-3, 40
HEADER = ("seed", "removed", "width of experts", "magnitude", "a3, MLP only", "a3 as published, MLP only", "a3")


def configuration(vocabulary: int) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        router_aux_loss_coef=0.02,
    )


def train(tokens: torch.Tensor, vocabulary: int, *, steps: int, seed: int) -> MixtralForCausalLM:
    """Return a model trained on random blocks of a stream of tokens, with the loss that balances its experts."""
    torch.manual_seed(seed)
    model = MixtralForCausalLM(configuration(vocabulary)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * (0.525 + 0.475 * math.cos(math.pi * step / steps))
            )
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        loss = model(batch, labels=batch, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return model.eval()


@torch.inference_mode()
def perplexity(model: Any, tokens: torch.Tensor) -> float:
    """Return the perplexity over non-overlapping blocks."""
    blocks = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(block[None], labels=block[None]).loss.item() for block in blocks]
    return math.exp(sum(losses) / len(losses))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def prune_by_magnitude(model: Any, width: int) -> Any:
    """Zero all but the channels with the largest weights of each expert: gate and up rows and down column together."""
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            gate, up = gate_up.chunk(2)
            size = gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)
            down[:, size.argsort(descending=True)[width:]] = 0
    return model


def a3(line: str, *arguments: object) -> dict[str, Any]:
    """Run one command of a3 in this process; return its JSON result."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        app([*line.split(), *map(str, arguments), "--json", "--quiet"], standalone_mode=False)
    return json.loads(printed.getvalue())  # type: ignore[no-any-return]


def compare(source: Path, text: Path, tokens: torch.Tensor, seed: int, folder: Path) -> list[str]:
    """Return the rows of the table for one model."""
    dense, rows, work = perplexity(load(source), tokens), [], ("--work", folder / "work")
    a3(f"calibrate --samples 96 --seq-len {CONTEXT}", source, "--dataset", text, *work)
    for budget in BUDGETS:
        cut = f"solve --budget {budget} --mlp-multiple 8 --head-multiple 4 --overwrite"
        found = {}
        for name, options in {
            "MLP": "--components mlp",
            "paper": "--components mlp --method paper",
            "all": "",
        }.items():
            solved = a3(f"{cut} {options}", *work)
            a3("export --overwrite", folder / "out", *work)
            found[name] = perplexity(load(folder / "out"), tokens) - dense
            if name == "MLP":
                width = solved["intermediate_size"]["after"]
        found["magnitude"] = perplexity(prune_by_magnitude(load(source), width), tokens) - dense
        figures = [f"{found[name]:+.2f}" for name in ("magnitude", "MLP", "paper", "all")]
        rows.append(f"| {seed} ({dense:.2f}) | {budget * 100:.0f} % | {width} of 128 | {' | '.join(figures)} |")
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def training_text() -> str:
    return "\n".join(path.read_text("utf-8", errors="ignore") for path in training_modules())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--write", type=Path, help="replace the table between the markers of this file")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    encode = tokenizer.backend_tokenizer.encode
    trained, judged = (torch.tensor(encode(text).ids) for text in (training_text(), read_modules(EVALUATION)))
    table = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model = train(trained, len(tokenizer), steps=args.steps, seed=seed)
            model.save_pretrained(folder / "source")
            tokenizer.save_pretrained(folder / "source")
            text = folder / "calibration.txt"
            text.write_text(read_modules(CALIBRATION), "utf-8")
            table += compare(folder / "source", text, judged, seed, folder)
    printed = "\n".join([*heading(HEADER), *table])
    print(printed)
    if args.write:
        write_between(args.write, "experts", printed)


if __name__ == "__main__":
    main()
