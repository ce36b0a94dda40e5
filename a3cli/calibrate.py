"""Stage 1: text → sweep → moments → work folder."""

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from a3cli.checkpoint import Checkpoint, resolve_model
from a3cli.errors import A3Error
from a3cli.families import ModelShape
from a3cli.machine import Machine, choose_machine
from a3cli.model import describe
from a3cli.moments import Tensors
from a3cli.settings import CalibrateSettings
from a3cli.sweep import Decoder, Progress, sweep
from a3cli.text import load_tokenizer, sample_blocks, tokenizer_fingerprint
from a3cli.work import (
    Json,
    Work,
    check_hash,
    check_space,
    hash_file,
    read_json,
    read_manifest,
    replacing,
    versions,
    write_json,
    write_manifest,
)

log = logging.getLogger(__name__)


def calibrate(settings: CalibrateSettings, work: Work, *, overwrite: bool, progress: Progress) -> Json:
    """Make the statistics of every decoder layer; returns the manifest.

    A finished calibration with the same request is returned as it is, an unfinished one goes on at the
    layer where it stopped. Raises A3Error for another request in the same folder unless `overwrite`.
    """
    source = resolve_model(settings.model, settings.revision)
    model = describe(source, trust_remote_code=settings.trust_remote_code)
    shape = model.shape
    machine = choose_machine(settings.device, settings.dtype, source.dtype)
    request = describe_request(settings, source, machine)
    with work.locked():
        if finished := finished_manifest(work, request, overwrite=overwrite):
            return finished
        write_json(work.source, describe_source(source, settings))
        blocks = calibration_blocks(settings, source, work, request)
        done = finished_layers(work)
        check_space(work.folder, bytes_needed(shape, settings, machine, shape.layers - len(done)), "calibration")

        def finish(layer: int, sums: Tensors) -> None:
            with replacing(work.statistics(layer)) as partial:
                save_file(sums, partial)
            done[layer] = hash_file(work.statistics(layer))
            write_progress(work, request, done)

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
        manifest = {
            "request": request,
            "tokens": int(blocks.numel()),
            "blocks": list(blocks.shape),
            "tokens_sha256": hash_file(work.tokens),
            "layers": [done[layer] for layer in range(shape.layers)],
            "versions": versions(),
        }
        sealed = write_manifest(work.calibration_manifest, manifest)
        for leftover in (work.hidden_states(0), work.hidden_states(1), work.calibration_progress):
            leftover.unlink(missing_ok=True)
        return sealed


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


def describe_source(source: Checkpoint, settings: CalibrateSettings) -> Json:
    local = Path(settings.model).is_dir()
    return {
        "model": str(Path(settings.model).resolve()) if local else settings.model,
        "revision": source.revision,
        "fingerprint": source.fingerprint(),
    }


def finished_manifest(work: Work, request: Json, *, overwrite: bool) -> Json | None:
    """The manifest of a finished calibration with this request; clears the folder for another if allowed.

    Raises A3Error if the folder holds a calibration, finished or not, of another request.
    """
    found = None
    if work.calibration_manifest.exists() and not overwrite:
        found = read_manifest(work.calibration_manifest, "use --overwrite")
    elif work.calibration_progress.exists() and not overwrite:
        found = read_json(work.calibration_progress)
    if found is not None:
        if found.get("request") == request:
            return found if "sha256" in found else None
        raise A3Error(
            f"{work.folder} holds a calibration of another request (differs in "
            f"{', '.join(differences(found.get('request', {}), request))}); use --overwrite or another --work"
        )
    clear(work)
    return None


def differences(old: Json, new: Json) -> list[str]:
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def clear(work: Work) -> None:
    """Remove what a calibration and a solution made; the manifests first, so that nothing looks finished."""
    for folder in (work.solution, work.calibration):
        (folder / "manifest.json").unlink(missing_ok=True)
        for pattern in ("progress.json", "layer-*.safetensors", "hidden-*.bin", "tokens.safetensors", ".*.partial"):
            for path in folder.glob(pattern):
                path.unlink()
    work.calibration.mkdir(exist_ok=True)


def calibration_blocks(settings: CalibrateSettings, source: Checkpoint, work: Work, request: Json) -> torch.Tensor:
    """The blocks `[N, T]`: those of an unfinished calibration, or newly cut and stored."""
    if work.calibration_progress.exists():
        check_hash(work.tokens, read_json(work.calibration_progress)["tokens_sha256"], "use --overwrite")
        stored: torch.Tensor = load_file(work.tokens)["tokens"]
        return stored
    tokenizer = load_tokenizer(source.folder, trust_remote_code=settings.trust_remote_code)
    blocks = sample_blocks(tokenizer, settings.text)
    with replacing(work.tokens) as partial:
        save_file({"tokens": blocks}, partial)
    write_progress(work, request, {})
    return blocks


def write_progress(work: Work, request: Json, done: dict[int, str]) -> None:
    layers = [done[layer] for layer in range(len(done))]
    write_json(
        work.calibration_progress,
        {"request": request, "tokens_sha256": hash_file(work.tokens), "layers": layers},
    )


def finished_layers(work: Work) -> dict[int, str]:
    """Hash of each layer that an unfinished calibration has behind it, checked against the files."""
    layers = read_json(work.calibration_progress)["layers"]
    for layer, expected in enumerate(layers):
        check_hash(work.statistics(layer), expected, "use --overwrite")
    if layers:
        log.info("going on at layer %d", len(layers))
    return dict(enumerate(layers))


def bytes_needed(shape: ModelShape, settings: CalibrateSettings, machine: Machine, layers: int) -> int:
    """Disk that the rest of a calibration takes at its peak: statistics and both hidden-state files."""
    assert settings.text.samples is not None
    hidden = 2 * settings.text.samples * settings.text.seq_len * shape.hidden_size * machine.dtype.itemsize
    width = shape.intermediate_size
    query = shape.heads * shape.head_dim
    mlp = width * (width + 1) // 2 * 4 if settings.mlp_stats == "full" else 0
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim * (shape.head_dim + 1) * 8
    return hidden + layers * (mlp + 16 * width + heads + query * (query + 1) // 2 * 4 + 8 * query)
