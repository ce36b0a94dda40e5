"""MPT whose layers differ in size (see modeling_a3_base.py)."""

from typing import Any

import torch
from torch import nn
from transformers.models.mpt.modeling_mpt import MptAttention, MptBlock, MptForCausalLM, MptMLP, MptModel

from .modeling_a3_base import layer_config, take_cache, without_layers


class A3MptAttention(MptAttention):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        own = layer_config(config, layer_idx, rotates=False)
        self.widths = [self.n_heads * size for size in (own.qk_head_dim, own.qk_head_dim, own.v_head_dim)]
        self.Wqkv = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(self.widths[2], config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache = take_cache(kwargs, attention_mask, hidden_states.shape[1])
        heads = self.Wqkv(hidden_states).split(self.widths, -1)
        query, key, value = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in heads)
        if cache is not None:
            place = {"cache_position": kwargs.get("cache_position")}  # read by the static cache of transformers 4
            key, value = cache.update(key, value, self.layer_idx, place)
        scores = query @ key.transpose(-1, -2) * self.softmax_scale + position_bias[..., -key.shape[-2] :]
        if attention_mask is not None:  # true where a key is hidden
            scores = scores.masked_fill(attention_mask, torch.finfo(query.dtype).min)
        weights = nn.functional.softmax(scores.float(), dim=-1).to(value.dtype)
        weights = nn.functional.dropout(weights, p=self.attn_dropout_p, training=self.training)
        return self.out_proj((weights @ value).transpose(1, 2).flatten(2)), weights


class A3MptMLP(MptMLP):
    def __init__(self, config: Any, width: int) -> None:
        super().__init__(config)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)


class A3MptBlock(MptBlock):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.attn = A3MptAttention(config, layer_idx)
        self.ffn = A3MptMLP(config, layer_config(config, layer_idx, rotates=False).intermediate_size)


class A3MptModel(MptModel):
    _auto_class = "AutoModel"
    _no_split_modules = ("A3MptBlock",)

    def __init__(self, config: Any) -> None:
        with without_layers(config) as layers:
            super().__init__(config)
        self.blocks = nn.ModuleList(A3MptBlock(config, layer) for layer in range(layers))
        self.post_init()


class A3MptForCausalLM(MptForCausalLM):
    _auto_class = "AutoModelForCausalLM"
    _no_split_modules = A3MptModel._no_split_modules

    def __init__(self, config: Any) -> None:
        with without_layers(config):
            super().__init__(config)
        self.transformer = A3MptModel(config)
        self.post_init()


__all__ = ["A3MptForCausalLM", "A3MptModel"]
