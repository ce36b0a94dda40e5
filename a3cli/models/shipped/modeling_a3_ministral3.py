"""Ministral 3 whose layers differ in size (see modeling_a3_base.py)."""

import torch
from transformers.models.ministral3.modeling_ministral3 import (
    Ministral3Attention,
    Ministral3DecoderLayer,
    Ministral3ForCausalLM,
    Ministral3Model,
    Ministral3RMSNorm,
)

from .modeling_a3_base import PerLayerAttention, PerLayerCausalLM, PerLayerDecoderLayer, PerLayerModel


class A3Ministral3Attention(PerLayerAttention, Ministral3Attention):
    def grow(self, query: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """The stock function, whose name and arguments differ between 5.0 and later versions."""
        rope = self.config.rope_parameters
        growth, context = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
        scale: torch.Tensor = 1 + growth * torch.log(1 + torch.floor(position_ids / context))
        return query * scale[:, None, :, None].to(query.dtype)


class A3Ministral3DecoderLayer(PerLayerDecoderLayer, Ministral3DecoderLayer):
    attention_class = A3Ministral3Attention


class A3Ministral3Model(PerLayerModel, Ministral3Model):
    layer_class, norm_class = A3Ministral3DecoderLayer, Ministral3RMSNorm


class A3Ministral3ForCausalLM(PerLayerCausalLM, Ministral3ForCausalLM):
    model_class = A3Ministral3Model


__all__ = ["A3Ministral3ForCausalLM", "A3Ministral3Model"]
