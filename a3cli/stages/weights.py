"""The weights of an export: read, made smaller, written. Read this module from top to bottom.

`plan_weights` says which tensors each file will hold. `write_weights` writes one file: for each of its tensors, for
each group of rows, a thread computes the exported rows; one loop takes them in order, hashes them and writes them. Only
a few groups are in memory at a time.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from a3cli.errors import A3Error
from a3cli.models.checkpoint import check_finite, is_finite, stored_rows
from a3cli.models.families import ModelShape, Role
from a3cli.models.model import Model
from a3cli.models.projections import apply_projection, pieces
from a3cli.models.shards import PlannedTensor, plan_shards, write_shard
from a3cli.settings import ExportSettings
from a3cli.solvers.moments import Tensors
from a3cli.stages.solution import Solution
from a3cli.work.processes import ahead, one_core_each

Shards = dict[str, list[PlannedTensor]]  # by file name

COMPUTING = 4  # threads that compute rows, as fast as they can be written


@dataclass(frozen=True)
class Projection:
    """What the solution does to some rows of a weight."""

    role: Role
    solution: Tensors
    shape: ModelShape
    fold_scale: bool

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        return apply_projection(rows, self.role, self.solution, self.shape, fold_scale=self.fold_scale)


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a source tensor; without a projection they are exported unchanged."""

    stored: torch.Tensor
    projection: Projection | None = None


def plan_weights(model: Model, solution: Solution, settings: ExportSettings) -> Shards:
    """Return every tensor of the export in the source's order, by weight file.

    Tensors that the class ignores are left out: a stored `rotary_emb.inv_freq` has the source's head size.
    """
    shapes = [model.shape.linear_shapes(sizes) for sizes in solution.sizes]
    planned = []
    for name, info in model.source.tensors.items():
        if not model.stock.exports(name):
            continue
        new_shape = info.shape
        if found := model.family.find_role(name):
            layer, role, kind = found
            if role in shapes[layer]:
                new_shape = shapes[layer][role] if kind == "weight" else shapes[layer][role][:1]
        dtype = info.dtype if settings.dtype == "source" else getattr(torch, settings.dtype)
        planned.append(PlannedTensor(name, tuple(new_shape), dtype))
    return plan_shards(planned, settings.max_shard_size)


def write_weights(path: Path, planned: list[PlannedTensor], model: Model, solution: Solution) -> str:
    """Write one weight file and return its hash. Raises A3Error for weights that are not finite."""
    jobs = (
        partial(convert_rows, rows, tensor, model.source.name)
        for tensor in prefetched(planned, model)
        for rows in read_rows(tensor.name, model, solution)
    )
    with one_core_each(min(COMPUTING, os.cpu_count() or 1)) as threads:
        return write_shard(path, planned, ahead(threads, jobs, COMPUTING))


def prefetched(planned: list[PlannedTensor], model: Model) -> Iterator[PlannedTensor]:
    """Yield the tensors in order, while the system reads the next one from the disk."""
    for this, following in zip(planned, [*planned[1:], None], strict=True):
        if following:
            model.source.read_ahead(following.name)
        yield this


def read_rows(name: str, model: Model, solution: Solution) -> Iterator[Rows]:
    """Yield a source tensor, some rows at a time, each with its part of the solution."""
    found = model.family.find_role(name)
    if found is None:
        yield from map(Rows, stored_rows(model.source.info(name)))
        return
    layer, role, _ = found
    fold_scale = not solution.per_layer and model.shape.fixed_scale is None
    for rows, part in pieces(model.source.read(name), role, solution.layer(layer), model.shape):
        yield Rows(rows, Projection(role, part, model.shape, fold_scale))


def convert_rows(rows: Rows, planned: PlannedTensor, source: str) -> torch.Tensor:
    """Return some rows as the export has them. Raises A3Error if they are not finite, or not in the export's dtype."""
    check_finite(rows.stored, planned.name, source)
    exported = rows.projection.apply(rows.stored) if rows.projection else rows.stored
    result = exported.to(planned.dtype)
    if result.dtype != exported.dtype and not is_finite(result):
        raise A3Error(f"tensor {planned.name} has values too large for {planned.dtype}; export with --dtype bfloat16")
    return result
