"""Qwen3 whose layers differ in size (see modeling_a3_base.py)."""

from typing import Any

import torch
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3RMSNorm,
    apply_rotary_pos_emb,
)

from .modeling_a3_base import PerLayerAttention, PerLayerCausalLM, PerLayerDecoderLayer, PerLayerModel


class A3Qwen3Attention(PerLayerAttention, Qwen3Attention):
    def __init__(self, config: Any, layer_idx: int, slots: list[float]) -> None:
        super().__init__(config, layer_idx, slots)
        self.q_norm = Qwen3RMSNorm(self.qk_head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.qk_head_dim, eps=config.rms_norm_eps)

    def rotate(self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        """The norms, which have the size of the layer's heads, come before RoPE."""
        return apply_rotary_pos_emb(self.q_norm(query), self.k_norm(key), cos, sin)


class A3Qwen3DecoderLayer(PerLayerDecoderLayer, Qwen3DecoderLayer):
    attention_class = A3Qwen3Attention


class A3Qwen3Model(PerLayerModel, Qwen3Model):
    layer_class, norm_class = A3Qwen3DecoderLayer, Qwen3RMSNorm


class A3Qwen3ForCausalLM(PerLayerCausalLM, Qwen3ForCausalLM):
    model_class = A3Qwen3Model


__all__ = ["A3Qwen3ForCausalLM", "A3Qwen3Model"]
