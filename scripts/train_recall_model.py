"""Train a small Llama that finds a token anywhere in its context of 1024, for `benchmarks/long_range.py`.

    python scripts/train_recall_model.py OUT [--seed 0] [--steps-scale 1]

The task is that of `recall_task.py`. Two layers suffice: a head of the first copies the previous token to each
position, and one of the second attends to the position whose previous token is the queried key. Gradient descent on a
CPU is slow to find this pair from random weights, so training starts from a rough sketch of it (`sketch_recall`).
Sequences grow from 64 to 1024 tokens; the loss is computed for the answers and, with less weight, for the filler.
Training takes about five minutes on one core. It writes a Hugging Face checkpoint (safetensors, tokenizer) and
`training.json`; the same seed gives the same model on the same machine with the same number of threads.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from recall_task import WORDS, Batch, accuracy_by_distance, answer_queries, make_batch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 1024
STAGES = ((64, 32, 150), (256, 8, 150), (1024, 4, 250))  # tokens per sequence, sequences per step, steps
PEAK_LR, WARMUP_STEPS, FILLER_WEIGHT = 2e-3, 30, 0.3
CONFIG = LlamaConfig(
    vocab_size=len(WORDS),
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=CONTEXT,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    initializer_range=0.06,
    bos_token_id=None,
    eos_token_id=None,
)
TEST_SEED = 2**40  # far from the seeds of training steps


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word; words are separated by blanks and line ends."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save it with the class name that transformers 4 and 5 both accept; the name that 5 writes is unknown to 4."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text("utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


@torch.no_grad()
def sketch_recall(model: LlamaForCausalLM) -> None:
    """Write a rough recall circuit into head 0 of both layers; at first nothing else adds to the residual stream.

    Channel 0 is equal in all embeddings: a constant, from which a query and a key depend on the position only.
    """
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight[:, 0] = 0.3
    first, second = (layer.self_attn for layer in model.model.layers)
    width, head = CONFIG.hidden_size, CONFIG.head_dim
    read, written, answer = (orthogonal(head, width) for _ in range(3))
    copy_head(first, read, written)
    copy_head(second, answer, answer)
    look_one_back(first)
    match(second, read, written)


def orthogonal(rows: int, columns: int) -> torch.Tensor:
    return torch.nn.init.orthogonal_(torch.empty(rows, columns))


def copy_head(attention: torch.nn.Module, read: torch.Tensor, written: torch.Tensor) -> None:
    """Make head 0 write its input, projected by `read` `[h, d]`, along the rows of `written` `[h, d]`."""
    attention.v_proj.weight[: len(read)] = read
    attention.o_proj.weight[:, : len(read)] = 0.07 * written.mT


def look_one_back(attention: torch.nn.Module) -> None:
    """Make head 0's score largest one token back: queries and keys are constants, one position apart in fast pairs."""
    head = CONFIG.head_dim
    fast = 3 * head // 16
    angle = 10000.0 ** (-2 * torch.arange(fast) / head)
    query, key = attention.q_proj.weight[:head], attention.k_proj.weight[:head]
    query.zero_()
    key.zero_()
    query[:fast, 0] = 1.2
    key[:fast, 0] = 1.2 * angle.cos()
    key[head // 2 : head // 2 + fast, 0] = 1.2 * angle.sin()


def match(attention: torch.nn.Module, read: torch.Tensor, written: torch.Tensor) -> None:
    """Make head 0's score large where the previous token (in the stream along `written`) is the current one.

    It uses the slowest eighth of the dims, which RoPE hardly rotates over the whole context.
    """
    head = CONFIG.head_dim
    slow = head // 8
    dims = torch.cat([torch.arange(head // 2 - slow, head // 2), torch.arange(head - slow, head)])
    mix = 1.5 * orthogonal(2 * slow, head)
    attention.q_proj.weight[dims] = mix @ read
    attention.k_proj.weight[dims] = mix @ written


def learning_rate(step: int, steps: int) -> float:
    """Return the rate: a linear warm-up, constant for half the steps, then linearly down to almost nothing."""
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS, 2 * (1 - step / steps) + 0.02)


def losses(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean cross-entropy of the answers and of the filler."""
    logits = model(batch.tokens, use_cache=False).logits
    sequence, place = batch.queries[:, 0], batch.queries[:, 1]
    answers = cross_entropy(logits[sequence, place], batch.answers())
    row, place = batch.is_filler().nonzero(as_tuple=True)
    return answers, cross_entropy(logits[row, place - 1], batch.tokens[row, place])


def train(model: LlamaForCausalLM, stages: list[tuple[int, int, int]], *, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    sizes = [(length, sequences) for length, sequences, steps in stages for _ in range(steps)]
    for step, (length, sequences) in enumerate(sizes):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(sizes))
        answers, filler = losses(model, make_batch(sequences, length, seed=seed * 10**6 + step))
        (answers + FILLER_WEIGHT * filler).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == len(sizes):
            print(f"step {step:4d}  length {length:4d}  answers {answers:.3f}  filler {filler:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies the steps of every stage")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(CONFIG)
    sketch_recall(model)
    stages = [(length, sequences, round(steps * args.steps_scale)) for length, sequences, steps in STAGES]
    start = time.monotonic()
    train(model, stages, seed=args.seed)
    minutes = (time.monotonic() - start) / 60

    model.eval().save_pretrained(args.out)
    save_tokenizer(build_tokenizer(), args.out)
    batch = make_batch(32, CONTEXT, seed=TEST_SEED)
    hits, filler = answer_queries(model, batch)
    accuracy = accuracy_by_distance(hits, batch.queries[:, 2])
    figures = {
        "seed": args.seed,
        "stages": stages,
        "minutes": round(minutes, 1),
        "parameters": model.num_parameters(),
        "filler_loss": round(filler, 4),
        "accuracy": {lowest: round(right / asked, 4) for lowest, (right, asked) in accuracy.items()},
    }
    (args.out / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
