"""The part of `loaders.py` that runs in another environment: load one export, compute outputs, print a JSON object.

    python loaders_probe.py EXPORT reference|transformers|vllm NEW_TOKENS

It imports nothing of a3. `tokens` is the greedy continuation of a fixed prompt, `logits` are those of fixed tokens, and
`log_probabilities` are those of each token given the tokens before it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

PROMPT, LOGITS_AT = 32, 64
SEED = 0


def fixed_tokens(vocabulary: int) -> torch.Tensor:
    """Return tokens `[1, 256]`, the same in every environment."""
    state = torch.Generator().manual_seed(SEED)
    return torch.randint(1, vocabulary, (1, 256), generator=state)


def main() -> None:
    folder, mode, new_tokens = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    config = json.loads((folder / "config.json").read_text("utf-8"))
    tokens = fixed_tokens(config["vocab_size"])
    answer = with_vllm if mode == "vllm" else with_transformers
    print(json.dumps(answer(folder, config, tokens, new_tokens, reference=mode == "reference")))


@torch.inference_mode()
def with_transformers(
    folder: Path, config: dict[str, Any], tokens: torch.Tensor, new_tokens: int, *, reference: bool
) -> dict[str, Any]:
    import transformers
    from transformers import AutoModelForCausalLM

    per_layer = "per_layer_config" in config
    # The default of transformers 4.57 does not cap Gemma 2's attention scores.
    kernel = {"attn_implementation": "eager"} if config["model_type"] == "gemma2" and not per_layer else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=per_layer, **kernel
    )
    incomplete = [name for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]]
    if incomplete:
        raise RuntimeError(f"{incomplete}: {[info[name] for name in incomplete]}")
    model.eval()
    logits = model(tokens).logits
    prompt = tokens[:, :PROMPT]
    model.generation_config.eos_token_id = None  # go on behind it, as vLLM's ignore_eos does
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options)
    result = {
        "runtime": f"transformers {transformers.__version__}",
        "tokens": plain[0, PROMPT:].tolist(),
        "logits": logits[0, :: len(tokens[0]) // LOGITS_AT].flatten().tolist(),
        "log_probabilities": logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].tolist(),
        "checks": {},
    }
    if reference:
        return result
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **options)
    checks = {
        "generation with a cache": torch.equal(cached, plain),
        "token by token": close(token_by_token(model, tokens), logits),
        "left padding": left_padding(model, tokens),
    }
    if static_cache_is_claimed(config, transformers.__version__):
        static = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            cache_implementation="static",
            disable_compile=True,
            **options,
        )
        checks["static cache"] = torch.equal(static, plain)
    return {**result, "checks": checks}


def static_cache_is_claimed(config: dict[str, Any], version: str) -> bool:
    """Return docs/formats.md's claim: a static cache works except in 4.57 for layers whose QK and OV sizes differ."""
    layers = config.get("per_layer_config", {}).values()
    return version.startswith("5") or all(each["qk_head_dim"] == each["v_head_dim"] for each in layers)


def token_by_token(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of every token: half of them computed at once, the rest one by one with the cache."""
    half = tokens.shape[1] // 2
    first = model(tokens[:, :half], use_cache=True)
    cache, found = cache_of(first), [first.logits]
    for place in range(half, tokens.shape[1]):
        mask = torch.ones(1, place + 1, dtype=torch.long)
        step = model(tokens[:, place : place + 1], attention_mask=mask, use_cache=True, **cache)
        cache = cache_of(step)
        found.append(step.logits)
    return torch.cat(found, 1)


def cache_of(output: Any) -> dict[str, Any]:
    """Return the cache of a forward pass under the name that this version of transformers uses."""
    return {name: output[name] for name in ("past_key_values", "cache") if output.get(name) is not None}


def left_padding(model: Any, tokens: torch.Tensor) -> bool:
    """Return whether a prompt has the same continuation alone and with left padding beside a longer one."""
    long, short = tokens[:, :48], tokens[:, 64:96]
    padded = torch.cat([torch.zeros(1, 16, dtype=torch.long), short], 1)
    mask = torch.ones(2, 48, dtype=torch.long)
    mask[1, :16] = 0
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    both = model.generate(torch.cat([long, padded]), attention_mask=mask, **options)
    alone = [model.generate(each, attention_mask=torch.ones_like(each), **options) for each in (long, short)]
    return torch.equal(both[0, 48:], alone[0][0, 48:]) and torch.equal(both[1, 48:], alone[1][0, 32:])


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() < 1e-3)


def with_vllm(
    folder: Path, config: dict[str, Any], tokens: torch.Tensor, new_tokens: int, *, reference: bool
) -> dict[str, Any]:
    """Return vLLM's log-probabilities in place of logits."""
    import vllm

    assert not reference
    per_layer = "per_layer_config" in config
    model = vllm.LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        trust_remote_code=per_layer,
        model_impl="transformers" if per_layer else "auto",
        max_model_len=384,
        gpu_memory_utilization=0.3,  # a share of the CPU's memory, despite its name
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    ids = tokens[0].tolist()
    greedy = vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    judged = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (continued,) = model.generate([{"prompt_token_ids": ids[:PROMPT]}], greedy, use_tqdm=False)
    (prompt,) = model.generate([{"prompt_token_ids": ids}], judged, use_tqdm=False)
    return {
        "runtime": f"vLLM {vllm.__version__}",
        "tokens": list(continued.outputs[0].token_ids),
        "log_probabilities": [
            each[token].logprob for each, token in zip(prompt.prompt_logprobs[1:], ids[1:], strict=True)
        ],
        "checks": {},
    }


if __name__ == "__main__":
    main()
