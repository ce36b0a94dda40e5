"""OPT whose layers differ in size (see modeling_a3_base.py)."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.models.opt.modeling_opt import OPTAttention, OPTDecoder, OPTDecoderLayer, OPTForCausalLM, OPTModel

from .modeling_a3_base import PerLayerAttention, layer_config, without_layers


class A3OPTAttention(PerLayerAttention, OPTAttention):
    rotates, output = False, "out_proj"

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.attention_dropout, self.num_key_value_groups = self.dropout, 1
        self.query_scale, self.scaling = self.scaling, 1.0  # where the stock class scales

    def turn(self, query: torch.Tensor, key: torch.Tensor, _positions: Any) -> Any:
        return query * self.query_scale, key


class A3OPTDecoderLayer(OPTDecoderLayer):
    def __init__(self, config: Any, layer_idx: int) -> None:
        own = copy.copy(layer_config(config, layer_idx, rotates=False))
        own.ffn_dim = own.intermediate_size
        super().__init__(own, layer_idx)
        self.self_attn = A3OPTAttention(config, layer_idx)


class A3OPTDecoder(OPTDecoder):
    _no_split_modules = ("A3OPTDecoderLayer",)

    def __init__(self, config: Any) -> None:
        with without_layers(config) as layers:
            super().__init__(config)
        self.layers = nn.ModuleList(A3OPTDecoderLayer(config, layer) for layer in range(layers))
        self.post_init()


class A3OPTModel(OPTModel):
    _auto_class = "AutoModel"
    _no_split_modules = A3OPTDecoder._no_split_modules

    def __init__(self, config: Any) -> None:
        with without_layers(config):
            super().__init__(config)
        self.decoder = A3OPTDecoder(config)
        self.post_init()


class A3OPTForCausalLM(OPTForCausalLM):
    _auto_class = "AutoModelForCausalLM"
    _no_split_modules = A3OPTDecoder._no_split_modules

    def __init__(self, config: Any) -> None:
        with without_layers(config):
            super().__init__(config)
        self.model = A3OPTModel(config)
        self.post_init()


__all__ = ["A3OPTForCausalLM", "A3OPTModel"]
