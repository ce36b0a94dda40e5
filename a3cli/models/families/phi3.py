"""Phi-3 and Phi-4: like Llama with fused projections; RoPE may be partial."""

from a3cli.models.families.base import LLAMA_PLACES, Family, Place

FAMILY = Family(
    model_type="phi3",
    places={
        **LLAMA_PLACES,
        "q": Place("self_attn.qkv_proj", after=()),
        "k": Place("self_attn.qkv_proj", after=("q",)),
        "v": Place("self_attn.qkv_proj", after=("q", "k")),
        "gate": Place("mlp.gate_up_proj", after=()),
        "up": Place("mlp.gate_up_proj", after=("gate",)),
    },
    per_layer_class="A3Phi3ForCausalLM",
    rotary_factor=1.0,
    strict_longrope=True,
    stock_heads="its configuration refuses RoPE factors for smaller heads, so these keep their size",
)
