"""Gemma 2 whose layers differ in size (see modeling_a3_base.py)."""

from typing import Any

from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2Attention,
    Gemma2DecoderLayer,
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma2RMSNorm,
    eager_attention_forward,
)

from .modeling_a3_base import PerLayerAttention, PerLayerCausalLM, PerLayerDecoderLayer, PerLayerModel


class A3Gemma2Attention(PerLayerAttention, Gemma2Attention):
    eager = staticmethod(eager_attention_forward)

    def __init__(self, config: Any, layer_idx: int, slots: list[float]) -> None:
        super().__init__(config, layer_idx, slots)
        self.kernel_options = {"softcap": self.attn_logit_softcapping}


class A3Gemma2DecoderLayer(PerLayerDecoderLayer, Gemma2DecoderLayer):
    attention_class = A3Gemma2Attention


class A3Gemma2Model(PerLayerModel, Gemma2Model):
    layer_class, norm_class = A3Gemma2DecoderLayer, Gemma2RMSNorm
    _supports_sdpa = False  # older releases allow it, but it does not cap scores

    def build_embedding(self, config: Any) -> Any:
        """Newer releases scale in the embedding, older ones after it."""
        if not hasattr(modeling_gemma2, "Gemma2TextScaledWordEmbedding"):
            return super().build_embedding(config)
        return modeling_gemma2.Gemma2TextScaledWordEmbedding(
            config.vocab_size, config.hidden_size, config.pad_token_id, embed_scale=config.hidden_size**0.5
        )


class A3Gemma2ForCausalLM(PerLayerCausalLM, Gemma2ForCausalLM):
    model_class = A3Gemma2Model
    _supports_sdpa = False


__all__ = ["A3Gemma2ForCausalLM", "A3Gemma2Model"]
