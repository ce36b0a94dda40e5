"""Qwen3.5: most layers have gated linear attention, the others attention with a gate on its output; a gated MLP."""

from typing import Any

from a3cli.models.families.base import MLP_PLACES, Family
from a3cli.models.families.carried import AttentionCosts, CarriedAttention

# What configurations that leave these entries out have.
INTERVAL = 4
LINEAR = {
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
}


def full_layers(config: Any) -> int:
    """Return how many layers have attention to every token, and so a KV cache."""
    if types := getattr(config, "layer_types", None):
        return list(types).count("full_attention")
    return int(config.num_hidden_layers // (getattr(config, "full_attention_interval", None) or INTERVAL))


def refusal(config: Any) -> str | None:
    return None if full_layers(config) else "linear attention in every layer"


def attention_costs(config: Any) -> AttentionCosts:
    key_heads, key_size, value_heads, value_size = (getattr(config, name, size) for name, size in LINEAR.items())
    full, d, h = full_layers(config), config.hidden_size, config.head_dim
    linear = config.num_hidden_layers - full
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    keys, values = key_heads * key_size, value_heads * value_size
    # Queries, keys, values, gate and output, and two numbers for each value head.
    of_linear = d * (2 * keys + 3 * values + 2 * value_heads)
    of_full = d * h * (3 * heads + 2 * kv_heads)  # queries and their gates, keys, values, and output
    return AttentionCosts(
        weights=linear * of_linear + full * of_full,
        cached=full * 2 * kv_heads * h,
        products=full * 2 * heads * h,
        state=linear * values * key_size,
    )


FAMILY = Family(
    model_type="qwen3_5_text",
    places=MLP_PLACES,
    per_layer_class="A3Qwen35ForCausalLM",
    carried_attention=CarriedAttention(
        "most layers have linear attention, and the others a gate on its output, so attention stays as it is",
        attention_costs,
    ),
    refusal=refusal,
    stock_components=("mlp",),
    per_layer_components=("mlp",),
    carried=("mtp.",),
)
