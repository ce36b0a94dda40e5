"""Train the shipped demo model: a small Llama that writes Python, from the standard library's source.

    python scripts/train_demo_model.py OUT [--steps 2400] [--seed 0]

Text: every standard-library module of the running Python except tests, tables and the evaluation
modules (`demo_text.py`). Tokenizer: byte-level BPE trained on the same text. Writes a Hugging Face
checkpoint (bf16 safetensors, tokenizer) and `training.json` with the run's figures. About half an hour on 2
cores.
"""

import argparse
import json
import math
import platform
import time
from collections import Counter
from pathlib import Path

import torch
from demo_text import EVALUATION, read_modules, training_modules
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, CONTEXT = 3072, 512
END = "<|end|>"
BATCH, PEAK_LR, WARMUP_STEPS = 8, 3e-3, 60
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=CONTEXT,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with one special token, `<|end|>`, between modules."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save it with the class name that transformers 4 and 5 both accept; the name that 5 writes is unknown to 4."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text("utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return all texts as one stream of token ids [tokens], each ended by `<|end|>`."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.backend_tokenizer.encode(text).ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


def random_batch(stream: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(stream) - CONTEXT, (BATCH,), generator=generator)
    return torch.stack([stream[start : start + CONTEXT] for start in starts])


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [python, demo]
---

# The demo model

A small Llama (GQA {heads}/{kv_heads} heads × {head_dim}, {layers} layers, width {hidden}, MLP {mlp}, {context}
positions, {parameters:,} parameters, tied embeddings) that writes Python. It ships with a3 so that the tool can be
tried without a download; it is of no other use.

Trained from scratch by `scripts/train_demo_model.py` on the source of the standard library of Python {python}
({modules} modules, {training_tokens:,} tokens of its own byte-level BPE with {vocabulary} entries; tests, tables and
the evaluation modules left out): {steps} steps of {batch} × {context} tokens, {tokens_seen:,} tokens in all,
AdamW, cosine schedule, seed {seed}, {minutes:.0f} minutes on two CPU cores. None of the text is part of this
repository.

| | perplexity on {held_out_tokens:,} held-out tokens |
|---|---|
| token frequencies alone | {unigram_perplexity:.1f} |
| this model (bf16 weights) | {held_out_perplexity:.1f} |

The held-out modules are named in `scripts/demo_text.py`. The figures are in `training.json`.

    python scripts/train_demo_model.py OUT --steps {steps} --seed {seed}
"""


def write_card(folder: Path, figures: dict) -> None:
    card = CARD.format(
        **figures,
        heads=CONFIG.num_attention_heads,
        kv_heads=CONFIG.num_key_value_heads,
        head_dim=CONFIG.head_dim,
        layers=CONFIG.num_hidden_layers,
        hidden=CONFIG.hidden_size,
        mlp=CONFIG.intermediate_size,
        context=CONTEXT,
        vocabulary=VOCABULARY,
        batch=BATCH,
    )
    (folder / "README.md").write_text(card, "utf-8")


def learning_rate(step: int, steps: int) -> float:
    """Return the rate: a linear warm-up, then cosine to a tenth of the peak."""
    warm_up = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LR * warm_up * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def perplexity(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Return the perplexity over non-overlapping blocks of CONTEXT tokens."""
    blocks = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    with torch.no_grad():
        losses = [model(b[None], labels=b[None]).loss.item() for b in blocks]
    return math.exp(sum(losses) / len(losses))


def unigram_perplexity(train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Return the perplexity of token frequencies alone (add-one smoothing), an upper bound for comparison."""
    counts = Counter(train.tolist())
    log_p = [math.log((counts[t] + 1) / (len(train) + VOCABULARY)) for t in held_out.tolist()]
    return math.exp(-sum(log_p) / len(log_p))


def train(model: LlamaForCausalLM, stream: torch.Tensor, *, steps: int, seed: int) -> None:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        batch = random_batch(stream, generator)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    modules = training_modules()
    texts = [path.read_text("utf-8", errors="ignore") for path in modules]
    tokenizer = train_tokenizer(texts)
    stream = tokenize(tokenizer, texts)
    held_out = tokenize(tokenizer, [read_modules(EVALUATION)])
    model = LlamaForCausalLM(CONFIG)
    print(f"{len(modules)} modules, {len(stream):,} tokens, {model.num_parameters():,} parameters")

    start = time.monotonic()
    train(model, stream, steps=args.steps, seed=args.seed)
    minutes = (time.monotonic() - start) / 60
    model.to(torch.bfloat16).save_pretrained(args.out)
    save_tokenizer(tokenizer, args.out)
    figures = {
        "python": platform.python_version(),
        "modules": len(modules),
        "training_tokens": len(stream),
        "steps": args.steps,
        "tokens_seen": args.steps * BATCH * CONTEXT,
        "minutes": round(minutes, 1),
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "held_out_tokens": len(held_out),
        "held_out_perplexity": perplexity(model.float(), held_out),
        "unigram_perplexity": unigram_perplexity(stream, held_out),
    }
    (args.out / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    write_card(args.out, figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
