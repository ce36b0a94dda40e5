"""Measured sensitivities: KL of the whole model when one component of one layer is cut, in one branching sweep.

A stream is the hidden states of one model. The source's stream runs through each full layer. At each layer new streams
branch off, through that layer with one component cut to one size; all streams run through the full layers after it. At
the end each stream's logits are compared with the source's. So one sweep suffices for any number of probes (a layer's
weights are read once more for each of its cuts), and memory holds one layer and one batch. The files of the streams
take 2 · (1 + probes) times the hidden states of the probe's blocks. Resumable at the unfinished layer.
"""

import itertools
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from a3cli.errors import A3Error
from a3cli.methods import Analysis, Curves, Method
from a3cli.settings import COMPONENTS, Component
from a3cli.settings.shares import divide
from a3cli.solvers.moments import Tensors
from a3cli.stages.context import AGAIN, Run
from a3cli.stream.batches import Batching, Calls, embed_all, layer_step, stream
from a3cli.stream.decoder import Decoder
from a3cli.stream.hidden import HiddenStates, TwoFiles
from a3cli.stream.smaller import Cut, SmallerDecoder
from a3cli.work.files import Json, check_space, hash_file, read_tensors
from a3cli.work.manifests import CalibrationRequest
from a3cli.work.progress import reporting
from a3cli.work.record import Record, computed_once
from a3cli.work.sealed import versions

log = logging.getLogger(__name__)

PROGRESS = "progress.json"
SINGLE = 0.75  # of the allowed sizes: where a single one is probed


class Probe(NamedTuple):
    """One measurement: a layer with only `component` cut, to `size`."""

    layer: int
    component: Component
    size: int


# Of each layer and component: KL (nats per token) at each probed size, ascending.
Measured = list[dict[Component, dict[int, float]]]


def probe(run: Run, method: Method[Any], analysis: Analysis[Any]) -> Measured:
    """Return KL at the probed sizes of every layer and component, reused from the work folder if measured before."""
    settings, folder = run.settings, run.work.probes
    probes = plan_probes([prediction.losses for prediction in analysis.predictions], settings.probe_points)
    if not probes:
        return [{} for _ in analysis.predictions]

    def measure() -> Json:
        log.info("probing %d cuts on %d blocks", len(probes), settings.probe_blocks)
        sweep = _Sweep(run, method, analysis, probes)
        return {"layers": to_json(sweep.measure()), "tokens": sweep.blocks.numel()}

    found = computed_once(folder / f"{settings.method}-{settings.shape}.json", describe_request(run), measure)
    clear(folder)  # the sweep's files, also if an earlier process was killed right before that
    return from_json(found["layers"])


def clear(probes: Path) -> None:
    """Remove the files of an unfinished sweep."""
    for path in (probes / PROGRESS, *probes.glob("streams-*.bin")):
        path.unlink(missing_ok=True)


class _Sweep:
    """One branching sweep. Stream 0 is the source's; stream i + 1 belongs to probe i."""

    def __init__(self, run: Run, method: Method[Any], analysis: Analysis[Any], probes: list[Probe]) -> None:
        self.run, self.method, self.analysis, self.probes = run, method, analysis, probes
        self.model, self.machine, self.folder = run.model, run.machine, run.work.probes
        tokens = read_tensors(run.work.tokens, "run a3 calibrate --overwrite")["tokens"]
        self.blocks = tokens[probed_blocks(run.calibration.request, len(tokens), run.settings.probe_blocks)]
        self.batch_size = run.settings.batch_size
        self.layers = run.layers
        # Streams have one dtype, and a sweep stays on one kind of device.
        self.record = Record(self.folder / PROGRESS, {**describe_request(run), "machine": run.machine.describe()})

    def measure(self) -> Measured:
        """Run the rest of the sweep and compare its outputs. Raises A3Error if a file is damaged or the disk full."""
        first = self._begin()
        decoder = Decoder(self.model, self.machine)
        cuts = SmallerDecoder(self.model, self.machine, [self._cut(each) for each in self.probes])
        target = self._streams(0) if first == 0 else None
        calls = [embed_all(each, self.blocks, self.batch_size, target) for each in (decoder, cuts)]
        for layer in range(first, self.layers):
            self.run.stop.before(f"probing layer {layer + 1} of {self.layers}", AGAIN)
            self._report(layer, 0)
            self._pass(layer, decoder, cuts, calls)
            self.record.finish(f"layer {layer}", streams=hash_file(self._streams(layer + 1).path))
            self._report(layer, self.blocks.numel())
        return self._compare(decoder)

    def _report(self, layer: int, tokens: int) -> None:
        self.run.progress(layer=layer, layers=self.layers, tokens=tokens, total_tokens=self.blocks.numel())

    def _begin(self) -> int:
        """Return the layer to resume at; 0 with empty streams if there is no unfinished sweep with this request."""
        if self.record.resume():
            done, last = len(self.record.steps), list(self.record.steps.values())[-1]
            streams = self._streams(done).path
            if streams.is_file() and hash_file(streams) == last["streams"]:
                if done < self.layers:
                    log.info("resuming at layer %d of %d", done + 1, self.layers)
                return done
            log.warning("%s has changed since it was written; probing starts again", streams)
            self.record.forget()
        self.folder.mkdir(exist_ok=True)
        clear(self.folder)
        check_space(self.run.work.folder, 2 * self._streams(0).bytes, "probing")
        self._streams(0).create()
        return 0

    def _streams(self, layer: int) -> HiddenStates:
        """Return the file with the input of a layer: all streams, one after another."""
        blocks, length = self.blocks.shape
        shape = ((1 + len(self.probes)) * blocks, length, self.model.shape.hidden_size)
        return TwoFiles(self.folder, "streams", shape, self.machine.dtype).input_of(layer)

    def _stream(self, layer: int, stream: int) -> HiddenStates:
        """Return the place of one stream in the input of a layer."""
        return replace(self._streams(layer), first=stream * len(self.blocks))

    def _cut(self, each: Probe) -> Cut:
        layer, full = self.analysis.layers[each.layer], self.model.shape.sizes[each.layer]
        sizes = replace(full, **{each.component: each.size})
        slots = self.analysis.tables[each.layer][sizes.qk]

        def solution() -> Tensors:
            return self.method.project(self.run.inputs(each.layer), layer, slots, sizes).tensors

        return Cut(each.layer, sizes, slots.pairs, solution)

    @torch.inference_mode()
    def _pass(self, layer: int, decoder: Decoder, cuts: SmallerDecoder, calls: list[Calls]) -> None:
        """Run all streams through one layer, and the source's through each of its cuts."""
        self._streams(layer + 1).create()
        batching = Batching(len(self.blocks), self.batch_size, self.machine.copies)
        own = [index for index, each in enumerate(self.probes) if each.layer == layer]
        under_way = [0, *(index + 1 for index, each in enumerate(self.probes) if each.layer < layer)]
        with decoder.layer(layer) as whole:
            for each in under_way:
                step = layer_step(whole, calls[0], layer)
                stream(step, [self._stream(layer, each)], [self._stream(layer + 1, each)], batching)
        for index in own:
            with cuts.layer(index) as cut:
                step = layer_step(cut, calls[1], index)
                stream(step, [self._stream(layer, 0)], [self._stream(layer + 1, index + 1)], batching)

    @torch.inference_mode()
    def _compare(self, decoder: Decoder) -> Measured:
        """Return KL(source ‖ stream) per token of every stream."""
        ends, blocks = self._streams(self.layers), len(self.blocks)
        sums = [0.0] * len(self.probes)
        with decoder.head() as logits, reporting(self.run.progress, "comparing probes", blocks, "blocks") as finished:
            for block in range(blocks):
                reference = logits(ends.read(block, 1)).float().log_softmax(-1)
                for index in range(len(self.probes)):
                    found = logits(ends.read((index + 1) * blocks + block, 1)).float().log_softmax(-1)
                    sums[index] += (reference.exp() * (reference - found)).sum(dtype=torch.float64).item()
                finished()
        measured: Measured = [{} for _ in range(self.layers)]
        for each, total in zip(self.probes, sums, strict=True):
            if not math.isfinite(total):
                raise A3Error(
                    f"layer {each.layer}, {each.component} cut to {each.size}: the logits are not finite; "
                    "compute in a wider type (--dtype float32)"
                )
            measured[each.layer].setdefault(each.component, {})[each.size] = total / self.blocks.numel()
        return measured


def probed_blocks(request: CalibrationRequest, blocks: int, most: int) -> list[int]:
    """Return the first blocks; of a mixture the first of each text, in proportion and one at least if that is possible.

    A mixture has its blocks in the order of its texts.
    """
    counts = [part.text.samples or 0 for part in request.mixture or ()] or [blocks]
    wanted = divide(counts, min(most, blocks), least=int(most >= len(counts)))
    starts = [0, *itertools.accumulate(counts)]
    return [start + i for start, own in zip(starts, wanted, strict=False) for i in range(own)]


def describe_request(run: Run) -> Json:
    """Return everything that the measurements depend on; not the budget."""
    sizes = ("components", "head_multiple", "mlp_multiple", "min_head", "min_mlp")
    wanted = ("method", "shape", "context", "eigenvalue_floor", "ridge", "probe_blocks", "probe_points", "dtype")
    settings = run.settings.model_dump(mode="json")
    chosen = {key: settings[key] for key in (*sizes, *wanted)}
    return {**chosen, "calibration": run.calibration.sha256, "versions": versions()}


def plan_probes(curves: list[Curves], points: int) -> list[Probe]:
    """Return at most `points` sizes per curve: the smallest, the largest below the full one, and evenly spaced ones.

    A single one is at three quarters of the allowed sizes: measured over predicted hardly depends on the size
    (docs/experiments.md).
    """
    probes = []
    for layer, curve in enumerate(curves):
        for component in COMPONENTS:
            below = sorted(curve[component])[:-1]
            places = torch.linspace(0 if points > 1 else SINGLE, 1, min(points, len(below))).mul(len(below) - 1)
            probes += [Probe(layer, component, below[place]) for place in places.round().long().tolist()]
    return probes


def weigh(curves: list[Curves], measured: Measured) -> list[Curves]:
    """Scale predicted curves to measured KL: multiply each size by measured over predicted.

    The ratio is interpolated linearly between probed sizes and constant above the largest; there is no allowed size
    below the smallest.
    """
    return [
        {component: weigh_curve(curve[component], found.get(component, {})) for component in COMPONENTS}
        for curve, found in zip(curves, measured, strict=True)
    ]


def weigh_curve(predicted: dict[int, float], measured: dict[int, float]) -> dict[int, float]:
    """Scale one curve; leave it as predicted if nothing was measured."""
    if not measured:
        return predicted
    negligible = 1e-9 * max(predicted.values()) or 1.0  # a loss that is only rounding has no meaningful ratio
    places = sorted(measured)
    ratios = [max(measured[place], 0.0) / max(predicted[place], negligible) for place in places]
    return {size: loss * float(numpy.interp(size, places, ratios)) for size, loss in predicted.items()}


def to_json(measured: Measured) -> list[Json]:
    return [{c: {"size": list(found), "kl": list(found.values())} for c, found in layer.items()} for layer in measured]


def from_json(layers: list[Json]) -> Measured:
    return [
        {c: dict(zip(layer[c]["size"], layer[c]["kl"], strict=True)) for c in COMPONENTS if c in layer}
        for layer in layers
    ]
