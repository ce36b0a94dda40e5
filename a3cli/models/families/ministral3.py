"""Ministral 3: like Mistral, with yarn and queries that grow with their position; mostly inside `mistral3`."""

from a3cli.models.families.base import LLAMA_PLACES, Family

FAMILY = Family(
    model_type="ministral3",
    places=LLAMA_PLACES,
    per_layer_class="A3Ministral3ForCausalLM",
    query_growth="llama_4_scaling_beta",
)
