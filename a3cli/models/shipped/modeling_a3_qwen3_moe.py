"""Qwen3 with experts, whose layers differ in size (see modeling_a3_base.py)."""

import copy
from typing import Any

import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    Qwen3MoeRMSNorm,
    apply_rotary_pos_emb,
)

from .modeling_a3_base import PerLayerAttention, PerLayerCausalLM, PerLayerDecoderLayer, PerLayerModel, convert_names_as


class A3Qwen3MoeAttention(PerLayerAttention, Qwen3MoeAttention):
    def __init__(self, config: Any, layer_idx: int, slots: list[float]) -> None:
        super().__init__(config, layer_idx, slots)
        self.q_norm = Qwen3MoeRMSNorm(self.qk_head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3MoeRMSNorm(self.qk_head_dim, eps=config.rms_norm_eps)

    def rotate(self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        """The norms, which have the size of the layer's heads, come before RoPE."""
        return apply_rotary_pos_emb(self.q_norm(query), self.k_norm(key), cos, sin)


class ExpertsOfOwnWidth(Qwen3MoeDecoderLayer):
    """A layer's `intermediate_size` is that of its experts."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        own = copy.copy(config)
        own.moe_intermediate_size = config.intermediate_size
        super().__init__(own, layer_idx)


class A3Qwen3MoeDecoderLayer(PerLayerDecoderLayer, ExpertsOfOwnWidth):
    attention_class = A3Qwen3MoeAttention


class A3Qwen3MoeModel(PerLayerModel, Qwen3MoeModel):
    layer_class, norm_class = A3Qwen3MoeDecoderLayer, Qwen3MoeRMSNorm


class A3Qwen3MoeForCausalLM(PerLayerCausalLM, Qwen3MoeForCausalLM):
    model_class = A3Qwen3MoeModel

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok


convert_names_as("qwen3_moe", A3Qwen3MoeForCausalLM, A3Qwen3MoeModel)

__all__ = ["A3Qwen3MoeForCausalLM", "A3Qwen3MoeModel"]
