"""Gemma 2: norms before and after each block, capped attention scores, a window in every second layer."""

from a3cli.models.families.base import LLAMA_PLACES, POST_NORMS, Family, Place, sees_later_tokens

FAMILY = Family(
    model_type="gemma2",
    places={**LLAMA_PLACES, "mlp_norm": Place("pre_feedforward_layernorm")},
    per_layer_class="A3Gemma2ForCausalLM",
    softmax_scale="query_pre_attn_scalar",
    scale_power=-0.5,
    score_cap="attn_logit_softcapping",
    post_norms=POST_NORMS,
    norm_offset=1.0,
    names={"hidden_act": "hidden_activation"},
    refusal=sees_later_tokens,
    kernel="eager",  # sdpa does not cap scores
)
