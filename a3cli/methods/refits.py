"""Joint refits of one layer: value maps with the output projection over all heads, and the MLP's down projection."""

import logging
from collections.abc import Callable
from functools import partial

import torch

from a3cli.errors import A3Error
from a3cli.methods.analysis import BestLayer, fitted_gram
from a3cli.methods.base import Projection
from a3cli.methods.experts import refittable, warn_of_experts
from a3cli.methods.inputs import LayerInputs
from a3cli.settings import Component
from a3cli.solvers.mlp import refit_down
from a3cli.solvers.moments import Tensors
from a3cli.solvers.ov import refine_values, refit_output
from a3cli.work.progress import advance

log = logging.getLogger(__name__)

VALUE_ROUNDS = 3  # of refinement of the value maps over all heads


def refit_values(inputs: LayerInputs, layer: BestLayer, rank: int, *, ridge: float, device: torch.device) -> Projection:
    """Return value maps of this rank, and the output projection that fits them."""
    value_map = layer.ov.shared_map[..., :rank].contiguous().to(device)
    weight, in_stream = (
        each.flatten(0, 1).to(device) for each in (inputs.output_weight, inputs.output_weight_in_stream)
    )

    def fit(gram: torch.Tensor) -> Tensors:
        refined = refine_values(gram, in_stream, value_map, ridge=ridge, rounds=VALUE_ROUNDS)
        refit = refit_output(gram, weight, refined, ridge=ridge)
        return {"value_map": refined.cpu(), "output_weight": refit.mT.float().contiguous().cpu()}

    return fit_damped(inputs.layer, "ov", inputs.o_gram.to(device), fit, ridge=ridge)


def refit_channels(
    inputs: LayerInputs, layer: BestLayer, width: int, *, ridge: float, device: torch.device
) -> Projection:
    """Return the first channels of the order, and the down projection that fits them."""
    kept = layer.channels.order[:width].sort().values
    down, chosen = inputs.down.to(device), kept.to(device)

    def fit(gram: torch.Tensor) -> Tensors:
        refit = refit_down(gram, down, chosen, ridge=ridge).cpu()
        tensors = {"channels": kept, "down_weight": refit.float().contiguous()}
        if inputs.shape.mlp_bias:
            mean = inputs.mlp_mean.double()
            bias = inputs.down_bias.double() + inputs.down.double() @ mean - refit @ mean[kept]
            tensors["down_bias"] = bias.float()
        return tensors

    return fit_damped(inputs.layer, "mlp", fitted_gram(inputs).to(device), fit, ridge=ridge)


def refit_experts(
    inputs: LayerInputs, layer: BestLayer, width: int, *, ridge: float, device: torch.device
) -> Projection:
    """Return the first channels of each expert's order, and the down projections that fit them."""
    kept = layer.channels.order[:, :width].sort(-1).values
    weights = torch.empty(len(kept), inputs.shape.hidden_size, width)
    damping = 0.0
    for expert, (channels, tokens) in enumerate(zip(kept, inputs.expert_tokens, strict=True)):
        down = inputs.weight("down", expert)
        if not refittable(inputs, tokens):
            weights[expert] = down[:, channels]
            continue
        fit = partial(_refit_down, down=down.to(device), kept=channels.to(device), ridge=ridge)
        found = fit_damped(inputs.layer, "mlp", inputs.mlp_gram(expert).to(device), fit, ridge=ridge)
        advance(1 / len(kept))
        weights[expert] = found.tensors["down_weight"]
        damping = max(damping, found.damping["mlp"])
    warn_of_experts(inputs)
    return Projection({"channels": kept, "down_weight": weights}, damping={"mlp": damping})


def _refit_down(gram: torch.Tensor, *, down: torch.Tensor, kept: torch.Tensor, ridge: float) -> Tensors:
    return {"down_weight": refit_down(gram, down, kept, ridge=ridge)}


def fit_damped(
    layer: int, component: Component, gram: torch.Tensor, fit: Callable[[torch.Tensor], Tensors], *, ridge: float
) -> Projection:
    """Fit with `gram` or, if rounding left it indefinite, with one that has a larger diagonal.

    Raises A3Error if a hundredth of the mean diagonal is too little.
    """
    for damping in (0.0, *(10.0**-power for power in range(7, 1, -1))):
        try:
            tensors = fit(with_larger_diagonal(gram, damping) if damping else gram)
        except ValueError as error:
            failure = str(error)  # keeping the error would keep its frames' matrices
            continue
        if damping:
            log.warning("layer %d, %s: singular statistics, damped by %g", layer, component.upper(), damping)
        return Projection(tensors, damping={component: max(damping, ridge)})
    raise A3Error(
        f"layer {layer}, {component.upper()}: the refit fails even when damped ({failure}); "
        "calibrate on more tokens or raise --ridge"
    )


def with_larger_diagonal(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Return a copy with `damping` times the mean of its diagonal added to the diagonal."""
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    return damped
