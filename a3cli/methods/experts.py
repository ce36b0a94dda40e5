"""The MLP of a layer with experts: each expert's channels are chosen, and its down projection is refit, by themselves.

An expert's output enters the stream times its routing weight, so its Gram matrix weighs each token by the square of
that. A layer's loss is the sum over its experts: errors of different experts on one token are taken to be independent.

With fewer tokens than channels, a Gram matrix is singular and a refit would fit just those tokens, so such experts are
not refit. All experts of a layer have one width, so they are cut all the same: the channels with the highest score of
the paper stay as they are, or those with the largest weights if no token went through the expert.
"""

import logging
from collections.abc import Callable

import torch

from a3cli.methods.inputs import LayerInputs
from a3cli.solvers.mlp import ChannelOrder, keep_channels, plain_losses, score_channels
from a3cli.work.files import Json
from a3cli.work.progress import portion

log = logging.getLogger(__name__)

OrderOne = Callable[[torch.Tensor, torch.Tensor], ChannelOrder]  # from Gram matrix and down projection


def order_experts(inputs: LayerInputs, order_one: OrderOne, device: torch.device) -> ChannelOrder:
    """Return the channels of each expert in the order in which they are kept, `[E, I]`, and the layer's loss `[I + 1]`.

    `order_one` selects for a refit.
    """
    orders, curve = [], torch.zeros(inputs.shape.intermediate_size + 1, dtype=torch.float64)
    for expert, tokens in enumerate(inputs.expert_tokens):
        gram, down = inputs.mlp_gram(expert).to(device), inputs.weight("down", expert).to(device)
        with portion(1 / inputs.shape.experts):
            if refittable(inputs, tokens):
                found = order_one(gram, down)
            else:
                order = expert_scores(inputs, expert).to(device).argsort(descending=True, stable=True)
                found = ChannelOrder(order, plain_losses(gram, down, order))
        orders.append(found.order.cpu())
        curve += found.curve.cpu()
    return ChannelOrder(torch.stack(orders), curve)


def score_experts(inputs: LayerInputs) -> torch.Tensor:
    """Return the paper's score of each expert's channels, `[E, I]`."""
    energy = inputs.mean("mlp_energy")
    return torch.stack([score_channels(own, inputs.weight("down", expert)) for expert, own in enumerate(energy)])


def keep_by_score(inputs: LayerInputs, scores: torch.Tensor, width: int) -> torch.Tensor:
    """Return the channels `[E, m]` of each expert with the highest scores `[E, I]`."""
    tokens = inputs.expert_tokens
    chosen = [own if tokens[expert] else magnitudes(inputs, expert) for expert, own in enumerate(scores)]
    warn_of_experts(inputs)
    return torch.stack([keep_channels(own, width) for own in chosen])


def expert_scores(inputs: LayerInputs, expert: int) -> torch.Tensor:
    """Return the score `[I]` of the channels of an expert that is not refit."""
    if not inputs.expert_tokens[expert]:
        return magnitudes(inputs, expert)
    return score_channels(inputs.mean("mlp_energy", expert), inputs.weight("down", expert))


def magnitudes(inputs: LayerInputs, expert: int) -> torch.Tensor:
    """Return the product of the squared norms of each channel's weights, `[I]`."""
    found = inputs.weight("down", expert).double().square().sum(0)
    for role in inputs.shape.mlp_inputs:
        found = found * inputs.weight(role, expert).double().square().sum(1)
    return found


def refittable(inputs: LayerInputs, tokens: int) -> bool:
    """Return whether so many tokens through an expert determine its refit."""
    return tokens >= inputs.shape.intermediate_size


def describe_experts(inputs: LayerInputs) -> Json:
    """Return each expert's number of tokens, and which experts have fewer than channels, for the manifest."""
    tokens = inputs.expert_tokens
    return {"tokens": tokens, "few_tokens": [e for e, count in enumerate(tokens) if not refittable(inputs, count)]}


def warn_of_experts(inputs: LayerInputs) -> None:
    """Warn of experts with fewer tokens than channels."""
    tokens = inputs.expert_tokens
    few = [expert for expert, count in enumerate(tokens) if not refittable(inputs, count)]
    if not few:
        return
    log.warning(
        "layer %d, MLP: %d of %d experts (%s) saw fewer tokens than their %d channels: they are cut without a refit%s; "
        "calibrate on more tokens",
        inputs.layer,
        len(few),
        len(tokens),
        ", ".join(map(str, few[:8])) + (", …" if len(few) > 8 else ""),
        inputs.shape.intermediate_size,
        ", by the size of their weights where they saw none" if not all(tokens[expert] for expert in few) else "",
    )
