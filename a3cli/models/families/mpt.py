"""MPT: ALiBi, LayerNorm, ungated MLP, fused queries, keys and values, no biases."""

from typing import Any

from a3cli.models.families.base import Family, Place


def refusal(config: Any) -> str | None:
    """Return what of a configuration the stock class ignores, or what changes attention in a way a3 does not follow."""
    attention = config.attn_config
    if attention.clip_qkv:
        return f"clipped queries, keys and values (attn_config.clip_qkv {attention.clip_qkv})"
    if attention.softmax_scale is not None:
        return f"a softmax scale of its own (attn_config.softmax_scale {attention.softmax_scale})"
    if not attention.alibi or attention.alibi_bias_max != 8 or attention.qk_ln or attention.prefix_lm:
        return (
            "attention that transformers' class does not compute (attn_config: alibi, alibi_bias_max, qk_ln, prefix_lm)"
        )
    return None


FAMILY = Family(
    model_type="mpt",
    places={
        "q": Place("attn.Wqkv", after=()),
        "k": Place("attn.Wqkv", after=("q",)),
        "v": Place("attn.Wqkv", after=("q", "k")),
        "o": Place("attn.out_proj"),
        "mlp_norm": Place("norm_2"),
        "up": Place("ffn.up_proj"),
        "down": Place("ffn.down_proj"),
    },
    per_layer_class="A3MptForCausalLM",
    positions="alibi",
    kernel="eager",
    names={
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_seq_len",
    },
    mlp_ratio=4,
    activation="ffn.act",
    refusal=refusal,
    stock_heads="the stock class computes the head size and the MLP width from the hidden size, so these keep theirs",
    stock_components=(),
    decoder="transformer",
    layers="transformer.blocks",
    embedding="transformer.wte",
)
