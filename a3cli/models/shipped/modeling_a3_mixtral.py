"""Mixtral whose layers differ in size (see modeling_a3_base.py)."""

from typing import Any

from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralDecoderLayer,
    MixtralForCausalLM,
    MixtralModel,
    MixtralRMSNorm,
)

from .modeling_a3_base import PerLayerAttention, PerLayerCausalLM, PerLayerDecoderLayer, PerLayerModel, convert_names_as


class A3MixtralAttention(PerLayerAttention, MixtralAttention):
    pass


class A3MixtralDecoderLayer(PerLayerDecoderLayer, MixtralDecoderLayer):
    attention_class = A3MixtralAttention


class A3MixtralModel(PerLayerModel, MixtralModel):
    layer_class, norm_class = A3MixtralDecoderLayer, MixtralRMSNorm


class A3MixtralForCausalLM(PerLayerCausalLM, MixtralForCausalLM):
    model_class = A3MixtralModel

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok


convert_names_as("mixtral", A3MixtralForCausalLM, A3MixtralModel)

__all__ = ["A3MixtralForCausalLM", "A3MixtralModel"]
