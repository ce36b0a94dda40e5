"""GPT-2 whose layers differ in size (see modeling_a3_base.py)."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block, GPT2LMHeadModel, GPT2Model
from transformers.pytorch_utils import Conv1D

from .modeling_a3_base import PerLayerAttention, layer_config, without_layers


class OwnAttention(GPT2Attention):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)  # the second argument is another one


class A3GPT2Attention(PerLayerAttention, OwnAttention):
    rotates, output = False, "c_proj"

    def build_inputs(self, config: Any, query: int, key: int, value: int) -> None:
        self.widths = [query, key, value]
        self.c_attn = Conv1D(sum(self.widths), config.hidden_size)
        self.attention_dropout, self.num_key_value_groups = self.attn_dropout.p, 1
        self.scaling = self.head_dim**-0.5  # transformers 4 has it in its own attention function

    def build_output(self, config: Any, width: int) -> None:
        self.c_proj = Conv1D(config.hidden_size, width)

    def project(self, hidden_states: torch.Tensor) -> Any:
        return self.c_attn(hidden_states).split(self.widths, -1)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, weights = super().forward(*args, **kwargs)
        return self.resid_dropout(output), weights


class A3GPT2Block(GPT2Block):
    def __init__(self, config: Any, layer_idx: int) -> None:
        own = copy.copy(layer_config(config, layer_idx, rotates=False))
        own.n_inner = own.intermediate_size
        super().__init__(own, layer_idx)
        self.attn = A3GPT2Attention(config, layer_idx)


class A3GPT2Model(GPT2Model):
    _auto_class = "AutoModel"
    _no_split_modules = ("A3GPT2Block",)

    def __init__(self, config: Any) -> None:
        with without_layers(config) as layers:
            super().__init__(config)
        self.h = nn.ModuleList(A3GPT2Block(config, layer) for layer in range(layers))
        self.post_init()


class A3GPT2ForCausalLM(GPT2LMHeadModel):
    _auto_class = "AutoModelForCausalLM"
    _no_split_modules = A3GPT2Model._no_split_modules

    def __init__(self, config: Any) -> None:
        with without_layers(config):
            super().__init__(config)
        self.transformer = A3GPT2Model(config)
        self.post_init()


__all__ = ["A3GPT2ForCausalLM", "A3GPT2Model"]
