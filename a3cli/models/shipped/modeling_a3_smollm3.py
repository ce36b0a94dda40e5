"""SmolLM3 whose layers differ in size (see modeling_a3_base.py)."""

from typing import Any

import torch
from transformers.models.smollm3.modeling_smollm3 import (
    SmolLM3Attention,
    SmolLM3DecoderLayer,
    SmolLM3ForCausalLM,
    SmolLM3Model,
    SmolLM3RMSNorm,
    apply_rotary_pos_emb,
)

from .modeling_a3_base import PerLayerAttention, PerLayerCausalLM, PerLayerDecoderLayer, PerLayerModel


class A3SmolLM3Attention(PerLayerAttention, SmolLM3Attention):
    def rotate(self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return apply_rotary_pos_emb(query, key, cos, sin) if self.use_rope else (query, key)


class A3SmolLM3DecoderLayer(PerLayerDecoderLayer, SmolLM3DecoderLayer):
    attention_class = A3SmolLM3Attention


class A3SmolLM3Model(PerLayerModel, SmolLM3Model):
    layer_class, norm_class = A3SmolLM3DecoderLayer, SmolLM3RMSNorm


class A3SmolLM3ForCausalLM(PerLayerCausalLM, SmolLM3ForCausalLM):
    model_class = A3SmolLM3Model


__all__ = ["A3SmolLM3ForCausalLM", "A3SmolLM3Model"]
