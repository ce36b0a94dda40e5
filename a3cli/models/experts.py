"""Hold a layer's experts as checkpoints do: one module for each, with the checkpoint's names.

transformers 5 builds the experts of a layer as one module with 3-D tensors, and converts names while it loads. Held
apart, each expert's weights are read as they are stored, and the input of each down projection can be observed.
"""

import torch
from torch import nn

from a3cli.models.families import Family, Role
from a3cli.models.families.expert_names import EXPERT_BLOCK, index_of
from a3cli.solvers.moments import Tensors
from a3cli.work.files import Json


class Uninitialised(nn.Linear):
    """A linear layer whose weights will be read: drawing them takes seconds for thousands of experts, even on meta."""

    def reset_parameters(self) -> None:
        pass


class Expert(nn.Module):
    """One expert, without biases; `names` are those of its linear layers by role."""

    def __init__(self, names: dict[Role, str], hidden: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self._names, self._activation = names, [activation]  # in a list: shared, not a submodule
        for role, name in names.items():
            size = (width, hidden) if role == "down" else (hidden, width)
            self.add_module(name, Uninitialised(*size, bias=False))

    def forward(self, hidden: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
        """Return the outputs `[n, d]` for tokens `[n, d]`, times their routing weights `[n, 1]`."""
        gate, up, down = (self.get_submodule(self._names[role]) for role in ("gate", "up", "down"))
        output: torch.Tensor = down(self._activation[0](gate(hidden)) * up(hidden)) * routing
        return output.to(hidden.dtype)


class ExpertList(nn.ModuleList):
    """In place of the stock module with 3-D tensors: takes the same arguments."""

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
        """Return the sum over each token's experts, `[n, d]`; `chosen` and `routing` are `[n, top k]`."""
        output = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            tokens, places = torch.where(chosen == index)
            if len(tokens):
                output.index_add_(0, tokens, expert(hidden[tokens], routing[tokens, places, None]))
        return output


def hold_apart(network: nn.Module, family: Family) -> None:
    """Replace the experts of every layer of a stock network on meta; nothing for a family without experts."""
    if family.experts is None:
        return
    names = {role: name for name, role in linear_names(family).items()}
    for layer in network.get_submodule(family.layers).children():
        block = layer.get_submodule(EXPERT_BLOCK)
        stock = block.get_submodule("experts")
        weight = stock.get_parameter("down_proj")  # [experts, d, width]
        count, hidden, width = weight.shape
        activation = stock.get_submodule("act_fn")
        with torch.device("meta"):
            apart = ExpertList(Expert(names, hidden, width, activation) for _ in range(count))
        block.experts = apart.to(weight.dtype)


def stored_name(family: Family, tensor: str) -> str:
    """Return the checkpoint's name of a tensor from that in a class whose experts are held apart."""
    return family.experts.stored(tensor, family.layers) if family.experts else tensor


def weight_names(family: Family, layer: int, role: Role, experts: int) -> list[str]:
    """Return the checkpoint's names of the weights of a role: one, or that of each of so many experts."""
    each = range(experts) if "{expert}" in family.module(role) else (None,)
    return [family.tensor(layer, role, expert=expert) for expert in each]


def linear_names(family: Family) -> dict[str, Role]:
    """Return the roles of an expert's linear layers, by the checkpoint's names of these."""
    roles: tuple[Role, ...] = ("gate", "up", "down")
    return {family.module(role).rpartition(".")[2]: role for role in roles}


def checkpoint_names(family: Family) -> Json | None:
    """Return the checkpoint's names of the block with the experts and of their linear layers; None without any."""
    return {"block": family.experts.block, "roles": linear_names(family)} if family.experts else None


def of_expert(solution: Tensors, tensor: str, family: Family) -> Tensors:
    """Return the part of a layer's solution that is for a tensor: with experts, that of its own."""
    expert = index_of(tensor) if family.experts else None
    if expert is None:
        return solution
    return {name: value[expert] for name, value in solution.items() if name in ("channels", "down_weight")}
