"""Qwen2 whose layers differ in size (see modeling_a3_base.py)."""

from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2RMSNorm,
)

from .modeling_a3_base import PerLayerAttention, PerLayerCausalLM, PerLayerDecoderLayer, PerLayerModel


class A3Qwen2Attention(PerLayerAttention, Qwen2Attention):
    pass


class A3Qwen2DecoderLayer(PerLayerDecoderLayer, Qwen2DecoderLayer):
    attention_class = A3Qwen2Attention


class A3Qwen2Model(PerLayerModel, Qwen2Model):
    layer_class, norm_class = A3Qwen2DecoderLayer, Qwen2RMSNorm


class A3Qwen2ForCausalLM(PerLayerCausalLM, Qwen2ForCausalLM):
    model_class = A3Qwen2Model


__all__ = ["A3Qwen2ForCausalLM", "A3Qwen2Model"]
