"""Gemma 3 whose layers differ in size (see modeling_a3_base.py)."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3DecoderLayer,
    Gemma3ForCausalLM,
    Gemma3RMSNorm,
    Gemma3TextModel,
    Gemma3TextScaledWordEmbedding,
    apply_rotary_pos_emb,
)

from .modeling_a3_base import (
    A3RotaryEmbedding,
    PerLayerAttention,
    PerLayerCausalLM,
    PerLayerDecoderLayer,
    PerLayerModel,
)


def config_of_rope(config: Any, layer_type: str) -> Any:
    """The config of a model whose layers all have the RoPE of one type of attention."""
    own = copy.copy(config)
    if hasattr(config, "rope_local_base_freq") and layer_type == "sliding_attention":  # how 4.57 reads it
        own.rope_theta, own.rope_scaling = config.rope_local_base_freq, None
    own.rope_parameters = config.rope_parameters[layer_type]
    return own


class A3Gemma3RotaryEmbeddings(nn.Module):
    """A table of slots for each type of attention."""

    def __init__(self, config: Any, slots: list[float]) -> None:
        super().__init__()
        self.slots = slots
        self.full_attention, self.sliding_attention = (
            A3RotaryEmbedding(config_of_rope(config, kind), slots) for kind in ("full_attention", "sliding_attention")
        )

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str = "full_attention") -> Any:
        return getattr(self, layer_type)(x, position_ids)


class A3Gemma3TextAttention(PerLayerAttention, Gemma3Attention):
    def __init__(self, config: Any, layer_idx: int, slots: list[float]) -> None:
        super().__init__(config, layer_idx, slots)
        self.q_norm = Gemma3RMSNorm(self.qk_head_dim, eps=config.rms_norm_eps)
        self.k_norm = Gemma3RMSNorm(self.qk_head_dim, eps=config.rms_norm_eps)

    def rotate(self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        """The norms, which have the size of the layer's heads, come before RoPE."""
        return apply_rotary_pos_emb(self.q_norm(query), self.k_norm(key), cos, sin)


class A3Gemma3TextDecoderLayer(PerLayerDecoderLayer, Gemma3DecoderLayer):
    attention_class = A3Gemma3TextAttention


class A3Gemma3TextModel(PerLayerModel, Gemma3TextModel):
    layer_class, norm_class, rotary_class = A3Gemma3TextDecoderLayer, Gemma3RMSNorm, A3Gemma3RotaryEmbeddings

    @property
    def rotary_emb_local(self) -> Any:
        """What 4.57 has for the layers with a window."""
        return self.rotary_emb.sliding_attention

    def build_embedding(self, config: Any) -> Any:
        return Gemma3TextScaledWordEmbedding(
            config.vocab_size, config.hidden_size, config.pad_token_id, embed_scale=config.hidden_size**0.5
        )


class A3Gemma3TextForCausalLM(PerLayerCausalLM, Gemma3ForCausalLM):
    model_class = A3Gemma3TextModel


__all__ = ["A3Gemma3TextForCausalLM", "A3Gemma3TextModel"]
