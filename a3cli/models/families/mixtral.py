"""Mixtral: like Mistral, with experts in place of the MLP."""

from a3cli.models.families.base import LLAMA_PLACES, Family, Place
from a3cli.models.families.expert_names import Experts

BLOCK = "block_sparse_moe"

FAMILY = Family(
    model_type="mixtral",
    places={
        **LLAMA_PLACES,
        "gate": Place(BLOCK + ".experts.{expert}.w1"),
        "up": Place(BLOCK + ".experts.{expert}.w3"),
        "down": Place(BLOCK + ".experts.{expert}.w2"),
    },
    per_layer_class="A3MixtralForCausalLM",
    experts=Experts(block=BLOCK),
)
