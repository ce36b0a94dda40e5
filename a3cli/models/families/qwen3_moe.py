"""Qwen3 with experts in every layer: their width is `moe_intermediate_size`."""

from typing import Any

from a3cli.models.families.base import HEAD_NORMS, NORMED_PLACES, Family, Place
from a3cli.models.families.expert_names import EXPERT_BLOCK, Experts


def refusal(config: Any) -> str | None:
    """Return what of a configuration no published model has: layers without experts."""
    if config.decoder_sparse_step == 1 and not config.mlp_only_layers:
        return None
    said = f"decoder_sparse_step {config.decoder_sparse_step}, mlp_only_layers {config.mlp_only_layers}"
    return f"layers that have no experts ({said})"


FAMILY = Family(
    model_type="qwen3_moe",
    places={
        **NORMED_PLACES,
        "gate": Place(EXPERT_BLOCK + ".experts.{expert}.gate_proj"),
        "up": Place(EXPERT_BLOCK + ".experts.{expert}.up_proj"),
        "down": Place(EXPERT_BLOCK + ".experts.{expert}.down_proj"),
    },
    per_layer_class="A3Qwen3MoeForCausalLM",
    head_norms=HEAD_NORMS,
    experts=Experts(
        block=EXPERT_BLOCK,
        count=("num_experts", "num_local_experts"),  # transformers 5 saves it under the second name
    ),
    names={"intermediate_size": "moe_intermediate_size"},
    refusal=refusal,
)
