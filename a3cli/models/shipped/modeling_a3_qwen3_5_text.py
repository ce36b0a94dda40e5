"""Qwen3.5 whose layers differ in MLP width (see modeling_a3_base.py). Attention is that of the stock classes."""

from typing import Any

from torch import nn
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5ForCausalLM, Qwen3_5TextModel

from .modeling_a3_base import layer_config, without_layers


class A3Qwen35DecoderLayer(Qwen3_5DecoderLayer):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(layer_config(config, layer_idx, rotates=False), layer_idx)
        if hasattr(self, "self_attn"):
            self.self_attn.config = config  # the model's own, so that set_attn_implementation reaches it


class A3Qwen35Model(Qwen3_5TextModel):
    _auto_class = "AutoModel"
    _no_split_modules = ("A3Qwen35DecoderLayer",)

    def __init__(self, config: Any) -> None:
        with without_layers(config) as layers:
            super().__init__(config)
        self.layers = nn.ModuleList(A3Qwen35DecoderLayer(config, layer) for layer in range(layers))
        self.post_init()


class A3Qwen35ForCausalLM(Qwen3_5ForCausalLM):
    _auto_class = "AutoModelForCausalLM"
    _no_split_modules = A3Qwen35Model._no_split_modules

    def __init__(self, config: Any) -> None:
        with without_layers(config):
            super().__init__(config)
        self.model = A3Qwen35Model(config)
        self.post_init()


__all__ = ["A3Qwen35ForCausalLM", "A3Qwen35Model"]
