"""SmolLM3: like Llama, but RoPE rotates the heads of some layers only."""

from a3cli.models.families.base import LLAMA_PLACES, Family

FAMILY = Family(
    model_type="smollm3",
    places=LLAMA_PLACES,
    per_layer_class="A3SmolLM3ForCausalLM",
    rotating_layers="no_rope_layers",  # despite its name: 1 for layers with RoPE
)
