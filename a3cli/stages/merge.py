"""Merge finished calibrations of one model on different text into one, as if it were one text.

Statistics are sums, so they add up exactly; attention samples are concatenated. One layer of two calibrations is in
memory at a time.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from a3cli.errors import A3Error
from a3cli.methods.inputs import read_samples
from a3cli.report.inspection import read_source
from a3cli.solvers.moments import Tensors
from a3cli.solvers.samples import NAMES, WEIGHT, merge_samples
from a3cli.stages.calibration_folder import clear_solutions, tokens_content
from a3cli.stages.context import read_calibration
from a3cli.text.documents import describe_all
from a3cli.work.draft import drafting
from a3cli.work.files import (
    Json,
    bytes_on_disk,
    check_hash,
    hash_file,
    open_tensors,
    read_tensors,
    write_json,
    write_tensors,
)
from a3cli.work.folder import Work
from a3cli.work.manifests import Calibration, CalibrationManifest, Ingredient, finished_manifest
from a3cli.work.sealed import versions

log = logging.getLogger(__name__)

SAME = ("source", "tokenizer", "dtype", "mlp_stats", "trust_remote_code")
REMEDY = "run a3 calibrate --overwrite there"


def merge(parts: Sequence[Work], target: Work, *, overwrite: bool) -> CalibrationManifest:
    """Write the sum of the calibrations in `parts` to `target`; return its manifest.

    Raises A3Error for a calibration that is unfinished, altered, of another model or kind, or given twice, and if
    `target` holds another one, unless `overwrite`.
    """
    check_places(parts, target)
    with ExitStack() as locks:
        for work in sorted((*parts, target), key=lambda work: work.folder.resolve()):
            locks.enter_context(work.locked())
        calibrations = [read_calibration(work) for work in parts]
        check_alike(parts, calibrations)
        request = merged_request(calibrations)
        if finished := finished_merge(target, request, overwrite=overwrite):
            return finished
        source = read_source(parts[0], calibrations[0].request.source.plain()).plain()
        return write_merged(parts, calibrations, source, target, request)


def check_places(parts: Sequence[Work], target: Work) -> None:
    if len(parts) < 2:
        raise A3Error("name at least two work folders to merge")
    folders = [work.folder.resolve() for work in parts]
    for folder in folders:
        if not folder.is_dir():
            raise A3Error(f"{folder} is not a work folder")
        if folders.count(folder) > 1:
            raise A3Error(f"{folder} is given twice, and its text would count twice; give it once")
    if target.folder.resolve() in folders:
        raise A3Error(f"--into {target.folder} is one of the work folders to merge; choose another")


def check_alike(parts: Sequence[Work], calibrations: list[CalibrationManifest]) -> None:
    """Check that the sums are compatible and no text is in two of them. Raises A3Error."""
    first = calibrations[0]
    for work, other in zip(parts[1:], calibrations[1:], strict=True):
        differing = [name for name in SAME if getattr(other.request, name) != getattr(first.request, name)]
        if other.blocks[1] != first.blocks[1]:  # distances and the blocks' tensor depend on the length
            differing.append("seq_len")
        if differing:
            raise A3Error(
                f"{parts[0].folder} and {work.folder} cannot be merged: they differ in {', '.join(differing)}"
            )
    seen = [each.calibration for calibration in calibrations for each in ingredients(calibration)]
    if len(set(seen)) < len(seen):
        raise A3Error(
            "the same calibration is given twice (itself or in an earlier merge), and its text would count twice; "
            "give it once"
        )


def ingredients(calibration: Calibration) -> list[Ingredient]:
    """Return a calibration's own text, or the parts that it was merged from."""
    request = calibration.request
    if request.merged is not None:
        return request.merged
    own = Ingredient(
        calibration=calibration.sha256,
        text=request.text,
        text_files=request.text_files,
        text_read=calibration.text_read,
        tokens=calibration.tokens,
        device=request.device,
        batch_size=request.batch_size,
        made_with=calibration.made_with or [],
        **({"mixture": request.mixture} if request.mixture else {}),
    )
    return [own]


def merged_reading(merged: Sequence[Ingredient]) -> Json | None:
    """Return the counts of rows over all texts; None if one of them has none."""
    parts = [each.text_read for each in merged if each.text_read is not None]
    return describe_all(parts) if len(parts) == len(merged) else None


def merged_request(calibrations: Sequence[Calibration]) -> Json:
    """Return the merged calibration's request, with its parts."""
    first = calibrations[0].request.plain(exclude={"mixture"})
    merged = [each for calibration in calibrations for each in ingredients(calibration)]
    text = {
        **first["text"],
        "dataset": " + ".join(each.text.dataset for each in merged),
        "samples": sum(calibration.blocks[0] for calibration in calibrations),
    }
    return {**first, "text": text, "text_files": {}, "merged": [each.plain() for each in merged]}


def finished_merge(target: Work, request: Json, *, overwrite: bool) -> CalibrationManifest | None:
    """Return the manifest of the same finished merge, or None. Raises A3Error for another one unless `overwrite`."""
    if overwrite or not (target.calibration_manifest.exists() or target.calibration_progress.exists()):
        return None
    holder = f"{target.folder} holds another calibration"
    if not target.calibration_manifest.exists():
        raise A3Error(f"{holder} (unfinished); use --overwrite or another --into")
    return finished_manifest(
        CalibrationManifest,
        target.calibration_manifest,
        request,
        holder=holder,
        nested="text",
        otherwise="another --into",
    )


def write_merged(
    parts: Sequence[Work], calibrations: list[CalibrationManifest], source: Json, target: Work, request: Json
) -> CalibrationManifest:
    """Write the merged calibration layer by layer; the folder appears when it is complete. Resumable.

    Solutions of the calibration that it replaces are removed.
    """
    for work, calibration in zip(parts, calibrations, strict=True):
        check_hash(work.tokens, calibration.tokens_hash, REMEDY)
    with drafting(target.calibration, {**request, "versions": versions()}) as draft:
        draft.check_space(bytes_on_disk(parts[0].calibration.iterdir()), "the merged calibration")
        read = [read_tensors(work.tokens, REMEDY) for work in parts]
        tokens = torch.cat([each["tokens"] for each in read])
        held_out = torch.cat([each.get("held_out", each["tokens"][:0]) for each in read])
        tokens_file = draft.folder / target.tokens.name
        write_tensors(tokens_file, tokens_content(tokens, held_out))
        hashes = []
        for layer in range(len(calibrations[0].layers)):
            name = target.statistics(layer).name
            known = draft.finished_info(name)
            if known is None:
                log.info("layer %d of %d", layer + 1, len(calibrations[0].layers))
                for work, calibration in zip(parts, calibrations, strict=True):
                    check_hash(work.statistics(layer), calibration.layers[layer], REMEDY)
                write_tensors(draft.folder / name, add_statistics([work.statistics(layer) for work in parts]))
                known = draft.finish(name)
            hashes.append(known["hash"])
        clear_solutions(target)
        write_json(target.source, source)
        manifest = {
            "request": request,
            "text_read": merged_reading([each for calibration in calibrations for each in ingredients(calibration)]),
            "tokens": int(tokens.numel()),
            "blocks": list(tokens.shape),
            "tokens_hash": hash_file(tokens_file),
            "layers": hashes,
            "versions": versions(),
        }
        return CalibrationManifest.write(draft.folder / target.calibration_manifest.name, manifest)


def add_statistics(files: Sequence[Path]) -> Tensors:
    """Return the sums of one layer over all calibrations, and samples of all."""
    with open_tensors(files[0], REMEDY) as first:
        names = [name for name in first.keys() if name not in (*NAMES, WEIGHT)]  # noqa: SIM118, no dictionary
        total = {name: first.get_tensor(name).clone() for name in names}
    for file in files[1:]:
        with open_tensors(file, REMEDY) as more:
            for name, value in total.items():
                value.add_(more.get_tensor(name))
    if "q_gram" not in total:  # attention is carried
        return total
    samples = [read_samples(file) for file in files]
    if lacking := [str(file) for file, found in zip(files, samples, strict=True) if found is None]:
        raise A3Error(f"{', '.join(lacking)}: no attention samples; {REMEDY}")
    return total | merge_samples([found for found in samples if found])
