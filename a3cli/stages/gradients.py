"""What an error of each layer's stream costs: the energy of the gradient there, in a sweep back through the layers.

At each place the loss is the log-likelihood of a token drawn from the model's own prediction. The mean of `g gᵀ` over
such losses, with g their gradient in the stream, is the stream's Fisher information: to second order an error e of one
token's stream adds `½ (gᵀ e)²` to KL(source ‖ compressed), and `½ E‖g‖² / d · ‖e‖²` if its direction has nothing to do
with the gradient's. So one number for each layer's attention, and one for its MLP, convert squared errors to KL, and
`E[g gᵀ]` after the MLP says in which directions its errors count.

The source runs forward, and every layer's input stays in a file; then the gradient goes back through one layer after
another. Memory holds one layer and one block. Resumable at the unfinished layer, in both directions. No weight changes.
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from a3cli.errors import A3Error
from a3cli.methods import Curves, LayerGradients, LayerInputs
from a3cli.models import costs
from a3cli.settings import Component
from a3cli.solvers.moments import pack_upper
from a3cli.stages.context import AGAIN, Run
from a3cli.stages.probe import probed_blocks
from a3cli.stream.backward import SCALE, back_through, gradient_of_likelihood
from a3cli.stream.batches import Batching, Calls, embed_all, layer_step, stream
from a3cli.stream.decoder import Decoder
from a3cli.stream.hidden import HiddenStates
from a3cli.work.files import Json, check_space, hash_file, read_tensors, write_tensors
from a3cli.work.folder import layer_file
from a3cli.work.progress import reporting
from a3cli.work.record import Record, computed_once
from a3cli.work.sealed import versions

log = logging.getLogger(__name__)

PROGRESS = "progress.json"
HEAD_TOKENS = 64  # whose logits are in memory at once


Factors = dict[Component, float]


def loss_factors(inputs: LayerInputs, gradients: LayerGradients) -> Factors:
    """Return what converts a layer's losses, which are relative to the stream's length, to KL in nats a token."""
    attention = gradients.attention / inputs.mean("attention_inverse").item()
    return {"qk": attention, "ov": attention, "mlp": gradients.mlp / inputs.mean("mlp_inverse").item()}


def convert(curves: Curves, factors: Factors) -> Curves:
    return {c: {size: loss * factors[c] for size, loss in losses.items()} for c, losses in curves.items()}


def with_gradients(run: Run) -> Run:
    """Return the run with each layer's gradients, from the work folder if they were computed before."""
    folder, request = run.work.gradients, describe_request(run)
    energies = folder / "energies.json"
    try:
        found = computed_once(energies, request, lambda: _Sweep(run).measure())
        if changed := first_changed(folder, found["layers"]):
            log.warning("%s has changed since it was written; the gradients are computed again", changed)
            energies.unlink()
            found = computed_once(energies, request, lambda: _Sweep(run).measure())
    finally:
        if not (folder / PROGRESS).is_file():  # nothing to resume from
            clear(folder)
    clear(folder)  # the sweep's files, also if an earlier process was killed right before that
    return replace(run, gradients=[LayerGradients(folder, **each) for each in found["layers"]])


def first_changed(folder: Path, files: Iterable[Json]) -> Path | None:
    """Return the first of these files that is not there as its `hash` says."""
    for each in files:
        path = folder / str(each["file"])
        if not path.is_file() or hash_file(path) != each["hash"]:
            return path
    return None


def describe_request(run: Run) -> Json:
    """Return everything that the gradients depend on, and what is found of them."""
    return {
        "found": ["energies", "second moments"],
        "calibration": run.calibration.sha256,
        "blocks": costs.gradient_blocks(*run.calibration.blocks),
        **run.machine.describe(),
        "versions": versions(),
    }


def clear(gradients: Path) -> None:
    """Remove the files of an unfinished sweep."""
    for path in (gradients / PROGRESS, *gradients.glob("*.bin")):
        path.unlink(missing_ok=True)


class _Sweep:
    """The sweep: forward through all layers, through the head, and back."""

    def __init__(self, run: Run) -> None:
        self.run, self.folder, self.family = run, run.work.gradients, run.model.family
        tokens = read_tensors(run.work.tokens, "run a3 calibrate --overwrite")["tokens"]
        wanted = costs.gradient_blocks(*tokens.shape)
        self.blocks = tokens[probed_blocks(run.calibration.request, len(tokens), wanted)]
        self.record = Record(self.folder / PROGRESS, describe_request(run))

    @torch.inference_mode(mode=False)
    def measure(self) -> Json:
        """Run what is left of the sweep. Raises A3Error if a gradient is not finite or the disk full."""
        self._begin()
        decoder, layers = Decoder(self.run.model, self.run.machine), self.run.layers
        decoder.model.requires_grad_(requires_grad=False)
        self._states(0).create()
        with torch.no_grad():
            calls = embed_all(decoder, self.blocks, 1, self._states(0))
        steps: list[tuple[str, HiddenStates, Callable[[], Json | None]]] = [
            *((f"forward {i}", self._states(i + 1), partial(self._forward, decoder, calls, i)) for i in range(layers)),
            ("head", self._gradients(layers), partial(self._from_logits, decoder)),
            *(
                (f"backward {i}", self._gradients(i), partial(self._backward, decoder, calls, i))
                for i in reversed(range(layers))
            ),
        ]
        with reporting(self.run.progress, "computing gradients", len(steps), "passes") as finished:
            for name, target, compute in steps:
                if name not in self.record.steps:
                    self.run.stop.before(f"the gradients' pass {name}", AGAIN)
                    target.create()
                    found = compute()
                    self.record.finish(name, file=target.path.name, hash=hash_file(target.path), layer=found)
                finished()
        return {"layers": [self.record.steps[f"backward {layer}"]["layer"] for layer in range(layers)]}

    def _begin(self) -> None:
        """Take over the passes of an unfinished sweep whose files are as they were; otherwise start again."""
        if self._resume():
            return
        self.folder.mkdir(exist_ok=True)
        clear(self.folder)
        shape, item = self.run.model.shape, self.run.machine.dtype.itemsize
        check_space(
            self.folder,
            costs.gradient_bytes(shape, len(self.blocks), self.blocks.shape[1], item),
            "the gradients",
        )

    def _resume(self) -> bool:
        """Return whether there are finished passes to go on from."""
        if self.record.resume():
            steps = self.record.steps.values()
            changed = first_changed(self.folder, [*steps, *(step["layer"] for step in steps if step["layer"])])
            if changed is None:
                log.info("resuming after %d passes of the gradients", len(steps))
                return True
            log.warning("%s has changed since it was written; the gradients start again", changed)
            self.record.forget()
        return False

    def _states(self, layer: int) -> HiddenStates:
        """Return the file with the input of a layer; after the last one, the decoder's output."""
        return self._file(f"states-{layer:03d}.bin")

    def _gradients(self, layer: int) -> HiddenStates:
        """Return the file with the gradients by what `_states` has."""
        return self._file(f"gradients-{layer:03d}.bin")

    def _file(self, name: str) -> HiddenStates:
        return HiddenStates(
            self.folder / name, (*self.blocks.shape, self.run.model.shape.hidden_size), self.run.machine.dtype
        )

    def _each_block(
        self, compute: Callable[..., torch.Tensor], inputs: list[HiddenStates], target: HiddenStates
    ) -> None:
        """Call `compute` with each block's index and its part of each input; write what it returns."""
        device = self.run.machine.device
        stream(
            lambda start, *batches: [compute(start, *(batch.to(device) for batch in batches))],
            inputs,
            [target],
            Batching(len(self.blocks), 1, self.run.machine.copies),
        )

    @torch.no_grad()
    def _forward(self, decoder: Decoder, calls: Calls, layer: int) -> None:
        with decoder.layer(layer) as module:
            step = layer_step(module, calls, layer)
            self._each_block(
                lambda start, states: step(start, states)[0], [self._states(layer)], self._states(layer + 1)
            )

    def _from_logits(self, decoder: Decoder) -> None:
        """Write the gradients by the decoder's output."""
        layers = self.run.layers
        chances = torch.rand(self.blocks.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with decoder.head() as logits:

            def gradients(start: int, states: torch.Tensor) -> torch.Tensor:
                pieces = zip(states.split(HEAD_TOKENS, 1), chances[start, None].split(HEAD_TOKENS, 1), strict=True)
                return torch.cat([gradient_of_likelihood(logits, *piece) for piece in pieces], 1)

            self._each_block(gradients, [self._states(layers)], self._gradients(layers))

    def _backward(self, decoder: Decoder, calls: Calls, layer: int) -> Json:
        """Write the gradients by a layer's input, and `E[g gᵀ]` after its MLP; return what `LayerGradients` has."""
        width, tokens = self.run.model.shape.hidden_size, self.blocks.numel()
        moments = torch.zeros(width, width, dtype=torch.float64, device=self.run.machine.device)
        of_attention = torch.zeros((), dtype=torch.float64)
        with decoder.layer(layer) as module:
            reader = module.get_submodule(self.family.stream_reader)

            def gradients(_start: int, states: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
                before, between = back_through(module, reader, states, after, calls[1][layer])
                rows = after.flatten(0, -2).float() / SCALE
                moments.add_(rows.mT @ rows)
                of_attention.add_((between.double() / SCALE).square().sum().cpu())
                return before

            inputs = [self._states(layer), self._gradients(layer + 1)]
            self._each_block(gradients, inputs, self._gradients(layer))
        moments = moments.cpu() / tokens
        energies = {
            "attention": of_attention.item() / (2 * tokens * width),
            "mlp": moments.diagonal().mean().item() / 2,
        }
        if not (moments.isfinite().all() and math.isfinite(energies["attention"])):
            raise A3Error(
                f"layer {layer}: the gradient is not finite; compute in a wider type (--dtype float32), "
                "or use --sensitivity residual"
            )
        path = self.folder / layer_file(layer)
        write_tensors(path, {"moments": pack_upper(moments).float(), "tokens": torch.tensor(tokens)})
        return {**energies, "file": path.name, "hash": hash_file(path)}
