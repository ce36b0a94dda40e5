"""The attention of model types without RoPE: its input, and each head's weights."""

from typing import Any

import torch


class _Reached(Exception):
    pass


@torch.inference_mode()
def layer_input(model: Any, layer: int, blocks: torch.Tensor) -> torch.Tensor:
    """Return what the projections of one layer read, `[n, d]`, for all tokens of some blocks."""
    from tests.conftest import decoder_layers

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
    return layer.self_attn.q_proj


@torch.no_grad()
def head_weights(layer: Any, role: str) -> torch.Tensor:
    """Return the weights `[heads, d + 1, ·]` of q or k of each of 4 heads, float64; the last row is the bias."""
    linear = getattr(layer.self_attn, f"{role}_proj")
    weight, bias = linear.weight, linear.bias
    rows = torch.cat([weight, torch.zeros(len(weight), 1) if bias is None else bias[:, None]], 1)
    return rows.double().view(4, -1, rows.shape[1]).mT
