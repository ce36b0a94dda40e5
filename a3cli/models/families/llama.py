"""Llama: gated MLP; config.json says which linear layers have biases."""

from a3cli.models.families.base import LLAMA_PLACES, Family

FAMILY = Family(
    model_type="llama",
    places=LLAMA_PLACES,
    per_layer_class="A3LlamaForCausalLM",
    like_llama=True,
)
