"""What a stock module with a layer's experts holds and computes, written out from its 3-D tensors."""

from dataclasses import dataclass
from typing import Any

import torch

from tests.conftest import down_weight, mlp_linears


@dataclass(frozen=True)
class Routed:
    """The tokens of one expert: input of its down projection `[n, I]`, and routing weights `[n, 1]`, in float64."""

    x: torch.Tensor
    weights: torch.Tensor

    @property
    def weighted(self) -> torch.Tensor:
        return self.x * self.weights


def routed(experts: Any, arguments: tuple[torch.Tensor, ...]) -> list[Routed]:
    """Return what goes through each expert, from the arguments of a call of the stock module."""
    hidden, chosen, weights = arguments
    found = []
    for index, gate_up in enumerate(experts.gate_up_proj.double()):
        share = (weights * (chosen == index)).sum(-1, keepdim=True).double()
        tokens = (chosen == index).any(-1)
        gate, up = (hidden[tokens].double() @ part.T for part in gate_up.chunk(2))
        found.append(Routed(torch.nn.functional.silu(gate) * up, share[tokens]))
    return found


def each_down(layer: Any, *found: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Return the down projection of a layer's MLP, or of each expert, beside its part of a solution's tensors."""
    if hasattr(getattr(layer, "mlp", None), "experts"):
        return list(zip(layer.mlp.experts.down_proj, *found, strict=True))
    return [(down_weight(mlp_linears(layer)["down"]), *found)]


def down_bias(layer: Any) -> torch.Tensor | None:
    """Return the bias of a layer's down projection, None without one: experts have none."""
    return None if hasattr(getattr(layer, "mlp", None), "experts") else mlp_linears(layer)["down"].bias
