"""Decide which runtimes load an export, for `a3 plan`, `a3 export`, the model card and docs/formats.md.

"yes": it was run and gave the same greedy tokens and logits as transformers; docs/formats.md names the releases.
"no": it fails to load, or loads and computes something else. "untried": it was not run.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Loads = Literal["yes", "no", "untried"]
YES: Loads = "yes"
NO: Loads = "no"
UNTRIED: Loads = "untried"
# model_type → runtimes whose class of that name ignores head_dim and uses hidden_size / heads.
IGNORES_HEAD_DIM = {
    "llama": ("CTranslate2",),
    "qwen2": ("vLLM", "llama.cpp", "MLX", "CTranslate2"),
    "starcoder2": ("llama.cpp",),
}
# Model types with which smaller heads were tried: under vLLM, and under the other runtimes.
TRIED_UNDER_VLLM = ("llama", "mistral", "granite", "starcoder2", "nemotron", "qwen3", "gemma3_text")
TRIED = ("llama", "mistral")
_THROUGH_BACKEND: tuple[Loads, str] = (YES, "with --model-impl transformers --trust-remote-code")
# Whether vLLM's Transformers backend loads per-layer exports, by model type.
_TRIED_THROUGH_BACKEND = (
    *("gemma3_text", "granite", "llama", "ministral3", "mistral", "nemotron"),
    *("olmo2", "qwen2", "qwen3", "smollm3"),
)
VLLM_PER_LAYER: dict[str, tuple[Loads, str]] = {
    **dict.fromkeys(_TRIED_THROUGH_BACKEND, _THROUGH_BACKEND),
    **{
        model_type: (NO, f"its Transformers backend stops with an error for {model_type}")
        for model_type in ("gpt2", "mixtral", "mpt", "opt", "qwen3_5_text", "starcoder2")
    },
}
# Model types whose own class vLLM does not load on a CPU, the only place where a3's exports were tried with it.
NOT_ON_A_CPU = ("qwen3_5_text",)
# RoPE's theta in transformers 4.57 where config.json has none; 10,000 for other model types.
THETA_OF_4 = {"smollm3": 2_000_000, "gemma3_text": 1_000_000, "mixtral": 1_000_000}
LOCAL_THETA_OF_4 = 10_000  # of sliding attention, in models that have another RoPE for it
# The rotated part of a head in transformers 4.57 where config.json has none; all of it for other model types.
PARTIAL_OF_4 = {"nemotron": 0.5}
# The entries of rope_scaling that 4.57 demands for a model type, and no others.
STRICT_SCALING = {"phi3": {"type", "short_factor", "long_factor"}}
# Model types with experts, which were tried with transformers alone.
WITH_EXPERTS = ("mixtral", "qwen3_moe")
# Model types that transformers 4.57 does not have.
NOT_IN_4 = ("ministral3", "qwen3_5_text")
# The release of transformers 5 from which on it has a model type; 5.0 for other model types.
SINCE = {"qwen3_5_text": "5.2"}
# Head sizes that vLLM accepts on a CPU.
VLLM_CPU_HEADS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)


@dataclass(frozen=True)
class Verdict:
    """Whether one runtime loads an export; `note` is the reason if it does not, or a condition."""

    runtime: str
    loads: Loads
    note: str = ""


@dataclass(frozen=True)
class Export:
    """The properties of an export on which the rules depend.

    `rope` is the RoPE type in config.json; it is `default` if only theta was changed.
    """

    model_type: str
    per_layer: bool
    smaller_heads: bool
    head_dim: int
    rope: str
    own_tokenizer_class: bool  # a tokenizer class that transformers 4 does not have
    hidden_rope: bool  # RoPE that transformers 4 does not find in config.json
    refused_rope: bool  # RoPE that transformers 4 refuses to read
    local_rope: str  # the RoPE type of sliding attention, if it has a table of its own
    held_by: str | None  # the model type around the decoder
    could_be_llama: bool  # `a3 export --as llama` would write it
    retyped: bool  # model_type is not the source's


def judge(
    config: dict[str, Any],
    *,
    smaller_heads: bool,
    tokenizer_class: str | None = None,
    could_be_llama: bool = False,
    retyped: bool = False,
    held_by: str | None = None,
) -> list[Verdict]:
    """Return one verdict per runtime for an export whose config.json says this of the decoder.

    `smaller_heads`: query and key heads are smaller than the source's. `tokenizer_class` is that of
    tokenizer_config.json, if there is one. `could_be_llama`: `a3 export --as llama` would write the same model.
    `retyped`: it did, so what loads the source says nothing.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    local = rope.get("sliding_attention") or {}  # Gemma 3 has a table for each type of attention
    rope = rope.get("full_attention") or rope
    export = Export(
        model_type=str(config.get("model_type")),
        per_layer="per_layer_config" in config,
        smaller_heads=smaller_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        rope=str(rope.get("rope_type", rope.get("type", "default"))),
        own_tokenizer_class=tokenizer_class == "TokenizersBackend",
        hidden_rope=hides_rope(config),
        refused_rope=refuses_rope(config),
        local_rope=str(local.get("rope_type", "default")),
        held_by=held_by,
        could_be_llama=could_be_llama,
        retyped=retyped,
    )
    return [_judge_one(runtime, rule, export) for runtime, rule in RULES.items()]


def hides_rope(config: dict[str, Any]) -> bool:
    """Return whether transformers 4 would take its default RoPE for another: it does not read `rope_parameters`."""
    said, kind = config.get("rope_parameters") or {}, str(config.get("model_type"))
    defaults = {"rope_type": "default", "rope_theta": THETA_OF_4.get(kind, 10_000)}
    if "partial_rotary_factor" not in config:
        defaults["partial_rotary_factor"] = PARTIAL_OF_4.get(kind, 1.0)
    full, local = said.get("full_attention") or said, said.get("sliding_attention") or {}
    hidden = "rope_theta" not in config and any(full.get(key, value) != value for key, value in defaults.items())
    sliding = local.get("rope_theta", LOCAL_THETA_OF_4) != LOCAL_THETA_OF_4
    return hidden or (sliding and "rope_local_base_freq" not in config)


def refuses_rope(config: dict[str, Any]) -> bool:
    """Return whether the configuration class of transformers 4 refuses the entries of `rope_scaling`."""
    scaling, demanded = config.get("rope_scaling") or {}, STRICT_SCALING.get(str(config.get("model_type")))
    return bool(scaling) and demanded is not None and scaling.keys() != demanded


def tokenizer_class_of(folder: Path) -> str | None:
    """Return the class that tokenizer_config.json names; None if there is no such file, or it names none."""
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def summarise(verdicts: Sequence[Verdict]) -> str:
    """Return one line: the runtimes that load the export, then those that do not, with the reason."""
    loading = ", ".join(each.runtime for each in verdicts if each.loads == YES)
    refusing = "; ".join(f"{each.runtime} ({each.note})" for each in verdicts if each.loads == NO)
    return f"{loading}; not with {refusing}" if refusing else loading


def _judge_one(runtime: str, rule: Callable[[Export], tuple[Loads, str]], export: Export) -> Verdict:
    if runtime.startswith("transformers"):
        return Verdict(runtime, *rule(export))
    if export.smaller_heads and not export.per_layer and runtime in IGNORES_HEAD_DIM.get(export.model_type, ()):
        as_llama = export.could_be_llama and runtime not in IGNORES_HEAD_DIM["llama"]
        remedy = "export with --as llama" if as_llama else "use --components mlp to keep heads whole"
        return Verdict(runtime, NO, f"its class for {export.model_type} ignores head_dim; {remedy}")
    if untried := _untried(runtime, export):
        return Verdict(runtime, UNTRIED, untried)
    if not export.per_layer and not export.smaller_heads and not export.retyped:
        return Verdict(runtime, YES, "as it loads the source: heads and RoPE are the source's")
    return Verdict(runtime, *rule(export))


def _untried(runtime: str, export: Export) -> str:
    """Return what of a stock export was not tried with this runtime."""
    if export.per_layer:
        return ""
    if export.model_type in WITH_EXPERTS:
        return f"not tried with {export.model_type}"
    if runtime == "vLLM" and export.model_type in NOT_ON_A_CPU:
        return f"not tried with {export.model_type}, whose class it does not load on a CPU"
    if not export.smaller_heads and not export.retyped:
        return ""
    whole = export.held_by or export.model_type
    if whole not in (TRIED_UNDER_VLLM if runtime == "vLLM" else TRIED):
        return f"not tried with {whole} and smaller heads"
    return "not tried with RoPE type llama3 and smaller heads" if export.rope == "llama3" and runtime != "vLLM" else ""


def _transformers_5(export: Export) -> tuple[Loads, str]:
    notes = ["with trust_remote_code=True: the code is in the folder"] if export.per_layer else []
    if export.model_type in SINCE:
        notes.append(f"from {SINCE[export.model_type]} on")
    return YES, "; ".join(notes)


def _transformers_4(export: Export) -> tuple[Loads, str]:
    if export.model_type in NOT_IN_4:
        return NO, f"does not have {export.model_type}"
    if export.held_by:
        return UNTRIED, f"not tried with a decoder in {export.held_by}"
    if refusal := _rope_unknown_to_4(export):
        return NO, refusal
    notes = ["with trust_remote_code=True"] if export.per_layer else []
    if export.model_type == "gemma2" and not export.per_layer:
        notes.append('with attn_implementation="eager": its default does not cap attention scores')
    if export.own_tokenizer_class:
        notes.append("not the tokenizer: transformers 5 saved it as TokenizersBackend, use PreTrainedTokenizerFast")
    return YES, "; ".join(notes)


def _rope_unknown_to_4(export: Export) -> str | None:
    """Return why transformers 4 does not compute what RoPE in config.json says, or None if it does."""
    if export.model_type == "nemotron" and export.rope != "default":
        return f"its Nemotron class ignores RoPE type {export.rope} silently"
    if export.refused_rope:
        return f"its {export.model_type} configuration refuses what rope_scaling has beside type and factors"
    if export.local_rope != "default":
        return "has no RoPE factors for sliding attention; use --rope-form theta"
    if export.hidden_rope and not export.per_layer and not export.smaller_heads:
        return "takes another RoPE silently, as of the source: config.json says it only in rope_parameters"
    return None


def _vllm(export: Export) -> tuple[Loads, str]:
    if export.per_layer:
        return VLLM_PER_LAYER.get(export.model_type, (UNTRIED, f"not tried with {export.model_type} per-layer"))
    if export.model_type == "nemotron" and export.rope != "default":
        return UNTRIED, f"not tried with nemotron and RoPE type {export.rope}"
    notes = ["advertises a longer context: multiplies it by the RoPE factor"] if export.rope == "linear" else []
    if export.head_dim not in VLLM_CPU_HEADS:
        notes.append(f"not on a CPU, where it refuses head size {export.head_dim}; use --head-multiple 16")
    return YES, "; ".join(notes)


def _llama_cpp(export: Export) -> tuple[Loads, str]:
    if export.per_layer:
        return NO, "has no layers that differ in head size"
    if export.rope == "longrope":
        return NO, "its converter drops the longrope factors silently; use --rope-form theta"
    return YES, ""


def _openvino(export: Export) -> tuple[Loads, str]:
    return (NO, "tracing the code in the folder fails") if export.per_layer else (YES, "through optimum-intel")


def _onnx_runtime(export: Export) -> tuple[Loads, str]:
    if export.per_layer:
        return NO, "its builder does not know the architecture"
    if export.rope in ("longrope", "linear"):
        return NO, f"its builder ignores RoPE type {export.rope} silently; use --rope-form theta"
    if export.head_dim % 16:
        return NO, f"head size {export.head_dim} is not a multiple of 16; use --head-multiple 16"
    return YES, ""


def _mlx(export: Export) -> tuple[Loads, str]:
    return (NO, "refuses the shapes of layers that differ") if export.per_layer else (YES, "")


def _ctranslate2(export: Export) -> tuple[Loads, str]:
    if export.per_layer:
        return NO, "has no layers that differ in head size"
    if export.rope == "longrope":
        return NO, "has no longrope for this architecture; use --rope-form theta"
    return YES, ""


RULES: dict[str, Callable[[Export], tuple[Loads, str]]] = {
    "transformers 5": _transformers_5,
    "transformers 4.57": _transformers_4,
    "vLLM": _vllm,
    "llama.cpp": _llama_cpp,
    "OpenVINO": _openvino,
    "ONNX Runtime GenAI": _onnx_runtime,
    "MLX": _mlx,
    "CTranslate2": _ctranslate2,
}
