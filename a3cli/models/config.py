"""Read a decoder's shape and partial RoPE from a configuration, and check what it says of RoPE."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from a3cli.errors import A3Error
from a3cli.models.families import Family, ModelShape, family_of

FULL, SLIDING = "full_attention", "sliding_attention"  # types of attention, as in config.json


def read_shape(config: Any) -> ModelShape:
    """Return the shape that a transformers config describes. Raises A3Error if its sizes do not fit together."""
    family, heads = family_of(config.model_type), config.num_attention_heads
    kv_heads, head_dim = (getattr(config, name, None) if family.rotates else None for name in OPTIONAL_SIZES)
    attention_bias, mlp_bias = read_biases(family, config)
    experts, active = read_experts(family, config)
    shape = ModelShape(
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or config.hidden_size // heads,
        intermediate_size=config.intermediate_size,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        gated=family.gated,
        fixed_scale=read_scale(family, config),
        score_cap=read_cap(family, config),
        residual_multiplier=read_multiplier(config, family.residual_multiplier) or 1.0,
        windows=read_windows(config),
        still_layers=read_still_layers(family, config),
        fitted_norms=family.fitted_norms,
        norm_offset=family.norm_offset if family.fitted_norms else 0.0,
        query_growth=read_query_growth(family, config),
        mlp_in_layer=not family.mlp,
        experts=experts,
        active_experts=active,
        alibi=family.positions == "alibi",
    )
    shape = replace(shape, passed_dims=shape.head_dim - rotary_dims(config, shape.head_dim))
    sizes = (shape.hidden_size, shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate_size)
    if min(sizes) < 1 or shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise A3Error(
            f"config.json: impossible sizes (heads {shape.heads}, KV heads {shape.kv_heads}, "
            f"head_dim {shape.head_dim}, hidden {shape.hidden_size}, MLP {shape.intermediate_size}, "
            f"layers {shape.layers})"
        )
    if family.carried_attention is None:
        return shape
    costs = family.carried_attention.costs(config)
    return replace(shape, heads=0, kv_heads=0, attention_bias=False, carried_attention=costs)


def read_experts(family: Family, config: Any) -> tuple[int, int]:
    """Return how many experts a layer has, and how many of them a token goes through; zeros without experts.

    Raises A3Error for numbers that do not fit together.
    """
    if family.experts is None:
        return 0, 0
    names = family.experts.count
    count = next((found for name in names if (found := getattr(config, name, None)) is not None), None)
    active = getattr(config, family.experts.active, None)
    if type(count) is not int or type(active) is not int or not 1 <= active <= count <= MOST_EXPERTS:
        raise A3Error(
            f"config.json: impossible numbers of experts ({names[0]} {count!r}, {family.experts.active} {active!r})"
        )
    return count, active


def read_windows(config: Any) -> tuple[int | None, ...]:
    """Return the window of each layer's attention, None for full attention, as transformers' cache reads them."""
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not isinstance(window, int):
        return ()
    types = types or [SLIDING] * config.num_hidden_layers
    return tuple(window if kind == SLIDING else None for kind in types)


def read_multiplier(config: Any, key: str | None) -> float | None:
    """Return an entry that is 1 where config.json leaves it out; None without a key. Raises A3Error for a bad one."""
    if key is None:
        return None
    value = getattr(config, key, 1.0)
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise A3Error(f"config.json: {key} is {value!r}; it must be a number above 0")
    return float(value)


def read_scale(family: Family, config: Any) -> float | None:
    """Return the softmax scale that config.json says; None if it depends on the head size."""
    said = read_multiplier(config, family.softmax_scale)
    return None if said is None else said**family.scale_power


def read_cap(family: Family, config: Any) -> float | None:
    """Return the cap of attention scores, or None. Raises A3Error for a bad one."""
    if family.score_cap is None or getattr(config, family.score_cap, None) is None:
        return None
    return read_multiplier(config, family.score_cap)


def read_still_layers(family: Family, config: Any) -> tuple[int, ...]:
    """Return the layers without RoPE. Raises A3Error for an entry that does not have one number for each layer."""
    if family.rotating_layers is None:
        return ()
    rotating, layers = getattr(config, family.rotating_layers, None), config.num_hidden_layers
    if not isinstance(rotating, (list, tuple)) or len(rotating) < layers:
        raise A3Error(f"config.json: {family.rotating_layers} must be a list with a number for each of {layers} layers")
    return tuple(layer for layer in range(layers) if not rotating[layer])


def read_query_growth(family: Family, config: Any) -> tuple[float, int] | None:
    """Return how queries grow with their position; None if they do not. Raises A3Error for a bad entry."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if family.query_growth is None or parameters.get(family.query_growth) is None:
        return None
    said = parameters[family.query_growth], parameters.get("original_max_position_embeddings")
    growth, context = (float(value) if isinstance(value, (int, float)) else -1.0 for value in said)
    if growth < 0 or context < 1:
        raise A3Error(
            f"config.json: {family.query_growth} is {said[0]!r} and original_max_position_embeddings {said[1]!r}; both "
            "must be numbers, the second at least 1"
        )
    return growth, int(context)


def read_biases(family: Family, config: Any) -> tuple[bool, bool]:
    """Return whether q, k and v have biases, and whether the MLP's linear layers have them."""
    if family.use_bias:
        every = bool(getattr(config, family.names.get("use_bias", "use_bias"), True))
        return every, every
    return family.qkv_bias or bool(getattr(config, "attention_bias", False)), bool(getattr(config, "mlp_bias", False))


def rope_parameters_of(config: Any, kind: str = FULL) -> dict[str, Any]:
    """Return the RoPE parameters of the layers with a type of attention; in most models those of all layers."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    return dict(parameters.get(kind) or {}) if family_of(config.model_type).local_rope else parameters


def rotary_dims(config: Any, head_dim: int) -> int:
    """Return how many dims of a head RoPE rotates. Raises A3Error if these are not pairs."""
    family = family_of(config.model_type)
    if not family.rotates:
        return 0
    if (default := family.rotary_factor) is None:
        return head_dim
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    said = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    factor = default if said is None else said
    turned = int(head_dim * factor) if isinstance(factor, (int, float)) and 0 <= factor <= 1 else -1
    if turned % 2:
        raise A3Error(f"config.json: partial_rotary_factor {factor!r} of head_dim {head_dim} is no number of pairs")
    return turned


def rotary_factor(turned: int, head_dim: int) -> float:
    """Return the `partial_rotary_factor` from which loaders, which round down, compute `turned` dims."""
    factor = turned / head_dim
    return factor if int(head_dim * factor) == turned else math.nextafter(factor, 1.0)


# The largest sizes that are accepted: more than any model has, and few enough layers and head dims to list.
LARGEST = 2**31 - 1
BOUNDS = {
    "hidden_size": LARGEST,
    "num_hidden_layers": 10_000,
    "num_attention_heads": LARGEST,
    "num_key_value_heads": LARGEST,
    "head_dim": 2**16,
    "intermediate_size": LARGEST,
    "vocab_size": LARGEST,
}
MOST_EXPERTS = 2**16
# Derived from the others if config.json lacks them, and always without RoPE.
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")


def check_sizes(raw: dict[str, Any]) -> None:
    """Raise A3Error naming the sizes in config.json that are missing, no positive integers, or larger than any model's.

    Call it where there are no weights yet to compare config.json with.
    """
    sizes: dict[str, Any] = {
        name: raw.get(name) for name in BOUNDS if raw.get(name) is not None or name not in OPTIONAL_SIZES
    }
    if wrong := [name for name, size in sizes.items() if type(size) is not int or size < 1]:
        raise A3Error(f"config.json: {', '.join(wrong)} must be there and be a positive integer; correct it")
    sizes.setdefault("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    if beyond := [f"{name} is above {most:,}" for name, most in BOUNDS.items() if sizes.get(name, 1) > most]:
        raise A3Error(f"config.json: {', '.join(beyond)}, which no model has; correct it")


def check_rope_spellings(config: dict[str, Any], path: Path) -> None:
    """Raise A3Error if config.json says one thing in `rope_parameters` and another at its top.

    Versions of transformers differ in which they read; 4.57 knows only `rope_theta`, `rope_scaling` and
    `partial_rotary_factor`.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key) and not isinstance(config[key], dict):
            raise A3Error(f"{path}: {key} is {config[key]!r:.80}, not an object; correct it")
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return
    beside = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    if "rope_scaling" in config and isinstance(scaling := config["rope_scaling"] or {}, dict):
        beside |= with_rope_type(scaling)
    within = with_rope_type(parameters)
    if (local := parameters.get(SLIDING)) is not None:  # a table for each type of attention
        within = with_rope_type(parameters.get(FULL) or {})
        if config.get(LOCAL_THETA) is not None:
            beside[LOCAL_THETA], within[LOCAL_THETA] = config[LOCAL_THETA], local.get("rope_theta")
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


LOCAL_THETA = "rope_local_base_freq"  # transformers 4.57's name for the theta of sliding attention
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def check_rope(parameters: dict[str, Any], *, partial: bool) -> str:
    """Return the RoPE type of `rope_parameters`. Raises A3Error if a subset of pairs cannot express it.

    `partial`: the family supports partial RoPE.
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


def check_local_rope(config: Any) -> None:
    """Raise A3Error for RoPE with a table for each type of attention that exports could not say in both spellings."""
    for kind, allowed in ((FULL, ("default", "linear", "llama3")), (SLIDING, ("default",))):
        parameters = with_rope_type(rope_parameters_of(config, kind))
        known = parameters["rope_type"] in allowed or has_fixed_factors(parameters)
        if not known or "rope_theta" not in parameters:
            raise A3Error(
                f"config.json: RoPE of {kind} is {parameters!r:.80}; supported with a table for each type of attention "
                f"are the types {' and '.join(allowed)} with a rope_theta"
            )


def has_fixed_factors(parameters: dict[str, Any]) -> bool:
    """Return whether RoPE is longrope that the context does not change, as in our own exports."""
    factors = parameters.get("short_factor"), parameters.get("long_factor")
    fixed = factors[0] == factors[1] and "attention_factor" in parameters
    return parameters["rope_type"] == "longrope" and fixed
