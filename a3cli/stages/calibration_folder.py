"""What a calibration finds in its work folder, and leaves there: request, source record, files."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from a3cli.errors import A3Error
from a3cli.models.checkpoint import Checkpoint
from a3cli.models.shards import PlannedTensor, write_shard
from a3cli.settings import CalibrateSettings
from a3cli.settings.texts import joined_name, shares_of
from a3cli.solvers.moments import Tensors
from a3cli.text.documents import TextRead
from a3cli.text.identity import as_compared, describe_text, files_now
from a3cli.text.sources import check_on_hub
from a3cli.text.tokenizer import tokenizer_fingerprint
from a3cli.work.files import Json, drop_leftovers, replacing
from a3cli.work.folder import Work
from a3cli.work.machine import Machine
from a3cli.work.manifests import CalibrationManifest
from a3cli.work.sealed import check_request, read_manifest, read_undamaged, write_manifest


def tokens_content(blocks: torch.Tensor, held_out: torch.Tensor) -> Tensors:
    """Return the content of the tokens file: the blocks `[N, T]`, and those `[M, T]` that are not calibrated on."""
    return {"tokens": blocks} | ({"held_out": held_out} if len(held_out) else {})


def describe_request(
    settings: CalibrateSettings, source: Checkpoint, machine: Machine, known: Sequence[Json] = ()
) -> Json:
    """Return everything that the statistics depend on: requests with equal `comparable` parts give equal bytes.

    The files that a calibration reads are known only afterwards. `known` has those of an earlier one (see
    `known_text`): `text_files` then has the files that would be read if everything else is the same.
    """
    return {
        **describe_texts(settings, known),
        "source": source.fingerprint(full=settings.full_check),
        "tokenizer": tokenizer_fingerprint(source.folder),
        "batch_size": settings.batch_size or "auto",
        "mlp_stats": settings.mlp_stats,
        **machine.describe(),
        "trust_remote_code": settings.trust_remote_code,
    }


def describe_texts(settings: CalibrateSettings, known: Sequence[Json]) -> Json:
    """Return the text of a request, or what the texts of a mixture share and these texts."""
    parts = settings.parts
    described = [describe_text(part) for part in parts]
    files: list[Json] = [{} for _ in parts]
    if len(known) == len(parts):
        files = [files_now(part, each["files"], whole=each["whole"]) for part, each in zip(parts, known, strict=True)]
    if not settings.texts:
        return {"text": described[0], "text_files": files[0]}
    name = joined_name(each["dataset"] for each in described)
    shared = {**describe_text(settings.text), "dataset": name, "text_field": None, "split": None}
    mixture = [
        {"weight": mixed.weight, "text": text, "text_files": read}
        for mixed, text, read in zip(settings.texts, described, files, strict=True)
    ]
    return {"text": shared, "text_files": {}, "mixture": mixture}


def with_files(request: Json, reads: Sequence[TextRead]) -> Json:
    """Return the entries of a request that say what was read of its texts."""
    if "mixture" not in request:
        return {"text_files": reads[0].files}
    read = ({"text_files": each.files, "text_read": each.describe()} for each in reads)
    return {"mixture": [part | own for part, own in zip(request["mixture"], read, strict=True)]}


def comparable(request: Json) -> Json:
    """Return the part of a request that decides whether two calibrations are the same."""
    if "mixture" not in request:
        return {**request, "text": as_compared(request["text"], request["text_files"])}
    parts, own = request["mixture"], {"dataset": None, "chat": False}
    shares = map(float, shares_of(part["weight"] for part in parts))
    mixture = {
        f"text {number}": {
            **as_compared(part["text"], part["text_files"]),
            "text_files": part["text_files"],
            "weight": share,
        }
        for number, (part, share) in enumerate(zip(parts, shares, strict=True), 1)
    }
    return {**request, "text": {**request["text"], **own}, "mixture": mixture}


def recorded_calibration(work: Work) -> Path | None:
    """Return the path of the file that describes the calibration in a work folder, finished or not."""
    manifests = (work.calibration_manifest, work.calibration_progress)
    return next((path for path in manifests if path.exists()), None)


def known_text(work: Work) -> list[Json]:
    """Return the local files that a work folder's calibration has read of each text, and whether those are all."""
    path = recorded_calibration(work)
    found = read_undamaged(path) if path else None
    if found is None:
        return []
    if "mixture" in found["request"]:
        return [known_files(part["text_files"], part.get("text_read")) for part in found["request"]["mixture"]]
    holder = found if path == work.calibration_manifest else found.get("finished", {}).get(work.tokens.name, {})
    return [known_files(found["request"]["text_files"], holder.get("text_read"))]


def known_files(files: Json, read: Json | None) -> Json:
    read = read or {}
    return {"files": files, "whole": bool(read.get("whole") or read.get("from_each"))}


def record_source(settings: CalibrateSettings, source: Checkpoint, request: Json, work: Work) -> None:
    """Write where the later stages find the checkpoint, which may have been moved since the calibration started."""
    local = Path(settings.model).is_dir()
    record = {
        "model": str(Path(settings.model).resolve()) if local else settings.model,
        "revision": source.revision,
        "follow_symlinks": source.links_out,
        "fingerprint": request["source"],
        "small_files": source.hash_small_files(),
    }
    with suppress(A3Error):  # damaged or missing
        if {**read_manifest(work.source, ""), "sha256": None} == {**record, "sha256": None}:
            return
    write_manifest(work.source, record)


def finished_manifest(
    work: Work, request: Json, settings: CalibrateSettings, *, overwrite: bool
) -> CalibrationManifest | None:
    """Return the manifest of a finished calibration with this request, or None.

    Raises A3Error if the folder holds a calibration, finished or not, with another request, unless `overwrite`.
    """
    path = recorded_calibration(work)
    if overwrite or path is None:
        return None
    found = read_manifest(path, "use --overwrite")
    recorded, wanted = comparable(found["request"]), comparable(request)
    if data_sets(recorded) != data_sets(wanted):
        for part in settings.parts:
            check_on_hub(part)
    holder = f"{path} belongs to a calibration with other settings"
    check_request(recorded, wanted, holder=holder, nested="text", otherwise="another --work")
    if path != work.calibration_manifest:
        return None
    return CalibrationManifest.parse(found, path, "use --overwrite")


def data_sets(request: Json) -> list[str | None]:
    """Return the Hub data sets of a request in comparable form, None for a local one."""
    return [text["dataset"] for text in request.get("mixture", {"": request["text"]}).values()]


def write_hashed(path: Path, tensors: Tensors) -> str:
    """Write a safetensors file, hash and sync it meanwhile; return the hash."""
    planned = [PlannedTensor(name, tuple(value.shape), value.dtype) for name, value in tensors.items()]
    planned.sort(key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))  # aligns each to its item size
    with replacing(path) as partial:
        return write_shard(partial, planned, (tensors[tensor.name] for tensor in planned))


def remove_leftovers(work: Work) -> None:
    """Remove what a finished calibration no longer needs, also after a kill that followed the manifest."""
    for leftover in (*work.calibration.glob("hidden-*.bin"), work.calibration_progress):
        leftover.unlink(missing_ok=True)


def clear(work: Work) -> None:
    """Remove the files of a calibration, its solutions, and what is kept for further ones.

    The manifests are removed first, so that nothing looks finished.
    """
    clear_solutions(work)
    clear_folder(work.calibration)
    for folder in (work.channels, work.kept):
        clear_folder(folder, "*.json", "*.safetensors")
    work.source.unlink(missing_ok=True)


def clear_solutions(work: Work) -> None:
    """Remove all solutions, and what is unfinished or was measured of those with a name."""
    for folder in work.solution_folders():
        clear_folder(folder)
    for path in work.beside_named():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    with suppress(OSError):  # missing, or with files that are not a3's
        work.named_solutions.rmdir()


def clear_folder(folder: Path, *others: str) -> None:
    """Remove the files of a finished or unfinished stage, the manifest first, and those of other patterns."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for pattern in ("progress.json", "layer-*.safetensors", "hidden-*.bin", "tokens.safetensors", *others):
        for path in folder.glob(pattern):
            path.unlink()
    drop_leftovers(folder)
    with suppress(OSError):  # missing, or with files that are not a3's
        folder.rmdir()
