"""Llama whose layers differ in size (see modeling_a3_base.py)."""

from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaRMSNorm,
)

from .modeling_a3_base import PerLayerAttention, PerLayerCausalLM, PerLayerDecoderLayer, PerLayerModel


class A3LlamaAttention(PerLayerAttention, LlamaAttention):
    pass


class A3LlamaDecoderLayer(PerLayerDecoderLayer, LlamaDecoderLayer):
    attention_class = A3LlamaAttention


class A3LlamaModel(PerLayerModel, LlamaModel):
    layer_class, norm_class = A3LlamaDecoderLayer, LlamaRMSNorm


class A3LlamaForCausalLM(PerLayerCausalLM, LlamaForCausalLM):
    model_class = A3LlamaModel


__all__ = ["A3LlamaForCausalLM", "A3LlamaModel"]
