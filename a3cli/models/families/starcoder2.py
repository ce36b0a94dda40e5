"""Starcoder2: ungated MLP, LayerNorm, biases everywhere or nowhere, tied embeddings."""

from a3cli.models.families.base import UNGATED_PLACES, Family, Place

FAMILY = Family(
    model_type="starcoder2",
    places={**UNGATED_PLACES, "up": Place("mlp.c_fc"), "down": Place("mlp.c_proj")},
    per_layer_class="A3Starcoder2ForCausalLM",
    use_bias=True,
)
