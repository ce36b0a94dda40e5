"""Qwen2: gated MLP; queries, keys and values always have biases."""

from a3cli.models.families.base import LLAMA_PLACES, Family

FAMILY = Family(
    model_type="qwen2",
    places=LLAMA_PLACES,
    per_layer_class="A3Qwen2ForCausalLM",
    qkv_bias=True,
    like_llama=True,
)
