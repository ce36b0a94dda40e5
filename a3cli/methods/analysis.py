"""What `best` keeps of one layer: query and key statistics, the decomposition of values, and the order of channels."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from a3cli.methods.base import LayerAnalysis
from a3cli.methods.experts import describe_experts, order_experts
from a3cli.methods.heads import Heads
from a3cli.methods.inputs import LayerInputs
from a3cli.settings import SolveSettings
from a3cli.solvers.linalg import effective_rank
from a3cli.solvers.mlp import ChannelOrder, order_channels
from a3cli.solvers.ov import solve_ov
from a3cli.solvers.slots import HeadStatistics
from a3cli.work.files import Json
from a3cli.work.progress import advance
from a3cli.work.record import computed_once
from a3cli.work.sealed import versions

ATTAINED = 1 / 3  # of the bound on the effect of score errors
BLOCKS = 256  # number of blocks in which greedy selection takes the MLP's channels


@dataclass(frozen=True)
class BestLayer(LayerAnalysis):
    """Gram matrices and means of queries and keys as calibrated, and the tokens' attention by distance."""

    q_gram: torch.Tensor
    k_gram: torch.Tensor
    k_mean: torch.Tensor
    attention_mass: torch.Tensor
    inputs: Callable[[], LayerInputs]
    channels: ChannelOrder
    channel_rank: float
    form: Heads

    @cached_property
    def heads(self) -> HeadStatistics:
        return self.form.statistics(self.q_gram, self.k_gram, self.k_mean)

    def channel_losses(self) -> torch.Tensor:
        """Return the loss `[I + 1]` at each width of the MLP."""
        return self.channels.curve * self.mlp_unit


def analyse_layer(inputs: LayerInputs, form: Heads, settings: SolveSettings, device: torch.device) -> BestLayer:
    """Return the analysis of one layer; channels are selected on the device."""
    shape = inputs.shape
    group_outputs = inputs.head_outputs.view(shape.kv_heads, shape.group, shape.head_dim, shape.head_dim).mean(1)
    return BestLayer(
        q_gram=inputs.mean("q_gram"),
        k_gram=inputs.mean("k_gram"),
        k_mean=inputs.mean("k_sum"),
        attention_mass=inputs.mean("distance"),
        inputs=inputs.opened_again(),
        score_unit=inputs.score_unit(ATTAINED) / 2,  # a real score has half the energy of its complex form
        ov=solve_ov(group_outputs, inputs.output_gram, floor=settings.eigenvalue_floor),
        channels=read_or_find_order(inputs, device) if "mlp" in settings.cut else any_order(inputs),
        attention_unit=inputs.attention_unit,
        mlp_unit=inputs.mlp_unit,
        key_ranks=inputs.key_ranks(),
        channel_rank=effective_rank(inputs.mean("mlp_energy")).mean().item(),
        form=form,
        experts=describe_experts(inputs) if inputs.shape.experts else None,
    )


def any_order(inputs: LayerInputs) -> ChannelOrder:
    """Return the order of channels of an MLP that is not cut."""
    width = inputs.shape.intermediate_size  # of each expert too
    return ChannelOrder(torch.arange(width), torch.zeros(width + 1, dtype=torch.float64))


def read_or_find_order(inputs: LayerInputs, device: torch.device) -> ChannelOrder:
    """Return the order of channels, from the work folder if known: selection is slow and independent of the budget."""

    def find() -> Json:
        found = find_order(inputs, device)
        return {"order": found.order.tolist(), "curve": found.curve.tolist()}

    request = {**inputs.origin, "blocks": BLOCKS, "versions": versions()}
    known = computed_once(inputs.channels_file, request, find)
    return ChannelOrder(torch.tensor(known["order"]), torch.tensor(known["curve"], dtype=torch.float64))


def find_order(inputs: LayerInputs, device: torch.device) -> ChannelOrder:
    root = inputs.mlp_metric()
    order = partial(order_for_refit, None if root is None else root.to(device))
    if inputs.shape.experts:
        return order_experts(inputs, order, device)
    return order(fitted_gram(inputs).to(device), inputs.down_in_stream.to(device))


def order_for_refit(root: torch.Tensor | None, gram: torch.Tensor, down: torch.Tensor) -> ChannelOrder:
    """Return the order of channels that accounts for the refit; overwrites the Gram matrix."""
    block = max(1, len(gram) // BLOCKS)
    return order_channels(gram, down, metric_root=root, block=block, overwrite_gram=True, advance=advance)


def fitted_gram(inputs: LayerInputs) -> torch.Tensor:
    """Return the Gram matrix `[I, I]` for the fit of the down projection: about the mean if a bias can absorb it."""
    gram = inputs.mlp_gram()
    if not inputs.shape.mlp_bias:
        return gram
    mean = inputs.mlp_mean.double()
    return gram.addr_(mean, mean, alpha=-1)
