"""Nemotron: ungated MLP, LayerNorm, partial RoPE."""

from a3cli.models.families.base import UNGATED_PLACES, Family

FAMILY = Family(
    model_type="nemotron",
    places=UNGATED_PLACES,
    per_layer_class="A3NemotronForCausalLM",
    rotary_factor=0.5,
)
