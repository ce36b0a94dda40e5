"""Which runtimes load an export, from its config.json alone. docs/formats.md says how each was checked."""

from typing import Any

# Whose head size vLLM and llama.cpp take to be hidden size over heads.
WITHOUT_HEAD_DIM = {"qwen2": "Qwen2", "starcoder2": "Starcoder2"}


def describe_loaders(config: dict[str, Any]) -> str:
    """What loads an export with this config.json, in one line."""
    if "per_layer_config" in config:
        return (
            "transformers 4.57 and 5 with trust_remote_code=True (the code is in the folder); vLLM only through its "
            "Transformers backend, llama.cpp not at all"
        )
    name = WITHOUT_HEAD_DIM.get(config.get("model_type", ""))
    if name and not _heads_make_the_width(config):
        return (
            f"stock transformers 4.57 and 5; the {name} of vLLM and of llama.cpp does not read head_dim, so they load "
            "only exports whose heads keep their size (--components mlp)"
        )
    if config.get("model_type") == "starcoder2":
        return (
            "stock transformers 4.57 and 5, and vLLM and llama.cpp where they load the source: only the MLP is smaller"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if config.get("model_type") == "nemotron":
        scaled = kind not in (None, "default")
        return f"stock transformers {'5; that of 4.57 leaves RoPE unscaled without a word' if scaled else '4.57 and 5'}"
    if kind == "longrope":
        return "stock transformers 4.57 and 5, and vLLM; llama.cpp's converter drops longrope factors without a word"
    return "stock transformers 4.57 and 5, vLLM and llama.cpp"


def _heads_make_the_width(config: dict[str, Any]) -> bool:
    heads = config["num_attention_heads"]
    return bool((config.get("head_dim") or config["hidden_size"] // heads) * heads == config["hidden_size"])
