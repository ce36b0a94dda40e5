"""Run a smaller model without an export: its layers are projected when they are read.

It always has the per-layer shape, whatever will be exported, so no scale is folded into queries. Its layers need not
correspond one to one to the source's: a probe builds many versions of the same layer.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from a3cli.models.experts import of_expert
from a3cli.models.families import LayerSizes, Role, per_layer_config
from a3cli.models.families.base import HEAD_NORM_ROLES
from a3cli.models.fused import change_roles, stored_shape
from a3cli.models.model import Model
from a3cli.models.projections import apply_projection
from a3cli.models.shipped import per_layer_class
from a3cli.solvers.moments import Tensors
from a3cli.stream.decoder import Decoder
from a3cli.work.machine import Machine


@dataclass(frozen=True)
class Cut:
    """One layer of a smaller model: the index of its source layer, its sizes, RoPE slots and projections."""

    layer: int
    sizes: LayerSizes
    slots: Sequence[float]
    solution: Callable[[], Tensors]


class SmallerDecoder(Decoder):
    """The decoder whose layers are these cuts."""

    def __init__(self, model: Model, machine: Machine, cuts: Sequence[Cut]) -> None:
        self.cuts = cuts
        self._solution: Tensors = {}
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = len(cuts)
        for entry in ("layer_types", model.family.rotating_layers):  # lists with an entry for each layer
            if entry and (kinds := getattr(config, entry, None)):
                setattr(config, entry, [kinds[cut.layer] for cut in cuts])
        slots = [() if model.rope.absent else cut.slots for cut in cuts]
        config.per_layer_config = per_layer_config([cut.sizes for cut in cuts], slots)
        super().__init__(model, machine, config=config)

    def build(self, config: object, dtype: torch.dtype) -> nn.Module:
        kind = per_layer_class(self.family.model_type, self.family.per_layer_class)
        network: nn.Module = kind._from_config(config, dtype=dtype, attn_implementation=self.family.kernel)
        return network

    @contextmanager
    def layer(self, index: int, device: torch.device | None = None) -> Iterator[nn.Module]:
        self._solution = self.cuts[index].solution()
        with super().layer(index, device) as module:
            yield module

    def source_prefix(self, index: int) -> str:
        return self.family.layer_prefix(self.cuts[index].layer)

    def read(self, tensor: str, shape: torch.Size) -> torch.Tensor:
        found = self.family.find_roles(tensor)
        if found is None:
            return super().read(tensor, shape)
        _, roles, kind = found
        full = self.shape.linear_shapes()
        if roles[0] in full:
            shape = torch.Size(stored_shape(self.family, roles[0], full, "bias" if kind == "bias" else "weight"))
        elif roles[0] in HEAD_NORM_ROLES:
            shape = torch.Size([self.shape.head_dim])
        project = partial(self._project, of_expert(self._solution, tensor, self.family))
        return change_roles(super().read(tensor, shape), self.family, roles, full, project)

    def _project(self, solution: Tensors, role: Role, weight: torch.Tensor) -> torch.Tensor:
        return apply_projection(weight, role, solution, self.shape, fold_scale=False)
