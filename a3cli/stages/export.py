"""Stage 3, export: apply the solution to the source and write a Hugging Face folder.

In the stock shape it is a stock checkpoint; in the per-layer shape the folder also has the code that builds layers of
different sizes. Tensors stream from the source's shards to new ones (`weights.py`); tensors that the solution does not
change are copied byte for byte. The folder is written beside its place and renamed at the end; an interrupted export
resumes at the unfinished weight file.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from a3cli.errors import A3Error, CheckFailed
from a3cli.models.checkpoint import Checkpoint
from a3cli.models.families import decoder_config, usual_entries
from a3cli.models.hub import INDEX
from a3cli.models.model import Model, open_calibrated_source
from a3cli.models.shards import write_index
from a3cli.models.shipped import shipped_files
from a3cli.report.card import model_card
from a3cli.report.figures import human_bytes
from a3cli.report.manifest import MANIFEST, ExportFacts, Manifest, Runtime, read_export_manifest
from a3cli.report.measured import Measured, as_recorded, read_evaluation
from a3cli.report.names import public_dataset, public_name, public_request
from a3cli.runtimes import judge, tokenizer_class_of
from a3cli.settings import ExportSettings
from a3cli.stages.as_llama import check_as_type, check_windows, could_be_llama
from a3cli.stages.exported_config import compressed_config
from a3cli.stages.solution import Solution, read_solution
from a3cli.stages.weights import Shards, plan_weights, write_weights
from a3cli.work.draft import Draft, drafting
from a3cli.work.files import Json, check_hashes, check_space, copy_file, hash_file, making_scratch, write_json, writing
from a3cli.work.folder import Work, holding_target
from a3cli.work.interrupt import Stop
from a3cli.work.manifests import SOURCE_REMEDY, Calibration, CalibrationManifest, Source, SourceRecord, Versions
from a3cli.work.manifests import Solution as RecordedSolution
from a3cli.work.processes import spread
from a3cli.work.progress import Progress, reporting, silent
from a3cli.work.sealed import name_differences, versions

log = logging.getLogger(__name__)

NOT_CARRIED = ("README.md", MANIFEST)


@dataclass(frozen=True)
class Inputs:
    """All that an export depends on, read and checked."""

    settings: ExportSettings
    model: Model
    calibration: CalibrationManifest
    solution: Solution
    measured: list[Measured]
    shards: Shards
    config: Json  # the export's config.json

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensors in self.shards.values() for tensor in tensors)


def export(
    out: Path, settings: ExportSettings, work: Work, *, progress: Progress = silent, stop: Stop | None = None
) -> Manifest:
    """Write the compressed checkpoint to `out`; return its manifest.

    Raises A3Error if the solution is missing or altered, the source changed, or `out` is in use; CheckFailed if
    two writes differ (`check_reproducible`); Interrupted at the end of the weight file in which `stop` was set off.
    """
    stop = stop or Stop()
    work = work.named(settings.name)
    with work.locked():
        calibration, solution = read_solution(work, progress, held=settings.num_processes)
        with reporting(progress, "checking the source"):
            model = open_calibrated_source(work, calibration, full_check=settings.full_check)
        check_small_files(model.source, work)
        check_as_type(settings, model.family, solution.manifest.shape)
        if settings.as_type:
            check_windows(model, solution.manifest.context)
        request = describe_request(settings, solution)
        measured = read_evaluations(settings)
        again = settings.overwrite or settings.check_reproducible
        if not again and (finished := finished_export(out, request, measured)):
            return finished
        check_target(out, model.source, work, overwrite=settings.overwrite)
        shards = plan_weights(model, solution, settings)
        config = compressed_config(model, solution, settings)
        inputs = Inputs(settings, model, calibration, solution, measured, shards, config)
        warn_of_size(inputs, out)
        with holding_target(out.resolve()), drafting(out.resolve(), request) as draft:
            draft.check_space(inputs.bytes, "export")
            manifest = write_checkpoint(draft, inputs, progress, stop)
            if settings.check_reproducible:
                check_space(work.folder, inputs.bytes, "--check-reproducible")
                with making_scratch(work.scratch), drafting(work.scratch / "export", request) as second:
                    check_same_files(manifest, write_checkpoint(second, inputs, progress, stop), out)
            return manifest


def warn_of_size(inputs: Inputs, out: Path) -> None:
    """Warn if weights in another dtype than the source's, or with `--as`, take more than the solution was asked for."""
    most, dtype = inputs.solution.manifest.request.settings.budget_bytes, inputs.settings.dtype
    how, remedy = (f"in {dtype}", "--dtype source") if dtype != "source" else ("with zero biases", "no --as")
    if most is not None and inputs.bytes > most:
        log.warning(
            "%s: %s of weights %s, more than --budget-bytes %s, which counts them as the source has them; "
            "export with %s, or solve for fewer bytes",
            out,
            human_bytes(inputs.bytes),
            how,
            human_bytes(most),
            remedy,
        )


def read_evaluations(settings: ExportSettings) -> list[Measured]:
    """Return the figures of the files of `--eval`, without local paths."""
    return [
        each.model_copy(update={"dataset": public_dataset(each.dataset)})
        for file in settings.evaluations
        for each in read_evaluation(file)
    ]


def describe_request(settings: ExportSettings, solution: Solution) -> Json:
    """Return everything that the weight files depend on."""
    wanted = {"dtype", "max_shard_size", *(["as_type"] if settings.as_type else [])}  # as earlier versions say it
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
    if found.as_type != request["settings"].get("as_type"):
        return None
    if {"settings": settings, "solution": found.solution.sha256, "versions": found.versions.plain()} != request:
        return None
    check_hashes({out / name: expected for name, expected in found.files.items()}, "use --overwrite")
    return found


def check_small_files(source: Checkpoint, work: Work) -> None:
    """Raise A3Error unless tokenizer, generation config and the like are those that the calibration saw."""
    recorded = SourceRecord.read(work.source, SOURCE_REMEDY).small_files
    if differs := name_differences(recorded, source.hash_small_files()):
        raise A3Error(
            f"{source.name}: {differs} changed since a3 calibrate; restore the files, or rerun the same "
            "a3 calibrate to accept the changes"
        )


def check_same_files(one: Manifest, other: Manifest, out: Path) -> None:
    """Raise CheckFailed naming the files that two exports of the same inputs have different."""
    if differs := name_differences(one.files, other.files):
        raise CheckFailed(f"two exports of the same inputs differ in {differs}; {out} was not written")


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


def write_checkpoint(draft: Draft, inputs: Inputs, progress: Progress, stop: Stop) -> Manifest:
    """Write weights, index, config, carried files, card, and last the manifest with the hash of every other file."""
    folder, model, solution = draft.folder, inputs.model, inputs.solution
    with reporting(progress, "writing weights", inputs.bytes, "bytes") as written:
        hashes = write_shards(draft, inputs, written, stop)
    if len(inputs.shards) > 1:
        with writing(folder / INDEX):
            write_index(folder / INDEX, inputs.shards)
    write_json(folder / "config.json", inputs.config)
    if solution.per_layer:
        for file in shipped_files(model.family.model_type):
            copy_file(file, folder / file.name)
    carry_files(model.source, folder)
    facts = state_facts(inputs)
    with writing(folder / "README.md"):
        (folder / "README.md").write_text(model_card(model, facts), "utf-8")
    files = {p.name: hashes.get(p.name) or hash_file(p) for p in sorted(folder.iterdir())}
    return Manifest.write(folder / MANIFEST, {**facts.plain(), "files": files})


def write_shards(draft: Draft, inputs: Inputs, written: Callable[[int], None], stop: Stop) -> dict[str, str]:
    """Write the weight files that are not finished yet; return the hash of every one by its name.

    `written` is called with the bytes of each part that is there.
    """

    def write(name: str) -> str:
        known = draft.finished_info(name)
        if known is not None:
            written(sum(tensor.bytes for tensor in inputs.shards[name]))
        else:
            stop.before(f"writing {name}", "rerun the same command to resume")
            log.info("writing %s", name)
            path = draft.folder / name
            with writing(path):
                digest = write_weights(path, inputs.shards[name], inputs.model, inputs.solution, written)
                known = draft.finish(name, digest)
        return str(known["hash"])

    return dict(zip(inputs.shards, spread(write, inputs.shards, inputs.settings.num_processes), strict=True))


def carry_files(source: Checkpoint, folder: Path) -> None:
    """Copy tokenizer, generation config, chat template, licence and other files that stay unchanged."""
    for name, path in source.small_files().items():
        if name not in NOT_CARRIED:
            copy_file(path, folder / name)


def state_facts(inputs: Inputs) -> ExportFacts:
    """Return what the manifest and the card say of an export."""
    model, calibration, solution = inputs.model, inputs.calibration, inputs.solution
    source, as_type = model.source, inputs.settings.as_type
    verdicts = judge(
        usual_entries(inputs.config),
        smaller_heads=any(size.qk < model.shape.head_dim for size in solution.sizes),
        tokenizer_class=tokenizer_class_of(source.folder),
        could_be_llama=could_be_llama(model.family, model.shape.windows, solution.manifest.context),
        retyped=decoder_config(inputs.config)["model_type"] != model.family.model_type,
        held_by=model.family.held_by,
    )
    return ExportFacts(
        source=Source(
            model=public_name(source.name, source.revision),
            revision=source.revision,
            fingerprint=calibration.request.source,  # checked when the source was opened
        ),
        calibration=Calibration.model_validate(
            {
                "made_with": None,
                **calibration.plain(exclude={"layers", "versions"}),
                "request": public_request(calibration.request.plain()),
            }
        ),
        solution=RecordedSolution.model_validate(solution.manifest.plain(exclude={"layers"})),
        dtype=inputs.settings.dtype,
        max_shard_size=inputs.settings.max_shard_size,
        **({"as_type": as_type} if as_type else {}),
        measured=[Measured.model_validate(each) for each in as_recorded(inputs.measured)],
        runtimes=[Runtime(**asdict(verdict)) for verdict in verdicts],
        versions=Versions(**versions()),
    )
