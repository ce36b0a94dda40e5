"""Mistral: gated MLP, attention with a sliding window."""

from a3cli.models.families.base import LLAMA_PLACES, Family

FAMILY = Family(
    model_type="mistral",
    places=LLAMA_PLACES,
    per_layer_class="A3MistralForCausalLM",
    like_llama=True,
)
