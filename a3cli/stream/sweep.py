"""Calibration's sweep: run all blocks through one layer after another and add up each layer's statistics.

Several processes take a share of the blocks each. A sweep that died resumes at its layer.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from a3cli.errors import A3Error, first_line
from a3cli.solvers.moments import LayerMoments, Tensors
from a3cli.solvers.samples import AttentionSamples
from a3cli.stream.batches import Batching, Calls, embed_all, stream
from a3cli.stream.decoder import Decoder, run_layer
from a3cli.stream.hidden import States
from a3cli.stream.hooks import mlp_in_pieces, moments_of
from a3cli.work.machine import out_of_memory
from a3cli.work.processes import Processes
from a3cli.work.progress import Progress

log = logging.getLogger(__name__)


@dataclass
class Sweep:
    """A sweep over this process's share of `blocks` `[N, T]`.

    With `adapt`, `batch_size` is halved if a device runs out of memory. `finished(i, sums)` is called in the
    main process, in the order of the layers; the input of layer i is kept until it returns, so a sweep that died in
    layer i resumes there.
    """

    decoder: Decoder
    blocks: torch.Tensor
    states: States
    processes: Processes
    batch_size: int
    adapt: bool
    full_mlp: bool
    finished: Callable[[int, Tensors], None]
    progress: Progress

    def __post_init__(self) -> None:
        share = self.processes.share(len(self.blocks))
        self.own, self.first = self.blocks[share.start : share.stop], share.start

    @torch.inference_mode()
    def run(self, first_layer: int) -> None:
        """Compute the sums of all layers from `first_layer` on. If its input is missing, rerun the layers before it.

        Raises A3Error for non-finite activations, for damaged weights or files, and if memory is insufficient.
        """
        layers, width = self.decoder.shape.layers, max(1, len(self.decoder.machine.devices))
        if first_layer == layers:  # only the manifest is still missing
            return
        index, calls = self._start_fitting(first_layer)
        while index < layers:
            stage = range(index, min(index + width, layers))
            moments = None
            try:
                with self.processes.together():
                    moments = self._run_stage(stage, first_layer, calls)
            except torch.OutOfMemoryError as error:
                moments = None  # also if only another process ran out of memory
                self._halve(error)
            if moments is None:  # outside the handler, which holds the error
                collect_garbage()
                index, calls = self._start_fitting(first_layer)
            else:
                self._finish(stage, moments)
                index = stage.stop
                first_layer = max(first_layer, index)

    def _start_fitting(self, layer: int) -> tuple[int, Calls]:
        """Call `_start` with a batch size that fits in memory."""
        while True:
            try:
                return self._start(layer)
            except torch.OutOfMemoryError as error:
                self._halve(error)
            collect_garbage()

    def _start(self, layer: int) -> tuple[int, Calls]:
        """Return the last layer up to `layer` whose input exists, computed if needed, and arguments by batch size."""
        there = next((each for each in range(layer, -1, -1) if self.states.has(each)), -1)
        there = min(self.processes.gather(there))
        if there < layer and layer:
            layers = self.decoder.shape.layers
            log.info("the input of layer %d of %d is missing; rerunning the layers before it", layer + 1, layers)
        with self.processes.together():
            target = self.states.begin() if there < 0 else self.states.input_of(there)
            with as_out_of_memory():
                arguments = embed_all(self.decoder, self.own, self.batch_size, target if there < 0 else None)
        if there < 0:
            self._keep(0)
        return max(there, 0), arguments

    def _keep(self, layer: int) -> None:
        """Commit the input of `layer`, which all processes have written."""
        checks = [check for share in self.processes.gather(self.states.end(layer)) for check in share]
        self.processes.from_main(lambda: self.states.keep(layer, checks))

    def _run_stage(self, stage: range, first_layer: int, calls: Calls) -> dict[int, LayerMoments]:
        """Run this process's batches through consecutive layers; return the moments of each from `first_layer` on."""
        decoder, moments = self.decoder, dict[int, LayerMoments]()
        in_background, shape = decoder.machine.copies, decoder.shape
        source, target = self.states.input_of(stage.start), self.states.begin()
        with as_out_of_memory(), ExitStack() as stack:
            modules = stack.enter_context(decoder.stage(stage))
            for index, module in zip(stage, modules, strict=True):
                if not in_background:
                    stack.enter_context(mlp_in_pieces(module, decoder.family))
                if index >= first_layer:
                    moments[index] = self._new_moments(next(module.parameters()).device)
                    rotates = index not in decoder.shape.still_layers
                    stack.enter_context(moments_of(module, decoder.family, shape, moments[index], rotates=rotates))

            def step(start: int, batch: torch.Tensor) -> list[torch.Tensor]:
                hidden = batch
                for index, module in zip(stage, modules, strict=True):
                    if index in moments:
                        moments[index].first_block = self.first + start
                    hidden = run_layer(module, hidden, calls[len(batch)][index])
                self._report(stage, start + len(batch))
                return [hidden]

            stream(step, [source], [target], Batching(len(self.own), self.batch_size, in_background))
        return moments

    def _new_moments(self, device: torch.device) -> LayerMoments:
        samples, shape = AttentionSamples(len(self.blocks), self.blocks.shape[1], device), self.decoder.shape
        scores = {"scale": shape.softmax_scale, "cap": shape.score_cap}
        return LayerMoments(shape.head_dim, self.full_mlp, device, samples, **scores)

    def _report(self, stage: range, blocks: int) -> None:
        """Report progress from the main process, whose share is like the others'."""
        share = blocks / len(self.own)
        for layer in stage if blocks == len(self.own) else stage[:1]:
            total = self.blocks.numel()
            self.progress(
                layer=layer, layers=self.decoder.shape.layers, tokens=round(share * total), total_tokens=total
            )

    def _finish(self, stage: range, moments: dict[int, LayerMoments]) -> None:
        """Reduce the sums to the main process, and only then release the stage's input."""
        self._keep(stage.stop)
        for layer in list(moments):
            own = moments.pop(layer)
            sums = self.processes.add_up(own.finished(), own.device)
            self.processes.from_main(partial(self._hand_on, layer, sums))
        self.processes.from_main(lambda: self.states.retire(stage.start))

    def _hand_on(self, layer: int, sums: Tensors) -> None:
        self.finished(layer, finite({name: value.cpu() for name, value in sums.items()}, layer))

    def _halve(self, error: Exception) -> None:
        """Halve the batch size. Raises A3Error if it may not be smaller."""
        if not self.adapt or self.batch_size == 1:
            remedy = "use --batch-size auto" if self.batch_size > 1 else "use a shorter --seq-len"
            raise A3Error(
                f"out of memory at {self.batch_size} blocks per batch ({first_line(error)}); {remedy}"
            ) from error
        self.batch_size //= 2
        log.info("out of memory: continuing with %d blocks per batch", self.batch_size)


def collect_garbage() -> None:
    """Free memory after an out-of-memory error: it and its frames reference each other and hold tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def as_out_of_memory() -> Iterator[None]:
    """Convert any error of a device that runs out of memory to OutOfMemoryError."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


def finite(sums: Tensors, layer: int) -> Tensors:
    """Return the sums. Raises A3Error if one has a NaN or Inf."""
    for name, value in sorted(sums.items()):
        if not torch.isfinite(value).all():
            raise A3Error(
                f"layer {layer}: statistics {name} have NaN or Inf values; compute in a wider type (--dtype float32)"
            )
    return sums
