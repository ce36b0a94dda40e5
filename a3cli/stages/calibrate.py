"""Stage 1, calibrate: run text through the model layer by layer and store each layer's statistics."""

import logging
from contextlib import ExitStack

import torch

from a3cli.errors import A3Error
from a3cli.models import costs
from a3cli.models.checkpoint import Checkpoint, resolve_model
from a3cli.models.families import ModelShape, usual_entries
from a3cli.models.model import Model, describe
from a3cli.settings import CalibrateSettings
from a3cli.solvers.moments import Tensors
from a3cli.stages.calibration_folder import (
    clear,
    comparable,
    describe_request,
    finished_manifest,
    known_text,
    record_source,
    remove_leftovers,
    tokens_content,
    with_files,
    write_hashed,
)
from a3cli.stream.decoder import Decoder
from a3cli.stream.hidden import HiddenStates, States, StatesInMemory, StatesOnDisk
from a3cli.stream.memory import choose_batch_size
from a3cli.stream.sweep import Sweep
from a3cli.text.blocks import CONTEXT, POOL, check_fit, sample_blocks
from a3cli.text.counted import counting
from a3cli.text.documents import TextRead, check_reachable, describe_all
from a3cli.text.sources import check_mixture
from a3cli.text.tokenizer import load_tokenizer
from a3cli.work.files import (
    Json,
    bytes_on_disk,
    check_hash,
    check_space,
    drop_leftovers,
    hash_file,
    read_tensors,
    write_tensors,
)
from a3cli.work.folder import Work
from a3cli.work.interrupt import Stop
from a3cli.work.machine import Machine, choose_machine, find_device, free_memory, return_freed_memory
from a3cli.work.manifests import CalibrationManifest, calibration_content
from a3cli.work.processes import Processes, joined
from a3cli.work.progress import Progress
from a3cli.work.record import Record
from a3cli.work.sealed import (
    name_differences,
    versions,
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
        settings = for_source(settings, model.source)
        processes.from_main(lambda: check_mixture(settings.parts))
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


def for_source(settings: CalibrateSettings, source: Checkpoint) -> CalibrateSettings:
    """Return settings without defaults that depend on the model."""
    text = settings.text.for_context(usual_entries(source.config).get(CONTEXT))
    return settings.model_copy(update={"text": text})


class Calibration:
    """One running calibration, in one of its processes.

    Its record has the tokens file and each finished layer's statistics: their hashes, and what the next step needs.
    Only the main process knows and updates it.
    """

    def __init__(
        self, settings: CalibrateSettings, work: Work, model: Model, machine: Machine, request: Json, stop: Stop
    ) -> None:
        self.settings, self.work, self.model, self.machine, self.stop = settings, work, model, machine, stop
        self.full_mlp = settings.mlp_stats == "full"
        self.record = Record(work.calibration_progress, request)
        self.reads = [TextRead() for _ in settings.parts]
        self.held_out = torch.empty(0)  # blocks of the text that are not calibrated on

    @property
    def finished(self) -> list[Json]:
        """Return the record's entries of the finished layers, in order."""
        return [known for name, known in self.record.steps.items() if name != self.work.tokens.name]

    @property
    def last(self) -> Json:
        """Return the record's last entry: batch size and hidden states to go on with."""
        return list(self.record.steps.values())[-1]

    def run(self, processes: Processes, progress: Progress, *, overwrite: bool) -> CalibrationManifest:
        """Run or resume the calibration; return the manifest."""
        fitting = self._fitting_batch(processes)
        kept = processes.from_main(lambda: self._kept(overwrite=overwrite))
        blocks = processes.from_main(lambda: self._cut(progress)) if kept is None else kept
        try:
            if kept is None:
                processes.from_main(lambda: self._begin(blocks, fitting))
            processes.from_main(lambda: record_source(self.settings, self.model.source, self.record.request, self.work))
            first, batch_size = processes.from_main(lambda: (len(self.finished), int(self.last["batch_size"])))
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
            if processes.main and kept is None and not self.finished:  # leave nothing
                clear(self.work)
            raise
        return processes.from_main(lambda: self._close(blocks))

    def _fitting_batch(self, processes: Processes) -> int:
        """Return the batch size that fits in every process; check it also if the user names one."""
        blocks, seq_len = self.settings.text.samples, self.settings.text.block_tokens
        assert blocks is not None
        with processes.together():
            held = self._held_hidden_states(len(processes.share(blocks)))
            fitting = choose_batch_size(
                self.model.shape, self.machine, seq_len, blocks, full_mlp=self.full_mlp, held=held
            )
        return self.settings.batch_size or min(processes.gather(fitting))

    def _held_hidden_states(self, share: int) -> int:
        """Return the bytes of the hidden states of `share` blocks. Raises A3Error if they do not fit beside a layer."""
        device, seq_len = self._held_on, self.settings.text.block_tokens
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

    def _kept(self, *, overwrite: bool) -> torch.Tensor | None:
        """Return the blocks of an unfinished calibration to resume; with `overwrite`, only of the same request."""
        if not overwrite:
            if not self.work.calibration_progress.exists():
                return None
            self.record.resume_checked("use --overwrite")
            return self._resume()
        begun = self.record.request
        try:
            return self._resume() if self.record.resume(comparable) else None
        except A3Error as error:
            log.warning("%s; starting again", error)
            self.record = Record(self.record.file, begun)
            return None

    def _resume(self) -> torch.Tensor:
        """Return the blocks `[N, T]` of an unfinished calibration, checked against its files."""
        text, here = self.record.steps[self.work.tokens.name], versions()
        begun = text["versions"]
        if differing := name_differences(*({name: each.get(name) for name in COMPUTING} for each in (begun, here))):
            raise A3Error(
                f"{self.record.file} was written with other versions ({differing}); use those, or "
                "--overwrite to start again"
            )
        for name, known in self.record.steps.items():
            check_hash(self.work.calibration / name, known["hash"], "use --overwrite")
        blocks = read_tensors(self.work.tokens, "use --overwrite")["tokens"]
        self._drop_damaged_hidden_states((*blocks.shape, self.model.shape.hidden_size))
        drop_leftovers(self.work.calibration)
        if self.finished:
            log.info("resuming at layer %d of %d", len(self.finished) + 1, self.model.shape.layers)
        self._check_space()
        return blocks

    def _drop_damaged_hidden_states(self, shape: tuple[int, int, int]) -> None:
        """Remove damaged hidden-state files; another pass through the finished layers recomputes them.

        A file without a recorded checksum may be complete, but a power failure would leave the same.
        """
        recorded = self.last["hidden_states"]
        for file in sorted(self.work.calibration.glob("hidden-[0-9]*.bin")):
            states = HiddenStates(file, shape, self.machine.dtype)
            if file.stat().st_size == states.bytes and recorded.get(file.name) == states.digest():
                continue
            if file.name in recorded:
                log.warning("%s has changed since it was written; it is computed again", file)
            file.unlink()

    def _check_space(self) -> None:
        layers = self.model.shape.layers - len(self.finished)
        needed = bytes_needed(self.model.shape, self.settings, self.machine, layers)
        there = bytes_on_disk(self.work.calibration.glob("hidden-*.bin"))
        check_space(self.work.folder, needed - there, "calibration")

    def _cut(self, progress: Progress) -> torch.Tensor:
        """Return the blocks `[N, T]` of a new calibration."""
        source, text = self.model.source, self.settings.text
        assert text.samples is not None
        tokenizer = load_tokenizer(source.folder, trust_remote_code=self.settings.trust_remote_code)
        parts = self.settings.parts
        if len(parts) > 1:
            check_reachable(parts, purpose="calibrate")
        pool = POOL * text.samples * text.block_tokens
        with counting(progress, "reading the calibration text", tokenizer, pool) as counted:
            sampled = [
                sample_blocks(counted, part, read, held_out=costs.HELD_OUT_TOKENS * (part.samples or 0) // text.samples)
                for part, read in zip(parts, self.reads, strict=True)
            ]
        blocks, self.held_out = (torch.cat(each) for each in zip(*sampled, strict=True))
        check_fit([*blocks, *self.held_out], usual_entries(source.config), source.name)
        self._check_space()
        return blocks

    def _begin(self, blocks: torch.Tensor, batch_size: int) -> None:
        """Clear the folder and record this calibration in it."""
        clear(self.work)
        self.work.calibration.mkdir(exist_ok=True)
        write_tensors(self.work.tokens, tokens_content(blocks, self.held_out))
        self.record.request |= with_files(self.record.request, self.reads)
        self.record.finish(
            self.work.tokens.name,
            hash=hash_file(self.work.tokens),
            text_read=describe_all(self.reads),
            versions=versions(),
            batch_size=batch_size,
            hidden_states={},
        )

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
        states.digests |= self.last["hidden_states"] if processes.main else {}
        return states

    def _finish(self, layer: int, sums: Tensors, states: States, processes: int, batch_size: int) -> None:
        file = self.work.statistics(layer)
        self.record.finish(
            file.name,
            hash=write_hashed(file, sums),
            processes=processes,
            batch_size=batch_size,
            hidden_states=dict(states.digests),
        )
        finished, layers = len(self.finished), self.model.shape.layers
        if finished < layers:
            self.stop.before(f"layer {finished + 1} of {layers}", "rerun the same command to resume")

    def _close(self, blocks: torch.Tensor) -> CalibrationManifest:
        content = calibration_content(self.record.request, self.record.steps, list(blocks.shape))
        written = CalibrationManifest.write(self.work.calibration_manifest, content)
        remove_leftovers(self.work)
        return written


def bytes_needed(shape: ModelShape, settings: CalibrateSettings, machine: Machine, layers: int) -> int:
    """Return the peak disk usage of the rest of a calibration: statistics and both hidden-state files."""
    text = settings.text
    assert text.samples is not None
    files = 2 if settings.hidden_states == "disk" else 0
    hidden = files * costs.hidden_state_bytes(shape, text.samples, text.block_tokens, machine.dtype.itemsize)
    full_mlp = settings.mlp_stats == "full"
    return hidden + layers * costs.statistics_bytes(shape, text.samples, text.block_tokens, full_mlp=full_mlp)
