"""Granite: like Llama, with the softmax scale and factors on embeddings, residuals and logits in config.json."""

from a3cli.models.families.base import LLAMA_PLACES, Family

FAMILY = Family(
    model_type="granite",
    places=LLAMA_PLACES,
    per_layer_class="A3GraniteForCausalLM",
    softmax_scale="attention_multiplier",
    residual_multiplier="residual_multiplier",
)
