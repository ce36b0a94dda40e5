"""Gradients of the model's own log-likelihoods: from logits to the last layer's output, and back through a layer."""

from collections.abc import Callable

import torch
from torch import nn

from a3cli.stream.decoder import Arguments, run_layer
from a3cli.stream.hooks import inputs_of

SCALE = 1024.0  # of gradients while they are computed and stored: float16 has no room for smaller ones


def gradient_of_likelihood(
    logits: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, chances: torch.Tensor
) -> torch.Tensor:
    """Return the gradient by `states` `[B, T, d]` of `SCALE` times the log-likelihoods of drawn tokens.

    `chances` `[B, T]` are uniform in [0, 1): each selects a token from the distribution of `logits(states)`.
    """
    with torch.enable_grad():
        hidden = states.detach().requires_grad_()
        likelihoods = logits(hidden).float().log_softmax(-1)
        drawn = draw(likelihoods.detach().exp(), chances)
        total = SCALE * likelihoods.gather(-1, drawn[..., None]).sum()
        return torch.autograd.grad(total, hidden)[0]


def draw(distribution: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """Return the index `[B, T]` at which each distribution's `[B, T, V]` cumulative sum first exceeds its chance."""
    below = distribution.double().cumsum(-1)
    level = chances.to(below.device)[..., None] * below[..., -1:]
    return torch.searchsorted(below, level, right=True)[..., 0].clamp_max(below.shape[-1] - 1)


def back_through(
    layer: nn.Module, reader: nn.Module, states: torch.Tensor, after: torch.Tensor, arguments: Arguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gradients by a layer's input and by its stream after attention from those by its output `after`."""
    with torch.enable_grad(), inputs_of(reader) as seen:
        hidden = states.detach().requires_grad_()
        output = run_layer(layer, hidden, arguments)
    before, between = torch.autograd.grad(output, [hidden, seen[0]], after)
    return before, between
