"""Write the weights of an export: source tensors in, safetensors files out.

`plan_weights` lists the tensors of each file. `write_weights` writes one file: threads read and compute groups of rows,
and one loop (`write_shard`) hashes and writes them in order. Only a few groups are in memory at a time.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from a3cli.errors import A3Error
from a3cli.models.checkpoint import TensorInfo, check_finite, is_finite, read_stored, row_groups
from a3cli.models.experts import of_expert
from a3cli.models.families import ModelShape, Role
from a3cli.models.families.base import HEAD_NORM_ROLES
from a3cli.models.fused import change_roles, stored_shape, take_role
from a3cli.models.model import Model
from a3cli.models.projections import apply_projection, pieces
from a3cli.models.shards import PlannedTensor, plan_shards, write_shard
from a3cli.settings import ExportSettings
from a3cli.solvers.moments import Tensors
from a3cli.stages.as_llama import zero_biases
from a3cli.stages.solution import Solution
from a3cli.work.processes import ahead, one_core_each

Shards = dict[str, list[PlannedTensor]]  # by file name

COMPUTING = 4  # threads, so that rows are computed as fast as they are written


@dataclass(frozen=True)
class Projection:
    """What a solution does to a weight, or its part for some rows to these."""

    solution: Tensors
    shape: ModelShape
    fold_scale: bool

    def apply(self, role: Role, rows: torch.Tensor) -> torch.Tensor:
        return apply_projection(rows, role, self.solution, self.shape, fold_scale=self.fold_scale)


def plan_weights(model: Model, solution: Solution, settings: ExportSettings) -> Shards:
    """Return every tensor of the export in the source's order, by weight file.

    Tensors that the class ignores are left out: a stored `rotary_emb.inv_freq` has the source's head size. With
    `as_type` the zero biases that the other class has are added.
    """
    added = zero_biases(model) if settings.as_type else {}
    shapes = [model.shape.linear_shapes(sizes) for sizes in solution.sizes]
    planned = []
    for name, info in model.source.tensors.items():
        if not model.stock.exports(name):
            continue
        new_shape = info.shape
        if found := model.family.find_roles(name):
            layer, roles, kind = found
            if roles[0] in shapes[layer]:
                new_shape = stored_shape(model.family, roles[0], shapes[layer], "bias" if kind == "bias" else "weight")
            elif roles[0] in HEAD_NORM_ROLES:
                new_shape = (solution.sizes[layer].qk,)
        dtype = info.dtype if settings.dtype == "source" else getattr(torch, settings.dtype)
        planned.append(PlannedTensor(model.exported_name(name), tuple(new_shape), dtype, source=name))
        if name in added:
            bias, size = added[name]
            planned.append(PlannedTensor(bias, (size,), dtype))
    return plan_shards(planned, settings.max_shard_size)


def write_weights(
    path: Path, planned: list[PlannedTensor], model: Model, solution: Solution, written: Callable[[int], None]
) -> str:
    """Write one weight file and return its hash; `written` is called with the bytes of each part that was written.

    Raises A3Error for weights that are not finite.
    """
    jobs = (job for tensor in prefetch_each(planned, model) for job in row_jobs(tensor, model, solution))
    with one_core_each(min(COMPUTING, os.cpu_count() or 1)) as threads:
        return write_shard(path, planned, counted(ahead(threads, jobs, COMPUTING), written))


def counted(parts: Iterable[torch.Tensor], written: Callable[[int], None]) -> Iterator[torch.Tensor]:
    """Yield the parts of a file; call `written` with the bytes of each once the next one is asked for."""
    for part in parts:
        yield part
        written(part.numel() * part.itemsize)


def prefetch_each(planned: list[PlannedTensor], model: Model) -> Iterator[PlannedTensor]:
    """Yield the tensors in order; the system prefetches the next one meanwhile."""
    for this, following in zip(planned, [*planned[1:], None], strict=True):
        if following and following.source_name in model.source.tensors:
            model.source.read_ahead(following.source_name)
        yield this


def row_jobs(tensor: PlannedTensor, model: Model, solution: Solution) -> Iterator[Callable[[], torch.Tensor]]:
    """Yield the jobs that compute one exported tensor, some rows each, in order."""
    name = tensor.source_name
    if name not in model.source.tensors:  # a bias of another class
        yield partial(torch.zeros, tensor.shape, dtype=tensor.dtype)
        return
    found = model.family.find_roles(name)
    if found is None:
        for group in row_groups(model.source.info(name)):
            yield partial(copy_rows, group, tensor, model.source.name)
        return
    layer, roles, _ = found
    fold_scale = not solution.per_layer and model.shape.fixed_scale is None
    own = of_expert(solution.layer(layer), name, model.family)
    projection = Projection(own, model.shape, fold_scale)
    stored = model.source.read(name)
    if model.family.places[roles[0]].transposed:
        yield partial(project_at_once, stored, roles, projection, tensor, model)
        return
    for role in roles:
        weight = take_role(stored, model.family, role, model.shape.linear_shapes())
        for rows, part in pieces(weight, role, projection.solution, model.shape):
            of_rows = replace(projection, solution=part)
            yield partial(project_rows, rows, role, of_rows, tensor, model.source.name)


def copy_rows(group: TensorInfo, planned: PlannedTensor, source: str) -> torch.Tensor:
    """Return rows that the solution does not change, in the export's dtype."""
    rows = read_stored(group)
    check_finite(rows, planned.name, source)
    return convert(rows, planned)


def project_rows(
    rows: torch.Tensor, role: Role, projection: Projection, planned: PlannedTensor, source: str
) -> torch.Tensor:
    """Return what the solution makes of some rows of a role, in the export's dtype."""
    check_finite(rows, planned.name, source)
    return convert(projection.apply(role, rows), planned)


def project_at_once(
    stored: torch.Tensor, roles: tuple[Role, ...], projection: Projection, planned: PlannedTensor, model: Model
) -> torch.Tensor:
    """Return what the solution makes of a whole tensor, in the export's dtype: each stored row has all of its roles."""
    check_finite(stored, planned.name, model.source.name)
    shapes = model.shape.linear_shapes()
    return convert(change_roles(stored, model.family, roles, shapes, projection.apply), planned)


def convert(rows: torch.Tensor, planned: PlannedTensor) -> torch.Tensor:
    """Return rows in the export's dtype. Raises A3Error if a value is too large for it."""
    result = rows.to(planned.dtype)
    if result.dtype != rows.dtype and not is_finite(result):
        raise A3Error(f"tensor {planned.name} has values too large for {planned.dtype}; export with --dtype bfloat16")
    return result
