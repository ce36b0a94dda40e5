"""Stage 1: text → sweep → moments → work folder."""

import logging
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from a3cli.checkpoint import Checkpoint, resolve_model
from a3cli.errors import A3Error
from a3cli.families import ModelShape
from a3cli.machine import Machine, choose_machine, return_freed_memory
from a3cli.model import describe
from a3cli.moments import Tensors
from a3cli.settings import CalibrateSettings
from a3cli.sweep import Decoder, Progress, sweep
from a3cli.text import check_fit, load_tokenizer, sample_blocks, tokenizer_fingerprint
from a3cli.work import (
    Json,
    Work,
    check_hash,
    check_space,
    differences,
    hash_file,
    read_json,
    read_manifest,
    versions,
    write_json,
    write_manifest,
    write_tensors,
)

log = logging.getLogger(__name__)


def calibrate(settings: CalibrateSettings, work: Work, *, overwrite: bool, progress: Progress) -> Json:
    """Make the statistics of every decoder layer; returns the manifest.

    A finished calibration with the same request is returned as it is, an unfinished one goes on at the
    layer where it stopped. Raises A3Error for another request in the same folder unless `overwrite`.
    """
    return_freed_memory()
    source = resolve_model(settings.model, settings.revision)
    model = describe(source, trust_remote_code=settings.trust_remote_code)
    shape = model.shape
    machine = choose_machine(settings.device, settings.dtype, source.dtype)
    request = describe_request(settings, source, machine)
    with work.locked():
        if finished := finished_manifest(work, request, overwrite=overwrite):
            record_source(settings, source, request, work)
            return finished
        resumed = work.calibration_progress.exists() and not overwrite
        blocks, done = resume(work) if resumed else (cut_blocks(settings, source), {})
        check_space(work.folder, bytes_needed(shape, settings, machine, shape.layers - len(done)), "calibration")

        def finish(layer: int, sums: Tensors) -> None:
            write_tensors(work.statistics(layer), sums)
            sealed = hash_file(work.statistics(layer))
            write_progress(work, request, {**done, layer: sealed})
            done[layer] = sealed

        try:
            if not resumed:
                begin(work, request, blocks)
            record_source(settings, source, request, work)
            sweep(
                Decoder(model, machine),
                blocks,
                files=work.hidden_states,
                first_layer=len(done),
                batch_size=settings.batch_size,
                full_mlp=settings.mlp_stats == "full",
                finished=finish,
                progress=progress,
            )
        except Exception:
            if not resumed and not done:  # failed before its first layer: as if it had never begun
                clear(work)
            raise
        manifest = {
            "request": request,
            "tokens": int(blocks.numel()),
            "blocks": list(blocks.shape),
            "tokens_sha256": hash_file(work.tokens),
            "layers": [done[layer] for layer in range(shape.layers)],
            "versions": versions(),
        }
        written = write_manifest(work.calibration_manifest, manifest)
        for leftover in (work.hidden_states(0), work.hidden_states(1), work.calibration_progress):
            leftover.unlink(missing_ok=True)
        return written


def describe_request(settings: CalibrateSettings, source: Checkpoint, machine: Machine) -> Json:
    """Everything that the statistics depend on: equal requests give equal bytes."""
    return {
        "text": settings.text.model_dump(),
        "source": source.fingerprint(),
        "tokenizer": tokenizer_fingerprint(source.folder),
        "batch_size": settings.batch_size,
        "mlp_stats": settings.mlp_stats,
        "device": machine.device.type,
        "dtype": str(machine.dtype).removeprefix("torch."),
    }


def record_source(settings: CalibrateSettings, source: Checkpoint, request: Json, work: Work) -> None:
    """Where the later stages find the checkpoint: it may have been moved since the calibration began."""
    local = Path(settings.model).is_dir()
    record = {
        "model": str(Path(settings.model).resolve()) if local else settings.model,
        "revision": source.revision,
        "fingerprint": request["source"],
    }
    if not work.source.exists() or read_json(work.source) != record:
        write_json(work.source, record)


def finished_manifest(work: Work, request: Json, *, overwrite: bool) -> Json | None:
    """The manifest of a finished calibration with this request, if there is one.

    Raises A3Error if the folder holds a calibration, finished or not, of another request, unless `overwrite`.
    """
    finished = work.calibration_manifest.exists()
    if overwrite or not (finished or work.calibration_progress.exists()):
        return None
    found = read_manifest(work.calibration_manifest if finished else work.calibration_progress, "use --overwrite")
    if found["request"] != request:
        raise A3Error(
            f"{work.folder} holds a calibration of another request (differs in "
            f"{differences(found['request'], request, 'text')}); use --overwrite or another --work"
        )
    return found if finished else None


def clear(work: Work) -> None:
    """Remove what a calibration and a solution made; the manifests first, so that nothing looks finished."""
    for folder in (work.solution, work.calibration):
        (folder / "manifest.json").unlink(missing_ok=True)
        for pattern in ("progress.json", "layer-*.safetensors", "hidden-*.bin", "tokens.safetensors", ".*.partial"):
            for path in folder.glob(pattern):
                path.unlink()
        with suppress(OSError):  # not there, or with something in it that is not ours
            folder.rmdir()
    work.source.unlink(missing_ok=True)


def cut_blocks(settings: CalibrateSettings, source: Checkpoint) -> torch.Tensor:
    """The blocks `[N, T]` of a new calibration."""
    tokenizer = load_tokenizer(source.folder, trust_remote_code=settings.trust_remote_code)
    blocks = sample_blocks(tokenizer, settings.text)
    check_fit(blocks, source.config, source.name)
    return blocks


def begin(work: Work, request: Json, blocks: torch.Tensor) -> None:
    """From here on the folder holds this calibration, and no other."""
    clear(work)
    work.calibration.mkdir(exist_ok=True)
    write_tensors(work.tokens, {"tokens": blocks})
    write_progress(work, request, {})


def write_progress(work: Work, request: Json, done: dict[int, str]) -> None:
    layers = [done[layer] for layer in range(len(done))]
    progress = {"request": request, "tokens_sha256": hash_file(work.tokens), "layers": layers}
    write_manifest(work.calibration_progress, progress)


def resume(work: Work) -> tuple[torch.Tensor, dict[int, str]]:
    """Blocks and hash of each finished layer of an unfinished calibration, checked against its files."""
    progress = read_manifest(work.calibration_progress, "use --overwrite")
    check_hash(work.tokens, progress["tokens_sha256"], "use --overwrite")
    for layer, expected in enumerate(progress["layers"]):
        check_hash(work.statistics(layer), expected, "use --overwrite")
    if progress["layers"]:
        log.info("going on at layer %d", len(progress["layers"]))
    return load_file(work.tokens)["tokens"], dict(enumerate(progress["layers"]))


def bytes_needed(shape: ModelShape, settings: CalibrateSettings, machine: Machine, layers: int) -> int:
    """Disk that the rest of a calibration takes at its peak: statistics and both hidden-state files."""
    assert settings.text.samples is not None
    hidden = 2 * settings.text.samples * settings.text.seq_len * shape.hidden_size * machine.dtype.itemsize
    width = shape.intermediate_size
    query = shape.heads * shape.head_dim
    mlp = width * (width + 1) // 2 * 4 if settings.mlp_stats == "full" else 0
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim * (shape.head_dim + 1) * 8
    return hidden + layers * (mlp + 16 * width + heads + query * (query + 1) // 2 * 4 + 8 * query)
