"""Mistral whose layers differ in size (see modeling_a3_base.py)."""

from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
    MistralRMSNorm,
)

from .modeling_a3_base import PerLayerAttention, PerLayerCausalLM, PerLayerDecoderLayer, PerLayerModel


class A3MistralAttention(PerLayerAttention, MistralAttention):
    pass


class A3MistralDecoderLayer(PerLayerDecoderLayer, MistralDecoderLayer):
    attention_class = A3MistralAttention


class A3MistralModel(PerLayerModel, MistralModel):
    layer_class, norm_class = A3MistralDecoderLayer, MistralRMSNorm


class A3MistralForCausalLM(PerLayerCausalLM, MistralForCausalLM):
    model_class = A3MistralModel


__all__ = ["A3MistralForCausalLM", "A3MistralModel"]
