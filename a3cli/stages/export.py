"""Stage 3, export: apply the solution to the source and write a Hugging Face folder.

In the stock shape it is a stock checkpoint; in the per-layer shape the folder also has the code that builds layers of
different sizes. Tensors stream from the source's shards to new ones, one at a time; tensors that the solution does not
change are copied byte for byte. The folder is written beside its place and renamed at the end; an interrupted export
resumes at the unfinished weight file.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from a3cli.errors import A3Error, CheckFailed
from a3cli.models.checkpoint import (
    Checkpoint,
    PlannedTensor,
    check_finite,
    is_finite,
    plan_shards,
    shard_names,
    stored_rows,
    write_index,
    write_shard,
)
from a3cli.models.families import Family, LayerSizes, per_layer_config
from a3cli.models.hub import INDEX
from a3cli.models.model import Model, open_calibrated_source
from a3cli.models.projections import apply_projection, pieces
from a3cli.models.rope import ROPE_KEYS, both_spellings, kept_rope_config
from a3cli.models.shipped import module_name, shipped_files
from a3cli.report.card import model_card
from a3cli.report.manifest import MANIFEST, ExportFacts, Manifest, read_export_manifest
from a3cli.report.measured import Measured, as_recorded, read_evaluation
from a3cli.report.names import public_dataset, public_name, public_request
from a3cli.runtimes import Verdict, judge, tokenizer_class_of
from a3cli.settings import ExportSettings
from a3cli.solvers.moments import Tensors
from a3cli.work.draft import Draft, drafting
from a3cli.work.files import (
    Json,
    check_hashes,
    check_space,
    copy_file,
    hash_file,
    making_scratch,
    read_tensors,
    write_json,
    writing,
)
from a3cli.work.folder import Work, holding_target
from a3cli.work.interrupt import Stop
from a3cli.work.manifests import CalibrationManifest, SolutionManifest, SourceRecord
from a3cli.work.processes import ahead, one_core_each, spread
from a3cli.work.sealed import name_differences, versions

log = logging.getLogger(__name__)

NOT_CARRIED = ("README.md", MANIFEST)
MAKERS = 4  # threads that compute a weight file's rows, as fast as they can be written

Pieces = Iterator[torch.Tensor]  # consecutive rows of one weight
Named = tuple[str, torch.Tensor]  # such rows, with the weight's name


class Solution:
    """The manifest, and the projections of the layers that are being written."""

    def __init__(self, manifest: SolutionManifest, work: Work, *, held: int = 1) -> None:
        self.manifest = manifest
        self.layer: Callable[[int], Tensors] = lru_cache(maxsize=held)(
            lambda i: read_tensors(work.layer_solution(i), "run a3 solve --overwrite")
        )
        self.sizes = [LayerSizes(size.qk, size.ov, size.mlp) for size in manifest.sizes]

    @property
    def per_layer(self) -> bool:
        return bool(self.manifest.shape == "per-layer")

    def slots(self, layer: int) -> list[float]:
        """Return the RoPE slots of a layer; none where heads keep their size in the stock shape."""
        own: Any = self.manifest.rope_slots or []
        chosen: list[float] = own[layer] if self.per_layer else own
        return chosen


def export(out: Path, settings: ExportSettings, work: Work, *, stop: Stop | None = None) -> Manifest:
    """Write the compressed checkpoint to `out`; returns its manifest.

    Raises A3Error if the solution is missing or altered, the source changed, or `out` is in use; CheckFailed if
    two writes differ (`check_reproducible`); Interrupted at the end of the weight file in which `stop` was set off.
    """
    stop = stop or Stop()
    with work.locked():
        calibration, solution = read_solution(work, held=settings.num_processes)
        model = open_calibrated_source(work, calibration, full_check=settings.full_check)
        check_small_files(model.source, work)
        request = describe_request(settings, solution)
        measured = [
            each.model_copy(update={"dataset": public_dataset(each.dataset)})
            for file in settings.evaluations
            for each in read_evaluation(file)
        ]
        again = settings.overwrite or settings.check_reproducible
        if not again and (finished := finished_export(out, request, measured)):
            return finished
        check_target(out, model.source, work, overwrite=settings.overwrite)
        shards = plan(model, solution, settings)
        size = sum(t.bytes for tensors in shards.values() for t in tensors)
        inputs = (model, calibration, solution, shards, settings, measured, stop)
        with holding_target(out.resolve()), drafting(out.resolve(), request) as draft:
            draft.check_space(size, "export")
            manifest = write_checkpoint(draft, *inputs)
            if settings.check_reproducible:
                check_space(work.folder, size, "--check-reproducible")
                with making_scratch(work.scratch), drafting(work.scratch / "export", request) as second:
                    check_same_files(manifest, write_checkpoint(second, *inputs), out)
            return manifest


def describe_request(settings: ExportSettings, solution: Solution) -> Json:
    """Return everything that the weight files depend on."""
    wanted = {"dtype", "max_shard_size"}
    return {
        "settings": settings.model_dump(mode="json", include=wanted),
        "solution": solution.manifest.sha256,
        "versions": versions(),
    }


def finished_export(out: Path, request: Json, measured: list[Measured]) -> Manifest | None:
    """Return the manifest of a complete export with this request, as left by a kill at the end, or None."""
    found = None
    with suppress(A3Error):  # missing, or not an a3 export
        found = None if out.is_symlink() else read_export_manifest(out / MANIFEST)
    if found is None or as_recorded(found.measured) != as_recorded(measured):
        return None
    settings = {name: getattr(found, name) for name in request["settings"]}
    if {"settings": settings, "solution": found.solution.sha256, "versions": found.versions.plain()} != request:
        return None
    check_hashes({out / name: expected for name, expected in found.files.items()}, "use --overwrite")
    return found


def check_small_files(source: Checkpoint, work: Work) -> None:
    """Raise A3Error unless tokenizer, generation config and the like are those that the calibration saw."""
    recorded = SourceRecord.read(work.source, "run a3 calibrate on the source again").small_files
    if differs := name_differences(recorded, source.hash_small_files()):
        raise A3Error(
            f"{source.name}: {differs} changed since a3 calibrate; restore the files, or rerun the same "
            "a3 calibrate to accept the changes"
        )


def check_same_files(one: Manifest, other: Manifest, out: Path) -> None:
    """Raise CheckFailed naming the files that two exports of the same inputs have different."""
    if differs := name_differences(one.files, other.files):
        raise CheckFailed(f"two exports of the same inputs differ in {differs}; {out} was not written")


def read_solution(work: Work, *, held: int = 1) -> tuple[CalibrationManifest, Solution]:
    """Return calibration manifest and solution, checked against each other and against their files."""
    if not work.solution_manifest.is_file():
        raise A3Error(f"{work.folder} has no finished solution; run a3 solve first (--work names the folder)")
    calibration = CalibrationManifest.read(work.calibration_manifest, "run a3 calibrate --overwrite")
    manifest = SolutionManifest.read(work.solution_manifest, "run a3 solve --overwrite")
    if manifest.request.calibration != calibration.sha256:
        raise A3Error(
            f"{work.solution_manifest} was solved from another calibration than {work.calibration_manifest}; "
            "run a3 solve --overwrite"
        )
    files = {work.layer_solution(layer): expected for layer, expected in enumerate(manifest.layers)}
    check_hashes(files, "run a3 solve --overwrite")
    return calibration, Solution(manifest, work, held=held)


def check_target(out: Path, source: Checkpoint, work: Work, *, overwrite: bool) -> None:
    """Check that `out` is empty or an earlier export, and apart from the folders that are read. Raises A3Error."""
    resolved = out.resolve()
    for folder, name in ((source.folder.resolve(), "the source"), (work.folder.resolve(), "the work folder")):
        if resolved == folder or folder in resolved.parents or resolved in folder.parents:
            raise A3Error(f"{out} and {name} {folder} are inside one another; choose another output folder")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise A3Error(f"{out} is not a folder; choose another output folder")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise A3Error(f"{out} is not empty; use --overwrite to replace an earlier export, or another folder")
        if not (out / MANIFEST).is_file():
            raise A3Error(
                f"{out} holds something that is not an a3 export, which --overwrite does not replace; "
                "choose another folder"
            )


def plan(model: Model, solution: Solution, settings: ExportSettings) -> dict[str, list[PlannedTensor]]:
    """Return every tensor of the export in the source's order, by shard file.

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
    groups = plan_shards(planned, settings.max_shard_size)
    return dict(zip(shard_names(len(groups)), groups, strict=True))


def write_checkpoint(
    draft: Draft,
    model: Model,
    calibration: CalibrationManifest,
    solution: Solution,
    shards: dict[str, list[PlannedTensor]],
    settings: ExportSettings,
    measured: list[Measured],
    stop: Stop,
) -> Manifest:
    """Write weights, index, config, carried files, card, and last the manifest with the hash of every other file."""
    folder = draft.folder

    def write(shard: str) -> str:
        known = draft.finished_info(shard)
        if known is None:
            stop.before(f"writing {shard}", "rerun the same command to resume")
            log.info("writing %s", shard)
            tensors = transform(model, solution, shards[shard])
            with writing(folder / shard):
                digest = write_shard(folder / shard, shards[shard], tensors, cached=False)
                known = draft.finish(shard, digest)
        return str(known["hash"])

    hashes = dict(zip(shards, spread(write, shards, settings.num_processes), strict=True))
    if len(shards) > 1:
        with writing(folder / INDEX):
            write_index(folder / INDEX, shards)
    config = compressed_config(model, solution, settings)
    write_json(folder / "config.json", config)
    if solution.per_layer:
        for file in shipped_files(model.family.model_type):
            copy_file(file, folder / file.name)
    carry_files(model.source, folder)
    result = {
        "source": {
            "model": public_name(model.source.name, model.source.revision),
            "revision": model.source.revision,
            "fingerprint": calibration.request.source.plain(),  # checked when the source was opened
        },
        "calibration": {
            "request": public_request(calibration.request.plain()),
            "made_with": None,
            **calibration.plain(exclude={"request", "layers", "versions"}),
        },
        "solution": solution.manifest.plain(exclude={"layers"}),
        "dtype": settings.dtype,
        "max_shard_size": settings.max_shard_size,
        "measured": as_recorded(measured),
        "runtimes": [asdict(verdict) for verdict in judge_export(config, model, solution)],
        "versions": versions(),
    }
    with writing(folder / "README.md"):
        (folder / "README.md").write_text(model_card(model, ExportFacts.model_validate(result)), "utf-8")
    files = {p.name: hashes.get(p.name) or hash_file(p) for p in sorted(folder.iterdir())}
    return Manifest.write(folder / MANIFEST, {**result, "files": files})


def judge_export(config: Json, model: Model, solution: Solution) -> list[Verdict]:
    """Return which runtimes load an export with this config.json."""
    smaller_heads = any(size.qk < model.shape.head_dim for size in solution.sizes)
    return judge(config, smaller_heads=smaller_heads, tokenizer_class=tokenizer_class_of(model.source.folder))


def transform(model: Model, solution: Solution, planned: list[PlannedTensor]) -> Iterator[Pieces]:
    """Yield one tensor after another, computed by several threads while the system prefetches the next."""
    with one_core_each(min(MAKERS, os.cpu_count() or 1)) as threads:
        rows = ahead(threads, shard_jobs(model, solution, planned), MAKERS)
        for _, of_tensor in groupby(rows, key=itemgetter(0)):
            yield (part for _, part in of_tensor)


def shard_jobs(model: Model, solution: Solution, planned: list[PlannedTensor]) -> Iterator[Callable[[], Named]]:
    """Yield the jobs that compute the tensors of a weight file, in order."""
    for this, following in zip(planned, [*planned[1:], None], strict=True):
        if following:
            model.source.read_ahead(following.name)
        yield from tensor_jobs(model, solution, this)


def tensor_jobs(model: Model, solution: Solution, planned: PlannedTensor) -> Iterator[Callable[[], Named]]:
    """Yield the jobs that compute one exported tensor, some rows each. Raises A3Error if it is not finite."""
    found = model.family.find_role(planned.name)
    if found is None:
        for rows in stored_rows(model.source.info(planned.name)):
            yield partial(project_rows, rows, planned, model)
        return
    layer, role, _ = found
    weight = model.source.read(planned.name)
    fold_scale = not solution.per_layer and model.shape.fixed_scale is None
    for part, of_rows in pieces(weight, role, solution.layer(layer), model.shape):
        project = partial(apply_projection, role=role, solution=of_rows, shape=model.shape, fold_scale=fold_scale)
        yield partial(project_rows, part, planned, model, project)


def project_rows(
    rows: torch.Tensor,
    planned: PlannedTensor,
    model: Model,
    project: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
) -> Named:
    check_finite(rows, planned.name, model.source.name)
    return planned.name, converted(project(rows), planned)


def converted(rows: torch.Tensor, planned: PlannedTensor) -> torch.Tensor:
    result = rows.to(planned.dtype)
    if result.dtype != rows.dtype and not is_finite(result):
        raise A3Error(f"tensor {planned.name} has values too large for {planned.dtype}; export with --dtype bfloat16")
    return result


def compressed_config(model: Model, solution: Solution, settings: ExportSettings) -> Json:
    """Return the source's config.json with the changes of the solution."""
    changes = per_layer_changes(model, solution) if solution.per_layer else stock_changes(model, solution)
    if solution.manifest.context != model.rope.context:  # lowered by --context
        changes["max_position_embeddings"] = solution.manifest.context
    gone = ROPE_KEYS if ROPE_KEYS & changes.keys() else set()
    config = {key: value for key, value in model.source.config.items() if key not in gone} | changes
    if settings.dtype != "source":
        config.pop("torch_dtype", None)
        config["dtype"] = settings.dtype
    return config


def stock_changes(model: Model, solution: Solution) -> Json:
    """Return one head size and MLP width for all layers and, if heads are smaller, the new RoPE."""
    sizes = solution.sizes[0]
    changes: Json = {"intermediate_size": sizes.mlp}
    if model.source.stored_otherwise:  # config.json names only the decoder's class
        changes["architectures"] = [model.stock.name]
    if sizes.qk < model.shape.head_dim:
        rope = replace(model.rope, context=solution.manifest.context)
        linear_factor = solution.manifest.request.settings.rope_form == "linear"
        kept = kept_rope_config(rope, solution.slots(0), linear_factor=linear_factor)
        return changes | {"head_dim": sizes.qk, **kept}
    return changes | lowered_rope(model, solution)


def per_layer_changes(model: Model, solution: Solution) -> Json:
    """Return `per_layer_config` for transformers 5, and the `auto_map` of the code that builds the layers.

    `head_dim` stays the source's: it defines the pairs that `rope_slots` refers to, and the softmax scale.
    """
    return {
        "architectures": [model.family.per_layer_class],
        "auto_map": auto_map(model.family),
        "head_dim": model.shape.head_dim,
        "per_layer_config": per_layer_config(solution.sizes, [solution.slots(i) for i in range(model.shape.layers)]),
        **both_spellings(model.rope.parameters),
        **lowered_rope(model, solution),
    }


def auto_map(family: Family) -> Json:
    """Return the classes in the exported code by auto class; vLLM's Transformers backend needs the second one."""
    causal = f"{module_name(family.model_type)}.{family.per_layer_class}"
    return {"AutoModelForCausalLM": causal, "AutoModel": causal.replace("ForCausalLM", "Model")}


def lowered_rope(model: Model, solution: Solution) -> Json:
    """Return RoPE of all pairs if `--context` lowered `max_position_embeddings`, on which some RoPE types depend."""
    context, pairs = solution.manifest.context, range(len(model.rope.short))
    return {} if context == model.rope.context else kept_rope_config(replace(model.rope, context=context), pairs)


def carry_files(source: Checkpoint, folder: Path) -> None:
    """Copy tokenizer, generation config, chat template, licence and other files that stay unchanged."""
    for name, path in source.small_files().items():
        if name not in NOT_CARRIED:
            copy_file(path, folder / name)
