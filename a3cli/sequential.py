"""Sequential correction: one-shot projections → output projections that know what the cuts before them did.

A second sweep runs the source and the smaller model side by side over the calibration blocks. In each layer the output
projection, then the down projection, are fitted by least squares on the smaller model's own activations to what the
source's layer puts out, plus half of the drift that has built up in the residual stream. The ridge pulls towards the
one-shot weights, so that few tokens do not over-fit. Weights are read once; memory holds one layer of both models.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from a3cli.errors import A3Error
from a3cli.families import LayerSizes, Role, per_layer_config
from a3cli.machine import Machine
from a3cli.model import Model
from a3cli.moments import Tensors
from a3cli.projections import apply_projection
from a3cli.solvers.linalg import solve_ridge
from a3cli.sweep import Arguments, Decoder, HiddenStates, Progress, StopForward, embed_all, run_layer

DRIFT = 0.5  # share of the stream's drift that each refit is asked to take back; 0.5 was better than 0 and 1
RIDGE = 1e-2  # towards the one-shot weights, relative to the mean diagonal of the activations' Gram matrix


class SmallerDecoder(Decoder):
    """The model that a solution makes, its layers projected when they are read.

    It is built in the per-layer shape whatever will be exported: one way to run it, and no scale folded into queries.
    """

    def __init__(
        self,
        model: Model,
        machine: Machine,
        sizes: Sequence[LayerSizes],
        slots: Sequence[Sequence[float]],
        solution: Callable[[int], Tensors],
    ) -> None:
        self._solution = solution
        config = copy.deepcopy(model.config)
        config.per_layer_config = per_layer_config(sizes, slots)
        super().__init__(model, machine, config=config)

    def build(self, config: object, dtype: torch.dtype) -> nn.Module:
        from a3cli.modeling import modeling_a3_llama

        kind = getattr(modeling_a3_llama, self.family.per_layer_class)
        network: nn.Module = kind._from_config(config, dtype=dtype, attn_implementation="sdpa")
        return network

    def read(self, tensor: str, shape: torch.Size) -> torch.Tensor:
        found = self.family.find_role(tensor)
        if found is None:
            return super().read(tensor, shape)
        layer, role, kind = found
        full = self.shape.linear_shapes().get(role)
        original = shape if full is None else torch.Size(full if kind == "weight" else full[:1])
        value = super().read(tensor, original)
        return apply_projection(value, role, self._solution(layer), self.shape, fold_scale=False)


@dataclass
class LeastSquares:
    """Running sums of `x` `[n, m]` and `t` `[n, d]` for the weight that fits `t = x Wᵀ` best."""

    gram: torch.Tensor | None = None
    cross: torch.Tensor | None = None

    def add(self, x: torch.Tensor, target: torch.Tensor) -> None:
        x, target = (part.reshape(-1, part.shape[-1]).float() for part in (x, target))
        if self.gram is None or self.cross is None:
            self.gram, self.cross = x.mT @ x, x.mT @ target
        else:
            self.gram.addmm_(x.mT, x)
            self.cross.addmm_(x.mT, target)

    def solve(self, weight: torch.Tensor) -> torch.Tensor:
        """`argmin ‖x Wᵀ − t‖² + ε‖W − weight‖²`, `[d, m]`. Raises ValueError if the Gram matrix is not finite."""
        assert self.gram is not None
        assert self.cross is not None
        gram, start = self.gram.double(), weight.double().mT
        return (start + solve_ridge(gram, self.cross.double() - gram @ start, ridge=RIDGE)).mT


def refit_sequentially(
    source: Decoder,
    smaller: SmallerDecoder,
    blocks: torch.Tensor,
    *,
    folder: Path,
    batch_size: int,
    progress: Progress,
) -> Iterator[tuple[int, Tensors]]:
    """Each layer's refit `output_weight` `[d, H·s]` and `down_weight` `[d, m]`, float32, in order.

    `folder` takes the hidden-state files. Raises A3Error where a fit fails or activations are not finite.
    """
    streams = Streams(folder, source, blocks)
    calls = streams.begin(source, smaller, batch_size)
    for index in range(source.shape.layers):
        streams.at(index)
        with source.layer(index) as full, smaller.layer(index) as small:
            step = _Layer(source, full, small, streams, calls, index, batch_size)
            refit = step.refit()
        progress(layer=index, layers=source.shape.layers, tokens=blocks.numel(), total_tokens=blocks.numel())
        yield index, refit


class Streams:
    """Hidden states of both models and of the source's middle, after attention, for all blocks."""

    def __init__(self, folder: Path, decoder: Decoder, blocks: torch.Tensor) -> None:
        self._folder, self._decoder, self.blocks = folder, decoder, blocks
        self.middle = self._file("middle")
        self.middle.create()
        self.at(0)

    def _file(self, name: str) -> HiddenStates:
        shape = (*self.blocks.shape, self._decoder.shape.hidden_size)
        return HiddenStates(self._folder / f"{name}.bin", shape, self._decoder.machine.dtype)

    def at(self, layer: int) -> None:
        """Inputs and outputs of both models in one layer: two files each, in turn."""
        now, then = layer % 2, (layer + 1) % 2
        self.full_in, self.full_out = self._file(f"source-{now}"), self._file(f"source-{then}")
        self.small_in, self.small_out = self._file(f"smaller-{now}"), self._file(f"smaller-{then}")

    @torch.inference_mode()
    def begin(
        self, source: Decoder, smaller: Decoder, batch_size: int
    ) -> tuple[dict[int, list[Arguments]], dict[int, list[Arguments]]]:
        """Write the embeddings; returns what the layers of both models are called with, by batch size."""
        starts = range(0, len(self.blocks), batch_size)
        for stream in (self.full_out, self.small_out):
            stream.create()
        return (
            embed_all(source, self.blocks, starts, batch_size, self.full_in, 0),
            embed_all(smaller, self.blocks, starts, batch_size, self.small_in, 0),
        )


class _Layer:
    """One layer of both models, filled."""

    def __init__(
        self,
        decoder: Decoder,
        full: nn.Module,
        small: nn.Module,
        streams: Streams,
        calls: tuple[dict[int, list[Arguments]], dict[int, list[Arguments]]],
        index: int,
        batch_size: int,
    ) -> None:
        self.decoder, self.full, self.small, self.streams, self.index = decoder, full, small, streams, index
        self.calls, self.batch_size = calls, batch_size

    @torch.inference_mode()
    def refit(self) -> Tensors:
        output = self._fit("o", self._fit_attention)
        down = self._fit("down", self._fit_mlp)
        for start, count in self._batches():
            self.streams.small_out.write(start, self._run_small(start, count))
        return {"output_weight": output, "down_weight": down}

    def _fit(self, role: Role, collect: Callable[[LeastSquares], None]) -> torch.Tensor:
        """Collect, solve, and put the new weight in the smaller layer."""
        sums = LeastSquares()
        collect(sums)
        linear = self._linear(role)
        try:
            weight = sums.solve(linear.weight)
        except ValueError as error:
            raise A3Error(
                f"layer {self.index}, {role} projection: the sequential refit failed ({error}); "
                "calibrate on more tokens, or solve without --sequential"
            ) from error
        if not torch.isfinite(weight).all():
            raise A3Error(f"layer {self.index}: activations are not finite; compute in a wider type (--dtype float32)")
        linear.weight.copy_(weight)
        return weight.float().cpu().contiguous()

    def _fit_attention(self, sums: LeastSquares) -> None:
        linear = self._linear("o")
        for start, count in self._batches():
            full_in, small_in = self._read(self.streams.full_in, start, count), self._small_in(start, count)
            with inputs_of(self._module(self.full, "mlp_norm")) as seen:
                out = run_layer(self.full, full_in, self.calls[0][count][self.index], self.decoder)
            middle = seen.pop()
            self.streams.middle.write(start, middle)
            self.streams.full_out.write(start, out)
            with inputs_of(linear, stop=True) as seen:
                self._run_small(start, count)
            sums.add(seen.pop(), without_bias(linear, middle - full_in + DRIFT * (full_in - small_in)))

    def _fit_mlp(self, sums: LeastSquares) -> None:
        linear = self._linear("down")
        for start, count in self._batches():
            middle = self._read(self.streams.middle, start, count)
            out = self._read(self.streams.full_out, start, count)
            with inputs_of(self._module(self.small, "mlp_norm")) as middles, inputs_of(linear, stop=True) as seen:
                self._run_small(start, count)
            sums.add(seen.pop(), without_bias(linear, out - middle + DRIFT * (middle - middles.pop())))

    def _run_small(self, start: int, count: int) -> torch.Tensor:
        return run_layer(self.small, self._small_in(start, count), self.calls[1][count][self.index], self.decoder)

    def _small_in(self, start: int, count: int) -> torch.Tensor:
        return self._read(self.streams.small_in, start, count)

    def _read(self, stream: HiddenStates, start: int, count: int) -> torch.Tensor:
        return stream.read(start, count).to(self.decoder.machine.device)

    def _batches(self) -> Iterator[tuple[int, int]]:
        blocks = len(self.streams.blocks)
        for start in range(0, blocks, self.batch_size):
            yield start, min(self.batch_size, blocks - start)

    def _module(self, layer: nn.Module, role: Role) -> nn.Module:
        return layer.get_submodule(self.decoder.family.modules[role])

    def _linear(self, role: Role) -> nn.Linear:
        linear = self._module(self.small, role)
        assert isinstance(linear, nn.Linear)
        return linear


def without_bias(linear: nn.Linear, target: torch.Tensor) -> torch.Tensor:
    """What is left for the weight to put out."""
    bias: torch.Tensor | None = linear.bias
    return target if bias is None else target - bias


@contextmanager
def inputs_of(module: nn.Module, *, stop: bool = False) -> Iterator[list[torch.Tensor]]:
    """Collect what a module is given; with `stop`, the forward, and with it the block, ends there."""
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, args: tuple[torch.Tensor]) -> None:
        seen.append(args[0])
        if stop:
            raise StopForward

    handle = module.register_forward_pre_hook(keep)
    try:
        with suppress(StopForward):
            yield seen
    finally:
        handle.remove()
