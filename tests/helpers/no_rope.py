"""The attention of model types without RoPE: its input, and each head's weights."""

from typing import Any

import torch

from tests.conftest import attention_of, decoder_layers, down_weight, head_linears


class _Reached(Exception):
    pass


@torch.inference_mode()
def layer_input(model: Any, layer: int, blocks: torch.Tensor) -> torch.Tensor:
    """Return what the projections of one layer read, `[n, d]`, for all tokens of some blocks."""
    seen = []

    def keep(_module: Any, args: tuple[torch.Tensor]) -> None:
        seen.append(args[0].flatten(0, -2))
        raise _Reached

    handle = query_linear(decoder_layers(model)[layer]).register_forward_pre_hook(keep)
    try:
        model(blocks, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


def query_linear(layer: Any) -> Any:
    """Return the linear layer that computes queries."""
    return head_linears(attention_of(layer))["q"][0]


@torch.no_grad()
def head_weights(layer: Any, role: str) -> torch.Tensor:
    """Return the weights `[heads, d + 1, ·]` of q or k of each of 4 heads, float64; the last row is the bias."""
    attention = attention_of(layer)
    linear, part = head_linears(attention)[role]
    if hasattr(attention, "widths"):  # an export's: each part has a size of its own
        start = sum(attention.widths[: "qkv".index(role)])
        part = slice(start, start + attention.widths["qkv".index(role)])
    weight, bias = down_weight(linear)[part], linear.bias
    rows = torch.cat([weight, torch.zeros(len(weight), 1) if bias is None else bias[part, None]], 1)
    return rows.double().view(4, -1, rows.shape[1]).mT
