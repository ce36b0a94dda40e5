"""Granite: as Llama, with the softmax scale and factors on embeddings, residuals and logits in config.json."""

from a3cli.models.families.base import Family, Place

FAMILY = Family(
    model_type="granite",
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
    per_layer_class="A3GraniteForCausalLM",
    softmax_scale="attention_multiplier",
    residual_multiplier="residual_multiplier",
)
