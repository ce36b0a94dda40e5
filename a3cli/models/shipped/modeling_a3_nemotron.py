"""Nemotron whose layers differ in size (see modeling_a3_base.py)."""

from typing import Any

from transformers.models.nemotron.modeling_nemotron import (
    NemotronAttention,
    NemotronDecoderLayer,
    NemotronForCausalLM,
    NemotronLayerNorm1P,
    NemotronModel,
    NemotronRotaryEmbedding,
    apply_rotary_pos_emb,
)

from .modeling_a3_base import (
    A3RotaryEmbedding,
    PerLayerAttention,
    PerLayerCausalLM,
    PerLayerDecoderLayer,
    PerLayerModel,
)


class A3NemotronRotaryEmbedding(A3RotaryEmbedding):
    if hasattr(NemotronRotaryEmbedding, "compute_default_rope_parameters"):  # 4.57 has one for Llama as well
        compute_default_rope_parameters = staticmethod(NemotronRotaryEmbedding.compute_default_rope_parameters)


class A3NemotronAttention(PerLayerAttention, NemotronAttention):
    rotate = staticmethod(apply_rotary_pos_emb)

    def __init__(self, config: Any, layer_idx: int, slots: list[float]) -> None:
        super().__init__(config, layer_idx, slots)
        self.scaling = config.head_dim**-0.5  # 4.57 has it in its forward


class A3NemotronDecoderLayer(PerLayerDecoderLayer, NemotronDecoderLayer):
    attention_class = A3NemotronAttention


class A3NemotronModel(PerLayerModel, NemotronModel):
    layer_class, norm_class, norm_epsilon = A3NemotronDecoderLayer, NemotronLayerNorm1P, "norm_eps"
    rotary_class = A3NemotronRotaryEmbedding


class A3NemotronForCausalLM(PerLayerCausalLM, NemotronForCausalLM):
    model_class = A3NemotronModel


__all__ = ["A3NemotronForCausalLM", "A3NemotronModel"]
