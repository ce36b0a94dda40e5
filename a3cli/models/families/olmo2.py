"""OLMo 2: norms after each block and none before, and on all queries and all keys of a token."""

from a3cli.models.families.base import HEAD_NORMS, LLAMA_PLACES, POST_NORMS, Family

FAMILY = Family(
    model_type="olmo2",
    places={role: place for role, place in LLAMA_PLACES.items() if role != "mlp_norm"},
    per_layer_class="A3Olmo2ForCausalLM",
    head_norms=HEAD_NORMS,
    joint_norms=True,
    post_norms=POST_NORMS,
)
