"""Granite whose layers differ in size (see modeling_a3_base.py)."""

from typing import Any

from transformers.models.granite.modeling_granite import (
    GraniteAttention,
    GraniteDecoderLayer,
    GraniteForCausalLM,
    GraniteModel,
    GraniteRMSNorm,
)

from .modeling_a3_base import PerLayerAttention, PerLayerCausalLM, PerLayerDecoderLayer, PerLayerModel


class A3GraniteAttention(PerLayerAttention, GraniteAttention):
    pass


class A3GraniteDecoderLayer(PerLayerDecoderLayer, GraniteDecoderLayer):
    attention_class = A3GraniteAttention


class A3GraniteModel(PerLayerModel, GraniteModel):
    layer_class, norm_class = A3GraniteDecoderLayer, GraniteRMSNorm

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding_multiplier = config.embedding_multiplier


class A3GraniteForCausalLM(PerLayerCausalLM, GraniteForCausalLM):
    model_class = A3GraniteModel


__all__ = ["A3GraniteForCausalLM", "A3GraniteModel"]
