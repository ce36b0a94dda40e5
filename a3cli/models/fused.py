"""Take the weights of roles out of the tensors that hold them, and join them again.

A tensor may hold the rows of several roles (`qkv_proj`, `gate_up_proj`), and may be stored transposed, as `[in, out]`.
Everything else works on a role's own weight `[out, in]` or bias `[out]`. `shapes` are those of the linear weights of a
layer: of the source, or of one that is already smaller.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from a3cli.models.families.base import Family, Kind, LinearShapes, Role


def stored_shape(family: Family, role: Role, shapes: LinearShapes, kind: Kind = "weight") -> tuple[int, ...]:
    """Return the shape of the tensor that holds a role's weight or bias."""
    place = family.places[role]
    rows = sum(shapes[each][0] for each in family.roles_of(place.module))
    if kind == "bias":
        return (rows,)
    columns = shapes[role][1]
    return (columns, rows) if place.transposed else (rows, columns)


def take_role(stored: torch.Tensor, family: Family, role: Role, shapes: LinearShapes) -> torch.Tensor:
    """Return a role's weight `[out, in]` or bias `[out]`: a view of the tensor that holds it."""
    weight = stored.mT if family.places[role].transposed and stored.ndim == 2 else stored
    return weight[family.rows(role, shapes)]


def change_roles(
    stored: torch.Tensor,
    family: Family,
    roles: tuple[Role, ...],
    shapes: LinearShapes,
    change: Callable[[Role, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return a tensor of these roles, stored likewise, after `change` was applied to each role's part of it."""
    parts = [change(role, take_role(stored, family, role, shapes)) for role in roles]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.mT if family.places[roles[0]].transposed and joined.ndim == 2 else joined


@dataclass(frozen=True)
class RoleLinear:
    """A role's part of a linear layer: views of its weight and bias, and where its outputs are."""

    module: nn.Module
    rows: slice
    transposed: bool

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight `[out, in]`; writing to it changes the module."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return (weight.mT if self.transposed else weight)[self.rows]

    @property
    def bias(self) -> torch.Tensor | None:
        bias = self.module.bias
        return bias[self.rows] if isinstance(bias, torch.Tensor) else None


def role_linear(layer: nn.Module, family: Family, role: Role, shapes: LinearShapes) -> RoleLinear:
    """Return a role's part of a decoder layer whose linear weights have these shapes."""
    place = family.places[role]
    return RoleLinear(layer.get_submodule(place.module), family.rows(role, shapes), place.transposed)
