"""Stage 1, calibrate: run text through the model layer by layer and store each layer's statistics."""

import logging
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from a3cli.errors import A3Error
from a3cli.models import costs
from a3cli.models.checkpoint import Checkpoint, resolve_model
from a3cli.models.families import ModelShape
from a3cli.models.model import Model, describe
from a3cli.models.shards import PlannedTensor, write_shard
from a3cli.settings import CalibrateSettings
from a3cli.solvers.moments import Tensors
from a3cli.stream.hidden import HiddenStates, States, StatesInMemory, StatesOnDisk
from a3cli.stream.memory import choose_batch_size
from a3cli.stream.sweep import Decoder, Progress, Sweep
from a3cli.text.blocks import (
    TextRead,
    as_compared,
    check_fit,
    check_on_hub,
    check_texts,
    describe_text,
    files_now,
    load_tokenizer,
    sample_blocks,
    tokenizer_fingerprint,
)
from a3cli.work.files import (
    Json,
    bytes_on_disk,
    check_hash,
    check_space,
    drop_leftovers,
    hash_file,
    read_tensors,
    replacing,
    write_tensors,
)
from a3cli.work.folder import Work
from a3cli.work.interrupt import Stop
from a3cli.work.machine import Machine, choose_machine, find_device, free_memory, return_freed_memory
from a3cli.work.manifests import CalibrationManifest
from a3cli.work.processes import Processes, joined
from a3cli.work.sealed import (
    differences,
    name_differences,
    read_if_request_matches,
    read_manifest,
    read_undamaged,
    versions,
    write_manifest,
)

log = logging.getLogger(__name__)

COMPUTING = ("a3cli", "torch", "transformers")  # a calibration uses one version of each throughout


def calibrate(
    settings: CalibrateSettings, work: Work, *, overwrite: bool, progress: Progress, stop: Stop | None = None
) -> CalibrationManifest:
    """Compute the statistics of every decoder layer; return the manifest.

    A finished calibration with the same request is returned; an unfinished one resumes at its layer. All processes
    call this; only the main one writes, except for hidden states.
    Raises A3Error for another request in the same folder unless `overwrite`, and Interrupted at the end of the layer
    in which `stop` was set off.
    """
    return_freed_memory(batches=True)
    with joined(meeting_device(settings)) as processes, ExitStack() as held:
        model, machine = processes.main_first(lambda: open_model(settings))
        processes.from_main(lambda: check_texts([settings.text]))
        processes.from_main(lambda: held.enter_context(work.locked()))
        request = processes.from_main(lambda: describe_request(settings, model.source, machine, known_text(work)))
        finished = processes.from_main(lambda: finished_manifest(work, request, settings, overwrite=overwrite))
        if finished is None:
            calibration = Calibration(settings, work, model, machine, request, stop or Stop())
            return calibration.run(processes, progress, overwrite=overwrite)
        processes.from_main(lambda: record_source(settings, model.source, request, work))
        processes.from_main(lambda: remove_leftovers(work))
        return finished


def meeting_device(settings: CalibrateSettings) -> str:
    """Return the device on which processes reduce their sums. Raises A3Error if it is not a device."""
    if settings.devices is None:
        find_device(settings.device, "--device")
        return settings.device
    return find_device(settings.devices.partition(",")[0].strip(), "--devices").type


def open_model(settings: CalibrateSettings) -> tuple[Model, Machine]:
    source = resolve_model(settings.model, settings.revision, follow_symlinks=settings.follow_symlinks)
    model = describe(source, trust_remote_code=settings.trust_remote_code)
    return model, choose_machine(settings.device, settings.dtype, source.dtype, devices=settings.devices)


class Calibration:
    """One running calibration, in one of its processes."""

    def __init__(
        self, settings: CalibrateSettings, work: Work, model: Model, machine: Machine, request: Json, stop: Stop
    ) -> None:
        self.settings, self.work, self.model, self.machine, self.stop = settings, work, model, machine, stop
        self.full_mlp = settings.mlp_stats == "full"
        # Hashes of finished layers and how each was computed, as in progress.json: only the main process updates it.
        self.done: Json = {
            "request": request,
            "text_read": None,
            "versions": versions(),
            "layers": [],
            "made_with": [],
            "hidden_states": {},
        }

    def run(self, processes: Processes, progress: Progress, *, overwrite: bool) -> CalibrationManifest:
        """Run or resume the calibration; return the manifest."""
        fitting = self._fitting_batch(processes)
        kept = processes.from_main(lambda: self._kept(overwrite=overwrite))
        resumed = kept is not None
        blocks, first = kept or processes.from_main(lambda: self._cut(fitting))
        batch_size = processes.from_main(lambda: int(self.done["batch_size"]))
        try:
            if not resumed:
                processes.from_main(lambda: self._begin(blocks))
            processes.from_main(
                lambda: record_source(self.settings, self.model.source, self.done["request"], self.work)
            )
            with processes.together():
                states = self._states(blocks, processes)
            sweep = Sweep(
                Decoder(self.model, self.machine),
                blocks,
                states,
                processes,
                batch_size,
                adapt=self.settings.batch_size is None,
                full_mlp=self.full_mlp,
                finished=lambda layer, sums: self._finish(layer, sums, states, processes.count, sweep.batch_size),
                progress=progress,
            )
            sweep.run(first)
        except Exception:
            if processes.main and not resumed and not self.done["layers"]:  # leave nothing
                clear(self.work)
            raise
        return processes.from_main(lambda: self._close(blocks))

    def _fitting_batch(self, processes: Processes) -> int:
        """Return the batch size that fits in every process; check it also if the user names one."""
        blocks, seq_len = self.settings.text.samples, self.settings.text.seq_len
        assert blocks is not None
        with processes.together():
            held = self._held_hidden_states(len(processes.share(blocks)))
            fitting = choose_batch_size(
                self.model.shape, self.machine, seq_len, blocks, full_mlp=self.full_mlp, held=held
            )
        return self.settings.batch_size or min(processes.gather(fitting))

    def _held_hidden_states(self, share: int) -> int:
        """Return the bytes of the hidden states of `share` blocks. Raises A3Error if they do not fit beside a layer."""
        device, seq_len = self._held_on, self.settings.text.seq_len
        if device is None:
            return 0
        needed = costs.hidden_state_bytes(self.model.shape, share, seq_len, self.machine.dtype.itemsize)
        free = free_memory(device)
        if needed > free:
            raise A3Error(
                f"--hidden-states {self.settings.hidden_states}: {needed / 1e9:.2f} GB for the hidden states of "
                f"{share} blocks, {free / 1e9:.2f} GB are free; use --hidden-states disk"
            )
        return needed if device.type == self.machine.device.type else 0

    @property
    def _held_on(self) -> torch.device | None:
        """Return the device whose memory holds hidden states, or None if files do."""
        places = {"disk": None, "memory": torch.device("cpu"), "device": self.machine.device}
        return places[self.settings.hidden_states]

    def _cut(self, batch_size: int) -> tuple[torch.Tensor, int]:
        """Return the blocks `[N, T]` of a new calibration, and 0 finished layers."""
        source = self.model.source
        tokenizer = load_tokenizer(source.folder, trust_remote_code=self.settings.trust_remote_code)
        read = TextRead()
        blocks = sample_blocks(tokenizer, self.settings.text, read)
        check_fit(blocks, source.config, source.name)
        self.done["request"] = {**self.done["request"], "text_files": read.files}
        self.done["text_read"] = read.describe()
        self.done["batch_size"] = batch_size
        self._check_space()
        return blocks, 0

    def _kept(self, *, overwrite: bool) -> tuple[torch.Tensor, int] | None:
        """Return the state of an unfinished calibration to resume; with `overwrite`, only of the same request."""
        if not overwrite:
            return self._resume() if self.work.calibration_progress.exists() else None
        begun = self.done
        try:
            same = read_if_request_matches(self.work.calibration_progress, begun["request"], comparable)
            return self._resume() if same else None
        except A3Error as error:
            log.warning("%s; starting again", error)
            self.done = begun
            return None

    def _resume(self) -> tuple[torch.Tensor, int]:
        """Return blocks and number of finished layers of an unfinished calibration, checked against its files."""
        sealed = read_manifest(self.work.calibration_progress, "use --overwrite")
        begun, here = (
            {name: each.get(name) for name in COMPUTING} for each in (sealed.get("versions", {}), versions())
        )
        if differing := name_differences(begun, here):
            raise A3Error(
                f"{self.work.calibration_progress} was written with other versions ({differing}); use those, or "
                "--overwrite to start again"
            )
        self.done = {key: value for key, value in sealed.items() if key != "sha256"}
        check_hash(self.work.tokens, self.done["tokens_hash"], "use --overwrite")
        for layer, expected in enumerate(self.done["layers"]):
            check_hash(self.work.statistics(layer), expected, "use --overwrite")
        blocks = read_tensors(self.work.tokens, "use --overwrite")["tokens"]
        self._drop_damaged_hidden_states((*blocks.shape, self.model.shape.hidden_size))
        drop_leftovers(self.work.calibration)
        if self.done["layers"]:
            log.info("resuming at layer %d of %d", len(self.done["layers"]) + 1, self.model.shape.layers)
        self._check_space()
        return blocks, len(self.done["layers"])

    def _drop_damaged_hidden_states(self, shape: tuple[int, int, int]) -> None:
        """Remove damaged hidden-state files; another pass through the finished layers recomputes them.

        A file without a recorded checksum may be complete, but a power failure would leave the same.
        """
        recorded = self.done["hidden_states"]
        for file in sorted(self.work.calibration.glob("hidden-[0-9]*.bin")):
            states = HiddenStates(file, shape, self.machine.dtype)
            if file.stat().st_size == states.bytes and recorded.get(file.name) == states.digest():
                continue
            if file.name in recorded:
                log.warning("%s has changed since it was written; it is computed again", file)
            file.unlink()

    def _check_space(self) -> None:
        layers = self.model.shape.layers - len(self.done["layers"])
        needed = bytes_needed(self.model.shape, self.settings, self.machine, layers)
        there = bytes_on_disk(self.work.calibration.glob("hidden-*.bin"))
        check_space(self.work.folder, needed - there, "calibration")

    def _begin(self, blocks: torch.Tensor) -> None:
        """Clear the folder and record this calibration in it."""
        clear(self.work)
        self.work.calibration.mkdir(exist_ok=True)
        write_tensors(self.work.tokens, {"tokens": blocks})
        self.done["tokens_hash"] = hash_file(self.work.tokens)
        write_manifest(self.work.calibration_progress, self.done)

    def _states(self, blocks: torch.Tensor, processes: Processes) -> States:
        """Return this process's hidden states. Raises A3Error if its node does not see the work folder."""
        share = processes.share(len(blocks))
        width, dtype = self.model.shape.hidden_size, self.machine.dtype
        if self._held_on is not None:
            return StatesInMemory((len(share), blocks.shape[1], width), dtype, self._held_on)
        if not self.work.tokens.is_file():
            raise A3Error(
                f"{self.work.tokens} was not found by process {processes.rank}: all nodes must share the work folder; "
                "use one that they share, or --hidden-states memory"
            )
        shape = (len(blocks), blocks.shape[1], width)
        states = StatesOnDisk(self.work.hidden_states, self.work.coming_hidden_states, shape, dtype, share.start)
        states.digests |= self.done["hidden_states"]
        return states

    def _finish(self, layer: int, sums: Tensors, states: States, processes: int, batch_size: int) -> None:
        made_with = {"processes": processes, "batch_size": batch_size}
        done = {
            **self.done,
            "batch_size": batch_size,
            "layers": [*self.done["layers"], write_hashed(self.work.statistics(layer), sums)],
            "made_with": [*self.done["made_with"], made_with],
            "hidden_states": dict(states.digests),
        }
        write_manifest(self.work.calibration_progress, done)
        self.done = done
        finished, layers = len(done["layers"]), self.model.shape.layers
        if finished < layers:
            self.stop.before(f"layer {finished + 1} of {layers}", "rerun the same command to resume")

    def _close(self, blocks: torch.Tensor) -> CalibrationManifest:
        manifest = {
            "request": self.done["request"],
            "text_read": self.done.get("text_read"),
            "tokens": int(blocks.numel()),
            "blocks": list(blocks.shape),
            "tokens_hash": self.done["tokens_hash"],
            "layers": self.done["layers"],
            "made_with": self.done["made_with"],
            "versions": versions(),
        }
        written = CalibrationManifest.write(self.work.calibration_manifest, manifest)
        remove_leftovers(self.work)
        return written


def describe_request(
    settings: CalibrateSettings, source: Checkpoint, machine: Machine, known: Json | None = None
) -> Json:
    """Return everything that the statistics depend on: requests with equal `comparable` parts give equal bytes.

    The files that a calibration reads are known only afterwards. `known` has those of an earlier one (see
    `known_text`): `text_files` then has the files that would be read if everything else is the same.
    """
    return {
        "text": describe_text(settings.text),
        "text_files": files_now(settings.text, known["files"], whole=known["whole"]) if known else {},
        "source": source.fingerprint(full=settings.full_check),
        "tokenizer": tokenizer_fingerprint(source.folder),
        "batch_size": settings.batch_size or "auto",
        "mlp_stats": settings.mlp_stats,
        **machine.describe(),
        "trust_remote_code": settings.trust_remote_code,
    }


def comparable(request: Json) -> Json:
    """Return the part of a request that decides whether two calibrations are the same."""
    return {**request, "text": as_compared(request["text"], request["text_files"])}


def recorded_calibration(work: Work) -> Path | None:
    """Return the path of the file that describes the calibration in a work folder, finished or not."""
    manifests = (work.calibration_manifest, work.calibration_progress)
    return next((path for path in manifests if path.exists()), None)


def known_text(work: Work) -> Json | None:
    """Return the local files that a work folder's calibration has read, and whether to the data set's end."""
    path = recorded_calibration(work)
    found = read_undamaged(path) if path else None
    if found is None:
        return None
    return {"files": found["request"]["text_files"], "whole": bool((found.get("text_read") or {}).get("whole"))}


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
    if recorded != wanted:
        if recorded["text"]["dataset"] != wanted["text"]["dataset"]:
            check_on_hub(settings.text)
        raise A3Error(
            f"{path} belongs to a calibration with other settings (differs in "
            f"{differences(recorded, wanted, 'text')}); use --overwrite or another --work"
        )
    if path != work.calibration_manifest:
        return None
    return CalibrationManifest.parse(found, path, "use --overwrite")


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
    """Remove the files of a calibration and its solution; the manifests first, so that nothing looks finished."""
    for folder in (work.solution, work.calibration):
        (folder / "manifest.json").unlink(missing_ok=True)
        for pattern in ("progress.json", "layer-*.safetensors", "hidden-*.bin", "tokens.safetensors"):
            for path in folder.glob(pattern):
                path.unlink()
        drop_leftovers(folder)
        with suppress(OSError):  # missing, or with files that are not a3's
            folder.rmdir()
    work.source.unlink(missing_ok=True)


def bytes_needed(shape: ModelShape, settings: CalibrateSettings, machine: Machine, layers: int) -> int:
    """Return the peak disk usage of the rest of a calibration: statistics and both hidden-state files."""
    text = settings.text
    assert text.samples is not None
    files = 2 if settings.hidden_states == "disk" else 0
    hidden = files * costs.hidden_state_bytes(shape, text.samples, text.seq_len, machine.dtype.itemsize)
    full_mlp = settings.mlp_stats == "full"
    return hidden + layers * costs.statistics_bytes(shape, text.samples, text.seq_len, full_mlp=full_mlp)
