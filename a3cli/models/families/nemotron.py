"""Nemotron: ungated MLP, LayerNorm, partial RoPE."""

from a3cli.models.families.base import Family, Place

FAMILY = Family(
    model_type="nemotron",
    places={
        "q": Place("self_attn.q_proj"),
        "k": Place("self_attn.k_proj"),
        "v": Place("self_attn.v_proj"),
        "o": Place("self_attn.o_proj"),
        "mlp_norm": Place("post_attention_layernorm"),
        "up": Place("mlp.up_proj"),
        "down": Place("mlp.down_proj"),
    },
    per_layer_class="A3NemotronForCausalLM",
    rotary_factor=0.5,
)
