"""Qwen3: gated MLP, a norm on each query and key head, a head size that config.json says."""

from a3cli.models.families.base import HEAD_NORMS, NORMED_PLACES, Family

FAMILY = Family(
    model_type="qwen3",
    places=NORMED_PLACES,
    per_layer_class="A3Qwen3ForCausalLM",
    head_norms=HEAD_NORMS,
)
