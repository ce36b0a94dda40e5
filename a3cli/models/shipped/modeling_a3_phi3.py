"""Phi-3 whose layers differ in size (see modeling_a3_base.py)."""

from typing import Any

import torch
from torch import nn
from transformers.models.phi3.modeling_phi3 import (
    Phi3Attention,
    Phi3DecoderLayer,
    Phi3ForCausalLM,
    Phi3Model,
    Phi3RMSNorm,
    Phi3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from .modeling_a3_base import (
    A3RotaryEmbedding,
    PerLayerAttention,
    PerLayerCausalLM,
    PerLayerDecoderLayer,
    PerLayerModel,
)


class A3Phi3RotaryEmbedding(A3RotaryEmbedding):
    if hasattr(Phi3RotaryEmbedding, "compute_default_rope_parameters"):  # 4.57 has one for Llama as well
        compute_default_rope_parameters = staticmethod(Phi3RotaryEmbedding.compute_default_rope_parameters)


class A3Phi3Attention(PerLayerAttention, Phi3Attention):
    rotate = staticmethod(apply_rotary_pos_emb)

    def build_inputs(self, config: Any, query: int, key: int, value: int) -> None:
        self.widths = [query, key, value]
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=False)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = self.qkv_proj(hidden_states).split(self.widths, -1)
        return query, key, value


class A3Phi3DecoderLayer(PerLayerDecoderLayer, Phi3DecoderLayer):
    attention_class = A3Phi3Attention


class A3Phi3Model(PerLayerModel, Phi3Model):
    layer_class, norm_class, rotary_class = A3Phi3DecoderLayer, Phi3RMSNorm, A3Phi3RotaryEmbedding


class A3Phi3ForCausalLM(PerLayerCausalLM, Phi3ForCausalLM):
    model_class = A3Phi3Model


__all__ = ["A3Phi3ForCausalLM", "A3Phi3Model"]
