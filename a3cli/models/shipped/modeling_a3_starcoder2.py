"""Starcoder2 whose layers differ in size (see modeling_a3_base.py)."""

from typing import Any

import torch
from torch import nn
from transformers.models.starcoder2.modeling_starcoder2 import (
    Starcoder2Attention,
    Starcoder2DecoderLayer,
    Starcoder2ForCausalLM,
    Starcoder2Model,
)

from .modeling_a3_base import PerLayerAttention, PerLayerCausalLM, PerLayerDecoderLayer, PerLayerModel


class A3Starcoder2Attention(PerLayerAttention, Starcoder2Attention):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = super().forward(*args, **kwargs)
        return nn.functional.dropout(output, p=self.residual_dropout, training=self.training), weights


class A3Starcoder2DecoderLayer(PerLayerDecoderLayer, Starcoder2DecoderLayer):
    attention_class = A3Starcoder2Attention


class A3Starcoder2Model(PerLayerModel, Starcoder2Model):
    layer_class, norm_class, norm_epsilon = A3Starcoder2DecoderLayer, nn.LayerNorm, "norm_epsilon"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding_dropout = config.embedding_dropout


class A3Starcoder2ForCausalLM(PerLayerCausalLM, Starcoder2ForCausalLM):
    model_class = A3Starcoder2Model


__all__ = ["A3Starcoder2ForCausalLM", "A3Starcoder2Model"]
