"""Let a model and its source continue the same prompts: what compression did to the text that a user reads.

Models are loaded one after the other, so that only one is in memory. Each prompt is continued alone, with the random
numbers of the same seed: a continuation depends neither on the other prompts nor on the other model.
"""

import logging
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from a3cli.errors import A3Error, first_line
from a3cli.models.checkpoint import Checkpoint
from a3cli.models.families import usual_entries
from a3cli.models.model import check_size
from a3cli.settings.generation import GenerateSettings
from a3cli.stages.answers import available_memory, load_model
from a3cli.stages.evaluate import open_checkpoints
from a3cli.text.blocks import check_fit
from a3cli.text.tokenizer import load_tokenizer
from a3cli.work.files import Json
from a3cli.work.machine import Machine, choose_machine, return_freed_memory

log = logging.getLogger(__name__)


@torch.inference_mode()
def generate(settings: GenerateSettings) -> Json:
    """Return each prompt with the continuations of `model` and `against`: text, tokens, and whether it came to an end.

    With `against`, `same_tokens` is the number of tokens before the first that differs.
    Raises A3Error if there is no prompt, for one that does not fit the context, and for a model that does not load.
    """
    prompts = read_prompts(settings)
    checkpoints = open_checkpoints(settings)
    for checkpoint in checkpoints:
        check_size(checkpoint)  # before transformers reads it
    machine = choose_machine(settings.device, settings.dtype, checkpoints[0].dtype)
    tokenizers = [load_tokenizer(each.folder, trust_remote_code=settings.trust_remote_code) for each in checkpoints]
    tokens = [
        [tokenize(tokenizer, checkpoint, prompt, settings) for prompt in prompts]
        for tokenizer, checkpoint in zip(tokenizers, checkpoints, strict=True)
    ]
    roles = ("model", "against")[: len(checkpoints)]
    found = [
        continue_all(checkpoint, tokenizer, own, machine, settings)
        for checkpoint, tokenizer, own in zip(checkpoints, tokenizers, tokens, strict=True)
    ]
    return {
        **dict(zip(roles, (each.name for each in checkpoints), strict=True)),
        "device": str(machine.device),
        "dtype": str(machine.dtype).removeprefix("torch."),
        **settings.model_dump(include={"max_new_tokens", "temperature", "seed"}),
        "prompts": [
            describe(prompt, dict(zip(roles, both, strict=True))) for prompt, *both in zip(prompts, *found, strict=True)
        ],
    }


def describe(prompt: str, continuations: dict[str, Json]) -> Json:
    """Return a prompt with its continuations by role and, of two, how many of the first tokens they share."""
    described: Json = {"prompt": prompt, **continuations}
    if len(continuations) > 1:
        pairs = zip(*(each["tokens"] for each in continuations.values()), strict=False)
        described["same_tokens"] = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return described


def read_prompts(settings: GenerateSettings) -> list[str]:
    """Return the prompts of the options, then the file's lines without empty ones. Raises A3Error if none is left."""
    prompts = list(settings.prompt)
    if settings.prompts is not None:
        try:
            prompts += filter(str.strip, settings.prompts.read_text("utf-8-sig").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise A3Error(
                f"--prompts {settings.prompts} cannot be read: {first_line(error)}; give a UTF-8 file with one prompt "
                "per line"
            ) from None
    if not prompts:
        raise A3Error("nothing to continue: give --prompt TEXT, or --prompts FILE with one prompt per line")
    return prompts


def tokenize(tokenizer: Any, checkpoint: Checkpoint, prompt: str, settings: GenerateSettings) -> list[int]:
    """Return a prompt's tokens. Raises A3Error if there are none, too many, or some without an embedding."""
    try:
        tokens = list(tokenizer(prompt)["input_ids"])
    except Exception as error:  # tokenizer settings that no library checks on loading
        raise A3Error(f"{checkpoint.name}: the tokenizer fails: {first_line(error)}") from error
    if not tokens:
        raise A3Error(f"--prompt {prompt!r}: the tokenizer of {checkpoint.name} makes no token of it; give another")
    context = usual_entries(checkpoint.config).get("max_position_embeddings")
    if isinstance(context, int) and len(tokens) + settings.max_new_tokens > context:
        shown = prompt if len(prompt) <= 40 else f"{prompt[:40]}…"
        raise A3Error(
            f"--prompt {shown!r} has {len(tokens)} tokens, which with --max-new-tokens {settings.max_new_tokens} is "
            f"more than the context of {checkpoint.name} ({context}); use fewer"
        )
    check_fit([torch.tensor(tokens)], usual_entries(checkpoint.config), checkpoint.name)
    return tokens


def continue_all(
    checkpoint: Checkpoint, tokenizer: Any, prompts: Sequence[list[int]], machine: Machine, settings: GenerateSettings
) -> list[Json]:
    """Return a model's continuation of each prompt; the model is in memory meanwhile."""
    needed, free = checkpoint.parameters() * machine.dtype.itemsize, available_memory(machine, settings)
    if needed > free:
        raise A3Error(
            f"{checkpoint.name} needs {needed / 1e9:.2f} GB to generate, {max(0, free) / 1e9:.2f} GB are free; free "
            "some, or use --dtype bfloat16"
        )
    log.info("%s continues %d prompt%s", checkpoint.name, len(prompts), "s" if len(prompts) > 1 else "")
    model = load_model(checkpoint, machine, settings)
    ends = end_tokens(model.generation_config.eos_token_id)
    found = []
    for prompt in prompts:
        written = choose_tokens(model, checkpoint.name, prompt, ends, settings)
        text = tokenizer.decode(written, skip_special_tokens=True)
        found.append({"text": text, "tokens": written, "ended": written[-1] in ends})
    del model
    return_freed_memory()
    return found


def end_tokens(configured: int | list[int] | None) -> set[int]:
    """Return the tokens that end a text, as generation_config.json has them."""
    return set(configured) if isinstance(configured, list) else set() if configured is None else {configured}


def choose_tokens(model: Any, name: str, prompt: list[int], ends: set[int], settings: GenerateSettings) -> list[int]:
    """Return the tokens that follow a prompt, up to one of `ends` or the maximum.

    Penalties and limits of the model's own generation_config.json are not applied: they would hide differences.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    tokens, cache, written = torch.tensor([prompt], device=model.device), None, list[int]()
    while len(written) < settings.max_new_tokens and not ends.intersection(written[-1:]):
        answer = model(tokens, past_key_values=cache, use_cache=True)
        logits = answer.logits[0, -1].float().cpu()
        if not logits.isfinite().all():
            raise A3Error(
                f"{name}: the logits of token {len(prompt) + len(written) + 1} are not finite; use --dtype float32; if "
                "that fails too, the model is damaged"
            )
        written.append(choose_token(logits, settings.temperature, generator))
        tokens, cache = tokens.new_tensor([written[-1:]]), answer.past_key_values
    return written


def choose_token(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """Return the likeliest token for these logits `[V]`, or one drawn from their distribution at a temperature."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.double() / temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
