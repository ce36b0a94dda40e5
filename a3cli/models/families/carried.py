"""How a family describes attention that a3 carries as it is, for example linear attention."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionCosts:
    """The costs of carried attention, each the sum over all layers."""

    weights: int  # of its linear layers
    cached: int  # values that the KV cache has for one token
    products: int  # multiplications of one token with each token that it attends to
    state: int  # values of the states of linear attention, which are as large for any length of the text


@dataclass(frozen=True)
class CarriedAttention:
    """Attention that a3 does not read: its weights have no places, and exports keep them. `reason` is a clause."""

    reason: str
    costs: Callable[[Any], AttentionCosts]  # from a configuration
