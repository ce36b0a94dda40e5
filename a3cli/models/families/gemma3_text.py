"""Gemma 3: norms before and after each block and on each query and key head, and a RoPE of its own in windows."""

from a3cli.models.families.base import HEAD_NORMS, NORMED_PLACES, POST_NORMS, Family, Place, sees_later_tokens

FAMILY = Family(
    model_type="gemma3_text",
    places={**NORMED_PLACES, "mlp_norm": Place("pre_feedforward_layernorm")},
    per_layer_class="A3Gemma3TextForCausalLM",
    softmax_scale="query_pre_attn_scalar",
    scale_power=-0.5,
    head_norms=HEAD_NORMS,
    heads_first=True,
    post_norms=POST_NORMS,
    norm_offset=1.0,
    local_rope=True,
    names={"hidden_act": "hidden_activation"},
    refusal=sees_later_tokens,
)
