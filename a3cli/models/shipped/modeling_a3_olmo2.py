"""OLMo 2 whose layers differ in size (see modeling_a3_base.py)."""

from typing import Any

import torch
from torch import nn
from transformers.models.olmo2.modeling_olmo2 import (
    Olmo2Attention,
    Olmo2DecoderLayer,
    Olmo2ForCausalLM,
    Olmo2Model,
    Olmo2RMSNorm,
    apply_rotary_pos_emb,
)

from .modeling_a3_base import (
    A3RotaryEmbedding,
    PerLayerAttention,
    PerLayerCausalLM,
    PerLayerDecoderLayer,
    PerLayerModel,
)


def norm_together(norm: nn.Module, heads: torch.Tensor) -> Any:
    """Heads `[B, H, T, h]` after a norm over all of a token's."""
    flat = heads.transpose(1, 2).flatten(2)
    return norm(flat).unflatten(2, (heads.shape[1], -1)).transpose(1, 2)


class A3Olmo2RotaryEmbedding(A3RotaryEmbedding):
    keeps_float32 = True


class A3Olmo2Attention(PerLayerAttention, Olmo2Attention):
    def rotate(self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        """The norms come before RoPE. They are of full heads, so query and key heads keep that size."""
        return apply_rotary_pos_emb(norm_together(self.q_norm, query), norm_together(self.k_norm, key), cos, sin)


class A3Olmo2DecoderLayer(PerLayerDecoderLayer, Olmo2DecoderLayer):
    attention_class = A3Olmo2Attention


class A3Olmo2Model(PerLayerModel, Olmo2Model):
    layer_class, norm_class, rotary_class = A3Olmo2DecoderLayer, Olmo2RMSNorm, A3Olmo2RotaryEmbedding


class A3Olmo2ForCausalLM(PerLayerCausalLM, Olmo2ForCausalLM):
    model_class = A3Olmo2Model


__all__ = ["A3Olmo2ForCausalLM", "A3Olmo2Model"]
