"""GPT-2: learned positions, LayerNorm, ungated MLP, fused and transposed weights, biases everywhere."""

from typing import Any

from a3cli.models.families.base import Family, Place


def refusal(config: Any) -> str | None:
    """Return what of a configuration changes attention in a way that a3 does not follow."""
    if config.add_cross_attention:
        return "cross-attention (add_cross_attention: true)"
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        return "a softmax scale of its own (scale_attn_by_inverse_layer_idx, scale_attn_weights)"
    return None


FAMILY = Family(
    model_type="gpt2",
    places={
        "q": Place("attn.c_attn", after=(), transposed=True),
        "k": Place("attn.c_attn", after=("q",), transposed=True),
        "v": Place("attn.c_attn", after=("q", "k"), transposed=True),
        "o": Place("attn.c_proj", transposed=True),
        "mlp_norm": Place("ln_2"),
        "up": Place("mlp.c_fc", transposed=True),
        "down": Place("mlp.c_proj", transposed=True),
    },
    per_layer_class="A3GPT2ForCausalLM",
    use_bias=True,
    positions="learned",
    position_embedding="transformer.wpe",
    names={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
    },
    mlp_ratio=4,
    refusal=refusal,
    stock_heads="the stock class computes the head size from hidden size and heads, so these keep their size",
    decoder="transformer",
    layers="transformer.h",
    embedding="transformer.wte",
)
