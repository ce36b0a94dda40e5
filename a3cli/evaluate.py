"""Perplexity the way the papers measure it, and how far a model is from its source.

Text is cut into consecutive blocks of `seq_len` (the last one shorter); in each block every token but the
first is predicted once. Perplexity is the exponential of the mean over all predicted tokens.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from a3cli.checkpoint import Checkpoint, resolve_model
from a3cli.errors import A3Error
from a3cli.machine import Machine, choose_machine
from a3cli.settings import EvalSettings
from a3cli.text import check_fit, evaluation_blocks, load_tokenizer
from a3cli.work import Json


@torch.inference_mode()
def evaluate(settings: EvalSettings) -> Json:
    """Perplexity of a model; with `against`, also the source's, KL(source ‖ model) in nats and top-1 agreement.

    Raises A3Error for a model that does not load whole, too little text, or a loss that is not finite.
    """
    checkpoint = resolve_model(settings.model, settings.revision)
    reference = resolve_model(settings.against, settings.against_revision) if settings.against else None
    for each in (checkpoint, reference):
        if each and "per_layer_config" in each.config and not settings.trust_remote_code:
            raise A3Error(
                f"{each.name}: its layers differ in size, and only the code in its folder builds them; "
                "use --trust-remote-code to run that code"
            )
    machine = choose_machine(settings.device, settings.dtype, checkpoint.dtype)
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=settings.trust_remote_code)
    blocks = evaluation_blocks(tokenizer, settings.text)
    check_fit(blocks, checkpoint.config, checkpoint.name)
    model = load_model(checkpoint, machine, settings)
    source = load_model(reference, machine, settings) if reference else None
    if source is not None and reference is not None:
        check_vocabularies(model, source, checkpoint.name, reference.name)

    measured = compare(
        model,
        source,
        blocks,
        batch_size=settings.batch_size,
        device=machine.device,
        name=checkpoint.name,
        source_name=reference.name if reference else "",
    )
    tokens_read = sum(len(block) for block in blocks)
    result: Json = {
        "model": checkpoint.name,
        "dataset": settings.text.dataset,
        "seq_len": settings.text.seq_len,
        "blocks": len(blocks),
        "tokens": tokens_read,
        "tokens_per_second": tokens_read / measured.pop("seconds"),
        "device": str(machine.device),
        "dtype": str(machine.dtype).removeprefix("torch."),
    }
    if reference is not None:
        result["against"] = reference.name
    return result | measured


@torch.inference_mode()
def compare(
    model: Any,
    source: Any | None,
    blocks: list[torch.Tensor],
    *,
    batch_size: int,
    device: torch.device,
    name: str,
    source_name: str,
) -> Json:
    """The measures of a loaded model over blocks of tokens, and the seconds its own forwards took.

    Raises A3Error if a loss is not finite; the names are for its message.
    """
    nll, source_nll, kl, agreed, predicted, seconds = 0.0, 0.0, 0.0, 0, 0, 0.0
    for batch in batches(blocks, batch_size):
        started = time.perf_counter()
        logits = model(batch.to(device), use_cache=False).logits
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started
        source_logits = source(batch.to(device), use_cache=False).logits if source is not None else None
        for row, tokens in enumerate(batch):
            log_p = logits[row, :-1].float().log_softmax(-1)
            nll += negative_log_likelihood(log_p, tokens, name)
            predicted += len(tokens) - 1
            if source_logits is not None:
                log_q = source_logits[row, :-1].float().log_softmax(-1)
                source_nll += negative_log_likelihood(log_q, tokens, source_name)
                kl += (log_q.exp() * (log_q - log_p)).sum(dtype=torch.float64).item()
                agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    result: Json = {"predicted_tokens": predicted, "perplexity": math.exp(nll / predicted), "seconds": seconds}
    if source is not None:
        source_perplexity = math.exp(source_nll / predicted)
        result |= {
            "source_perplexity": source_perplexity,
            "perplexity_increase": result["perplexity"] - source_perplexity,
            "kl": kl / predicted,
            "top1_agreement": agreed / predicted,
        }
    return result


def load_model(checkpoint: Checkpoint, machine: Machine, settings: EvalSettings) -> Any:
    """The model as transformers loads it. Raises A3Error if any weight is missing or does not fit."""
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=machine.dtype,
            device_map="auto" if machine.device.type == "cuda" and settings.device == "auto" else str(machine.device),
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below; transformers' own error names no tensor
        )
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise A3Error(f"{checkpoint.name} does not load: {' '.join(str(error).split())[:500]}") from error
    problems = [f"{name} is missing" for name in info["missing_keys"]]
    problems += [f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    if problems:
        raise A3Error(f"{checkpoint.name} does not load whole: {'; '.join(sorted(problems)[:5])}")
    return model.eval()


def batches(blocks: list[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """Blocks of one length together, in order: `[B, T]`."""
    full = [block for block in blocks if len(block) == len(blocks[0])]
    for start in range(0, len(full), size):
        yield torch.stack(full[start : start + size])
    for block in blocks[len(full) :]:
        if len(block) > 1:  # one token alone predicts nothing
            yield block[None]


def negative_log_likelihood(log_p: torch.Tensor, tokens: torch.Tensor, name: str) -> float:
    """Sum over the predicted tokens of one block. Raises A3Error if it is not finite."""
    targets = tokens[1:].to(log_p.device)
    total = -log_p.gather(-1, targets[:, None]).sum(dtype=torch.float64).item()
    if not math.isfinite(total):
        raise A3Error(f"{name}: the loss is not finite; use --dtype float32, or the model is damaged")
    return total


def check_vocabularies(model: Any, source: Any, name: str, source_name: str) -> None:
    sizes = [each.config.get_text_config().vocab_size for each in (model, source)]
    if sizes[0] != sizes[1]:
        raise A3Error(
            f"{name} and {source_name} have vocabularies of {sizes[0]} and {sizes[1]} tokens; "
            "only models with the same tokenizer can be compared"
        )
