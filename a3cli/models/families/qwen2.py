"""Qwen2: gated MLP; queries, keys and values always have biases."""

from a3cli.models.families.base import Family, Place

FAMILY = Family(
    model_type="qwen2",
    places={
        "q": Place("self_attn.q_proj"),
        "k": Place("self_attn.k_proj"),
        "v": Place("self_attn.v_proj"),
        "o": Place("self_attn.o_proj"),
        "mlp_norm": Place("post_attention_layernorm"),
        "gate": Place("mlp.gate_proj"),
        "up": Place("mlp.up_proj"),
        "down": Place("mlp.down_proj"),
    },
    per_layer_class="A3Qwen2ForCausalLM",
    qkv_bias=True,
)
