"""Starcoder2: ungated MLP, LayerNorm, biases everywhere or nowhere, tied embeddings."""

from a3cli.models.families.base import Family, Place

FAMILY = Family(
    model_type="starcoder2",
    places={
        "q": Place("self_attn.q_proj"),
        "k": Place("self_attn.k_proj"),
        "v": Place("self_attn.v_proj"),
        "o": Place("self_attn.o_proj"),
        "mlp_norm": Place("post_attention_layernorm"),
        "up": Place("mlp.c_fc"),
        "down": Place("mlp.c_proj"),
    },
    per_layer_class="A3Starcoder2ForCausalLM",
    use_bias=True,
)
