"""OPT: learned positions, LayerNorm, ungated MLP directly in the layer, biases everywhere or nowhere."""

from typing import Any

from a3cli.models.families.base import UNGATED_PLACES, Family, Place


def refusal(config: Any) -> str | None:
    """Return what of a configuration other sizes of OPT than 350M do not have."""
    if not config.do_layer_norm_before:
        return "norms behind attention and the MLP (do_layer_norm_before: false)"
    if config.word_embed_proj_dim != config.hidden_size:
        return f"embeddings of another width (word_embed_proj_dim {config.word_embed_proj_dim})"
    return None


FAMILY = Family(
    model_type="opt",
    places={
        **UNGATED_PLACES,
        "o": Place("self_attn.out_proj"),
        "mlp_norm": Place("final_layer_norm"),
        "up": Place("fc1"),
        "down": Place("fc2"),
    },
    per_layer_class="A3OPTForCausalLM",
    names={"intermediate_size": "ffn_dim", "hidden_act": "activation_function", "use_bias": "enable_bias"},
    use_bias=True,
    positions="learned",
    position_embedding="model.decoder.embed_positions",
    activation="activation_fn",
    refusal=refusal,
    stock_heads="the stock class computes the head size from hidden size and heads, so these keep their size",
    decoder="model.decoder",
    layers="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
)
