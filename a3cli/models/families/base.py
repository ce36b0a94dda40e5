"""Families as data: roles → module paths, and the sizes that the mathematics needs.

The rest of the package asks for roles (`q`, `down`, …), never for names of modules or tensors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from a3cli.errors import A3Error

Role = Literal["q", "k", "v", "o", "mlp_norm", "gate", "up", "down"]


@dataclass(frozen=True)
class Family:
    """Where a model type keeps its parts. Linear weights are `[out, in]`, rotated pairs `(p, p + h/2)`, of a head of
    which RoPE turns only the first r dims `(p, p + r/2)`.

    `modules` maps a role to the module path inside one decoder layer; q, k, v, o, gate, up and down are
    the linear weights that a budget counts; `mlp_norm` is where the MLP reads the residual stream. Without a gate
    the MLP is `down(act(up(x)))`.
    """

    modules: dict[Role, str]
    per_layer_class: str  # in models/shipped/
    qkv_bias: bool = False  # q, k and v always have biases, o never, and config.json does not say so
    use_bias: bool = False  # config.json's use_bias, true unless it says otherwise, gives biases to all linear layers
    norm_bias: bool = False
    tied: bool = False  # what tie_word_embeddings is where config.json does not say it
    rotary_factor: float | None = None  # share of a head that RoPE turns where config.json does not say it; None: all
    decoder: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"

    @property
    def gated(self) -> bool:
        return "gate" in self.modules

    def tensor(self, layer: int, role: Role, kind: Literal["weight", "bias"] = "weight") -> str:
        """The checkpoint's name of one tensor."""
        return f"{self.layers}.{layer}.{self.modules[role]}.{kind}"

    def layer_prefix(self, layer: int) -> str:
        return f"{self.layers}.{layer}."

    def find_role(self, tensor: str) -> tuple[int, Role, str] | None:
        """(layer, role, "weight" or "bias") of a checkpoint's tensor name; None if it has no role."""
        prefix = self.layers + "."
        number, _, rest = tensor.removeprefix(prefix).partition(".")
        if not tensor.startswith(prefix) or not number.isdigit():
            return None
        path, _, kind = rest.rpartition(".")
        for role, module in self.modules.items():
            if module == path:
                return int(number), role, kind
        return None


LLAMA_MODULES: dict[Role, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

UNGATED_MODULES: dict[Role, str] = {role: module for role, module in LLAMA_MODULES.items() if role != "gate"}

STARCODER2_MODULES: dict[Role, str] = {
    **UNGATED_MODULES,
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(LLAMA_MODULES, per_layer_class="A3LlamaForCausalLM"),
    "mistral": Family(LLAMA_MODULES, per_layer_class="A3MistralForCausalLM"),
    "qwen2": Family(LLAMA_MODULES, per_layer_class="A3Qwen2ForCausalLM", qkv_bias=True),
    "starcoder2": Family(
        STARCODER2_MODULES, per_layer_class="A3Starcoder2ForCausalLM", use_bias=True, norm_bias=True, tied=True
    ),
    "nemotron": Family(UNGATED_MODULES, per_layer_class="A3NemotronForCausalLM", norm_bias=True, rotary_factor=0.5),
}


def family_of(model_type: Any) -> Family:
    """The family of a `config.model_type`. Raises A3Error listing what is supported."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise A3Error(f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


@dataclass(frozen=True)
class LayerSizes:
    """What a solution chooses for one layer: dims of a query or key head, dims of a value head, MLP channels."""

    qk: int
    ov: int
    mlp: int


def per_layer_config(sizes: Sequence[LayerSizes], slots: Sequence[Sequence[float]]) -> dict[str, Any]:
    """config.json's entry that gives each layer its sizes and RoPE slots, as transformers 5 reads it."""
    digits = len(str(len(sizes) - 1))  # so that the keys are in order in the file
    return {
        str(layer).zfill(digits): {
            "qk_head_dim": size.qk,
            "v_head_dim": size.ov,
            "intermediate_size": size.mlp,
            "rope_slots": list(own),
        }
        for layer, (size, own) in enumerate(zip(sizes, slots, strict=True))
    }


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder: d, L, H, K, h and I of the method, which linear layers it has, and which have biases."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    attention_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    passed_dims: int = 0  # of a query or key head, which RoPE does not turn

    @property
    def mlp_inputs(self) -> tuple[Role, ...]:
        """The linear layers that read the MLP's input."""
        return ("gate", "up") if self.gated else ("up",)

    @property
    def mlp_roles(self) -> tuple[Role, ...]:
        return (*self.mlp_inputs, "down")

    @property
    def turning_pairs(self) -> int:
        """How many pairs RoPE turns."""
        return (self.head_dim - self.passed_dims) // 2

    @property
    def group(self) -> int:
        """Query heads a KV head, g = H / K."""
        return self.heads // self.kv_heads

    @property
    def sizes(self) -> list[LayerSizes]:
        """The full sizes, layer by layer."""
        return [self.full_sizes] * self.layers

    @property
    def full_sizes(self) -> LayerSizes:
        return LayerSizes(self.head_dim, self.head_dim, self.intermediate_size)

    def linear_shapes(self, sizes: LayerSizes | None = None) -> dict[Role, tuple[int, int]]:
        """`[out, in]` of each linear weight of a layer of these sizes, or of a full one."""
        d, size = self.hidden_size, sizes or self.full_sizes
        return {
            "q": (self.heads * size.qk, d),
            "k": (self.kv_heads * size.qk, d),
            "v": (self.kv_heads * size.ov, d),
            "o": (d, self.heads * size.ov),
            **dict.fromkeys(self.mlp_inputs, (size.mlp, d)),
            "down": (d, size.mlp),
        }


def read_shape(config: Any) -> ModelShape:
    """The shape that a transformers config describes. Raises A3Error if its sizes do not fit together."""
    family, heads = family_of(config.model_type), config.num_attention_heads
    attention_bias, mlp_bias = read_biases(family, config)
    shape = ModelShape(
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate_size=config.intermediate_size,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        gated=family.gated,
    )
    shape = replace(shape, passed_dims=shape.head_dim - rotary_dims(config, shape.head_dim))
    sizes = (shape.hidden_size, shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate_size)
    if min(sizes) < 1 or shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise A3Error(
            f"config.json: impossible sizes (heads {shape.heads}, KV heads {shape.kv_heads}, "
            f"head_dim {shape.head_dim}, hidden {shape.hidden_size}, MLP {shape.intermediate_size}, "
            f"layers {shape.layers})"
        )
    return shape


def read_biases(family: Family, config: Any) -> tuple[bool, bool]:
    """Whether q, k and v, and whether the MLP's linear layers have biases."""
    if family.use_bias:
        every = bool(getattr(config, "use_bias", True))
        return every, every
    return family.qkv_bias or bool(getattr(config, "attention_bias", False)), bool(getattr(config, "mlp_bias", False))


def rotary_dims(config: Any, head_dim: int) -> int:
    """Dims of a head that RoPE turns. Raises A3Error if these are not pairs."""
    default = family_of(config.model_type).rotary_factor
    if default is None:
        return head_dim
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    said = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    factor = default if said is None else said
    turned = int(head_dim * factor) if isinstance(factor, (int, float)) and 0 <= factor <= 1 else -1
    if turned % 2:
        raise A3Error(f"config.json: partial_rotary_factor {factor!r} of head_dim {head_dim} is no number of pairs")
    return turned


def rotary_factor(turned: int, head_dim: int) -> float:
    """The `partial_rotary_factor` of which loaders, who round down, make `turned` dims."""
    factor = turned / head_dim
    return factor if int(head_dim * factor) == turned else math.nextafter(factor, 1.0)


def pair_dims(pairs: int, turning: int) -> list[int]:
    """Dims of a head of so many pairs: the first of every pair, then the second of every pair.

    Where RoPE turns only `turning` pairs, theirs are the first dims; what is passed through is paired likewise.
    """
    still, behind = pairs - turning, 2 * turning
    first = [*range(turning), *range(behind, behind + still)]
    return [*first, *range(turning, behind), *range(behind + still, 2 * pairs)]


# Beyond any model that there is; up to here lists of layers and of head sizes are gone through in no time.
MOST_LAYERS, LARGEST_HEAD, LARGEST = 10_000, 2**16, 2**31 - 1


def check_bounds(shape: ModelShape, vocabulary: int) -> None:
    """Raise A3Error naming sizes that no model has, where there is no checkpoint to compare config.json with."""
    bounds = {
        "hidden_size": (shape.hidden_size, LARGEST),
        "num_hidden_layers": (shape.layers, MOST_LAYERS),
        "num_attention_heads": (shape.heads, LARGEST),
        "num_key_value_heads": (shape.kv_heads, LARGEST),
        "head_dim": (shape.head_dim, LARGEST_HEAD),
        "intermediate_size": (shape.intermediate_size, LARGEST),
        "vocab_size": (vocabulary, LARGEST),
    }
    if beyond := [f"{name} is above {most:,}" for name, (size, most) in bounds.items() if size > most]:
        raise A3Error(f"config.json: {', '.join(beyond)}, which no model has; correct it")


def check_rope_spellings(config: dict[str, Any], path: Path) -> None:
    """Raise A3Error if config.json says one thing in `rope_parameters` and another at its top.

    Versions of transformers differ in which they read; 4.57 knows only `rope_theta`, `rope_scaling` and
    `partial_rotary_factor`.
    """
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return
    beside = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    if "rope_scaling" in config and isinstance(scaling := config["rope_scaling"] or {}, dict):
        beside |= with_rope_type(scaling)
    within = with_rope_type(parameters)
    differing = [
        f"{key} is {value!r:.80} at its top and {within[key]!r:.80} in rope_parameters"
        for key, value in beside.items()
        if key in within and value != within[key]
    ]
    if differing:
        raise A3Error(
            f"{path} contradicts itself: {'; '.join(differing)}; transformers 4.57 and 5 read different ones: "
            "correct the wrong one"
        )


def with_rope_type(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return RoPE parameters with `rope_type`, which older configurations call `type` or leave out."""
    named = {key: value for key, value in parameters.items() if key != "type"}
    return {"rope_type": parameters.get("type", "default"), **named}


ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def check_rope(parameters: dict[str, Any], *, partial: bool) -> str:
    """The RoPE type of `rope_parameters`. Raises A3Error if a subset of pairs cannot express it.

    `partial`: the family knows heads of which RoPE turns only some dims.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise A3Error(
            f"config.json: RoPE type {kind!r} cannot be written for a subset of pairs (its frequencies change with "
            f"the length of the text); supported are {', '.join(ROPE_TYPES)}; remove rope_scaling from config.json "
            "to compress the model at its original context"
        )
    if not partial and parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise A3Error("config.json: partial_rotary_factor other than 1 is not supported for this family")
    return str(kind)
