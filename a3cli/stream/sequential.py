"""Sequential correction: refit each layer's projections after the cuts before it.

A second sweep runs the source and the smaller model side by side over the calibration blocks. In each layer the output
projection, then the down projection, are fitted by least squares on the smaller model's own activations to the output
of the source's layer, plus half of the accumulated drift of the residual stream. If a norm follows the projection, each
token is weighted as in calibration, and the drift is taken back through the norm. The ridge pulls towards the
one-shot weights, which prevents overfitting. Then the MLP's gate (if any) and up projections are
fitted to the same target by Gauss-Newton steps (`solvers/gauss_newton.py`), each followed by another fit of the down
projection. Weights are read once; memory holds one layer of both models.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from a3cli.errors import A3Error
from a3cli.models.families import Role
from a3cli.models.families.base import LinearShapes
from a3cli.models.fused import RoleLinear, role_linear
from a3cli.solvers.gauss_newton import Batch, gauss_newton_step
from a3cli.solvers.least_squares import LeastSquares
from a3cli.solvers.moments import Tensors
from a3cli.stream.batches import Batching, Calls, embed_all, read_batches, stream
from a3cli.stream.decoder import Decoder, run_layer
from a3cli.stream.hidden import HiddenStates, TwoFiles
from a3cli.stream.hooks import inputs_of, outputs_given
from a3cli.stream.post_norm import post_norm_of
from a3cli.stream.smaller import SmallerDecoder
from a3cli.work.processes import in_thread
from a3cli.work.progress import Progress

DRIFT = 0.5  # share of the drift of the residual stream that each refit corrects; 0.5 was better than 0 and 1
RIDGE = 1e-2  # pulls towards the one-shot weights; relative to the mean diagonal of the activations' Gram matrix
DAMPING = 1e-3  # of a Gauss-Newton step, relative to the problem's own curvature
ITERATIONS = 8  # conjugate-gradient iterations per step; a second step gains more than further iterations of the first
HALVINGS = 3  # how often a step is halved that does not lower the error, before it is discarded
REFIT_NAMES: dict[Role, str] = {
    "o": "output_weight",
    "gate": "gate_weight",
    "up": "up_weight",
    "down": "down_weight",
}


def refit_sequentially(
    source: Decoder,
    smaller: SmallerDecoder,
    blocks: torch.Tensor,
    *,
    folder: Path,
    batch_size: int,
    rounds: int,
    first: int,
    progress: Progress,
) -> Iterator[tuple[int, Tensors, list[Path]]]:
    """Yield from layer `first` on: its refit `output_weight` `[d, H·s]`, `down_weight` `[d, m]` and, with `rounds` of
    Gauss-Newton, `gate_weight` and `up_weight` `[m, d]`, float32; and the files that the next layer starts with.

    `folder` has the hidden-state files. Raises A3Error if a fit fails or activations are not finite.
    """
    files = Files(folder, source, blocks)
    calls = files.begin(source, smaller, batch_size, first)
    batching = Batching(len(blocks), batch_size, source.machine.copies)
    layers, tokens = source.shape.layers, blocks.numel()
    for index in range(first, layers):
        progress(layer=index, layers=layers, tokens=0, total_tokens=tokens)
        with source.layer(index) as full, smaller.layer(index) as small:
            shapes = source.shape.linear_shapes(smaller.cuts[index].sizes)
            refit = _Layer(source, full, small, shapes, files, calls, index, batching).refit(rounds)
        progress(layer=index, layers=layers, tokens=tokens, total_tokens=tokens)
        yield index, refit, [files.of_source.input_of(index + 1).path, files.of_smaller.input_of(index + 1).path]


class Files:
    """For all blocks: hidden states of both models, the source's after attention, and the data to fit gate and up on.

    A layer's inputs stay until it is finished, so that a killed sweep can resume there.
    """

    def __init__(self, folder: Path, decoder: Decoder, blocks: torch.Tensor) -> None:
        self.blocks = blocks
        shape, dtype = (*blocks.shape, decoder.shape.hidden_size), decoder.machine.dtype
        self.of_source, self.of_smaller = (TwoFiles(folder, name, shape, dtype) for name in ("source", "smaller"))
        self.middle, self.mlp_in, self.mlp_target = (
            HiddenStates(folder / f"{name}.bin", shape, dtype) for name in ("middle", "mlp-in", "mlp-target")
        )

    @torch.inference_mode()
    def begin(self, source: Decoder, smaller: Decoder, batch_size: int, first: int) -> tuple[Calls, Calls]:
        """Return the call arguments of both models' layers; before layer 0, write the embeddings."""
        for layer in range(2):
            self.of_source.input_of(layer).create()
            self.of_smaller.input_of(layer).create()
        inputs = (self.of_source.input_of(0), self.of_smaller.input_of(0)) if first == 0 else (None, None)
        return (
            embed_all(source, self.blocks, batch_size, inputs[0]),
            embed_all(smaller, self.blocks, batch_size, inputs[1]),
        )


class _Layer:
    """One layer of both models, with weights."""

    def __init__(
        self,
        decoder: Decoder,
        full: nn.Module,
        small: nn.Module,
        shapes: LinearShapes,
        files: Files,
        calls: tuple[Calls, Calls],
        index: int,
        batching: Batching,
    ) -> None:
        self.decoder, self.full, self.small, self.files, self.index = decoder, full, small, files, index
        self.shapes, self.calls, self.batching = shapes, calls, batching
        self.full_in, self.small_in = files.of_source.input_of(index), files.of_smaller.input_of(index)
        self.full_out, self.small_out = files.of_source.input_of(index + 1), files.of_smaller.input_of(index + 1)

    @torch.no_grad()  # not inference mode: Gauss-Newton takes derivatives
    def refit(self, rounds: int) -> Tensors:
        self.files.middle.create()
        refit: list[Role] = ["down", *(self.decoder.shape.mlp_inputs if rounds else ())]
        if self.decoder.family.carried_attention:
            self._each(self._run_full, [self.full_in], [self.files.middle, self.full_out])
        else:
            self._fit("o", self._fit_attention)
            refit.insert(0, "o")
        kept = [self.files.mlp_in, self.files.mlp_target] if rounds else []  # without rounds they are not read again
        for file in kept:
            file.create()
        error = self._fit("down", partial(self._fit_mlp, kept))
        for _ in range(rounds):
            error = self._improve_inputs(error)
        self._each(lambda small_in: [self._run_small(small_in)], [self.small_in], [self.small_out])
        weights = {REFIT_NAMES[role]: self._linear(role).weight.float().cpu() for role in refit}
        return {name: weight.clone(memory_format=torch.contiguous_format) for name, weight in weights.items()}

    def _each(
        self,
        compute: Callable[..., Sequence[torch.Tensor]],
        inputs: Sequence[HiddenStates],
        outputs: Sequence[HiddenStates] = (),
    ) -> None:
        """Call `compute` with a batch of each input, on the device, for one batch after another."""
        device = self.decoder.machine.device
        stream(
            lambda _start, *batches: compute(*(batch.to(device) for batch in batches)), inputs, outputs, self.batching
        )

    def _improve_inputs(self, error: float) -> float:
        """Take one Gauss-Newton step of gate and up, and refit down; undo both if the error does not fall."""
        linears = [self._linear(role) for role in (*self.decoder.shape.mlp_inputs, "down")]
        before = [linear.weight.clone() for linear in linears]
        step = self._gauss_newton_step()
        for halving in range(HALVINGS):
            for linear, old, change in zip(linears, before, step, strict=False):  # down has no step
                linear.weight.copy_(old + 0.5**halving * change)
            linears[-1].weight.copy_(before[-1])
            reached = self._fit("down", self._fit_down_again)
            if reached < error:
                return reached
        for linear, old in zip(linears, before, strict=True):
            linear.weight.copy_(old)
        return error

    def _gauss_newton_step(self) -> torch.Tensor:
        """Return the steps of the weights `[n, m, d]` of the linear layers that read the MLP's input."""
        linears = [self._linear(role) for role in self.decoder.shape.mlp_inputs]
        weights = torch.stack([linear.weight for linear in linears]).float()
        biases = torch.stack(
            [linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears]
        ).float()

        def hidden(before: torch.Tensor) -> torch.Tensor:
            outputs = before.to(linears[0].weight.dtype).unbind(1)
            with outputs_given(linears, outputs), inputs_of(self._linear("down").module, stop=True) as seen:
                self._mlp(before)  # its input is not used
            return seen.pop().float()

        return gauss_newton_step(
            hidden,
            self._down_in_stream(),
            weights,
            biases,
            self._mlp_batches,
            damping=DAMPING,
            iterations=ITERATIONS,
        )

    def _down_in_stream(self) -> torch.Tensor:
        """Return the smaller down projection `[d, m]`, times the weight of the norm that follows, if there is one."""
        norm, weight = post_norm_of(self.full, self.decoder.family, "down"), self._linear("down").weight.float()
        return weight if norm is None else weight * norm.gain[:, None]

    def _mlp_batches(self) -> Iterator[Batch]:
        """Yield inputs of the smaller MLP and targets of its down projection's weight, `[tokens, d]`, and weights."""
        device, norm = self.decoder.machine.device, post_norm_of(self.full, self.decoder.family, "down")
        for _, batches in read_batches([self.files.mlp_in, self.files.mlp_target], self.batching):
            x, target = (batch.to(device) for batch in batches)
            wanted, weights = without_bias(self._linear("down"), target).flatten(0, 1).float(), self._weights(target)
            if norm is not None and weights is not None:
                wanted, weights = wanted * norm.gain, weights.reshape(-1, 1)
            yield x.flatten(0, 1).float(), wanted, weights

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the smaller MLP."""
        of, between = self.decoder.family, self.decoder.family.activation
        for module in [of.module("up"), between, of.module("down")] if between else [of.mlp]:
            x = self.small.get_submodule(module)(x)
        return x

    def _fit(self, role: Role, collect: Callable[[LeastSquares], None]) -> float:
        """Collect, solve, and put the new weight in the smaller layer; return the remaining squared error."""
        norm = post_norm_of(self.full, self.decoder.family, role)
        sums = LeastSquares(gain=None if norm is None else norm.gain)
        collect(sums)
        linear = self._linear(role)
        try:
            weight = in_thread(partial(sums.solve, linear.weight, ridge=RIDGE))
        except ValueError as error:
            raise A3Error(
                f"layer {self.index}, {role} projection: the sequential refit failed ({error}); "
                "calibrate on more tokens, or solve without --sequential"
            ) from error
        if not torch.isfinite(weight).all():
            raise A3Error(f"layer {self.index}: activations are not finite; compute in a wider type (--dtype float32)")
        linear.weight.copy_(weight)
        return sums.error(linear.weight)

    def _fit_attention(self, sums: LeastSquares) -> None:
        linear = self._linear("o")

        def fit(full_in: torch.Tensor, small_in: torch.Tensor) -> list[torch.Tensor]:
            with inputs_of(self._behind("o")) as behind:
                middle, out = self._run_full(full_in)
            with inputs_of(linear.module, stop=True) as seen:
                self._run_small(small_in)
            target, weights = self._target("o", behind.pop, middle - full_in, DRIFT * (full_in - small_in))
            sums.add(seen.pop(), without_bias(linear, target), weights)
            return [middle, out]

        self._each(fit, [self.full_in, self.small_in], [self.files.middle, self.full_out])

    def _fit_mlp(self, kept: Sequence[HiddenStates], sums: LeastSquares) -> None:
        """Fit the down projection; write the MLP's inputs and targets to the `kept` files, if there are any."""
        linear = self._linear("down")

        def fit(middle: torch.Tensor, out: torch.Tensor, small_in: torch.Tensor) -> list[torch.Tensor]:
            with (
                inputs_of(self._reader(self.small)) as middles,
                inputs_of(self._linear("up").module) as inputs,
                inputs_of(linear.module, stop=True) as seen,
            ):
                self._run_small(small_in)
            drift = DRIFT * (middle - middles.pop().view_as(middle))
            target, weights = self._target("down", lambda: self._mlp_output(middle), out - middle, drift)
            sums.add(seen.pop(), without_bias(linear, target), weights)
            return [inputs.pop().view_as(middle), target] if kept else []

        self._each(fit, [self.files.middle, self.full_out, self.small_in], kept)

    def _fit_down_again(self, sums: LeastSquares) -> None:
        """Refit down on the data written by `_fit_mlp`, with the current gate and up projections."""
        linear = self._linear("down")

        def fit(mlp_in: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
            with inputs_of(linear.module, stop=True) as seen:
                self._mlp(mlp_in)
            sums.add(seen.pop(), without_bias(linear, target), self._weights(target))
            return []

        self._each(fit, [self.files.mlp_in, self.files.mlp_target])

    def _target(
        self, role: Role, of_source: Callable[[], torch.Tensor], change: torch.Tensor, drift: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what a projection must output to change the stream by `change + drift`, and the tokens' weights."""
        norm = post_norm_of(self.full, self.decoder.family, role)
        if norm is None:
            return (change + drift) / self.decoder.shape.residual_multiplier, None
        output = of_source()
        target = output + norm.change_of_output(output, drift)
        return target, norm.weights(target)

    def _weights(self, target: torch.Tensor) -> torch.Tensor | None:
        """Return the weights of an MLP's tokens from its target, or None for 1 each."""
        norm = post_norm_of(self.full, self.decoder.family, "down")
        return None if norm is None else norm.weights(target)

    def _mlp_output(self, middle: torch.Tensor) -> torch.Tensor:
        """Return what the source's MLP outputs for the stream after attention."""
        reader, mlp = self._reader(self.full), self.full.get_submodule(self.decoder.family.mlp)
        output: torch.Tensor = mlp(middle if reader is mlp else reader(middle))
        return output

    def _reader(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.decoder.family.stream_reader)

    def _behind(self, role: Role) -> nn.Module:
        """Return the source's norm behind a projection, or without one the module that reads the stream after it."""
        return self.full.get_submodule(self.decoder.family.post_norms.get(role, self.decoder.family.stream_reader))

    def _run_full(self, full_in: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the source's stream after attention, and after the MLP."""
        with inputs_of(self._reader(self.full)) as seen:
            out = run_layer(self.full, full_in, self.calls[0][len(full_in)][self.index])
        return seen.pop().view_as(full_in), out  # OPT reads the stream without the dimension of the batch

    def _run_small(self, small_in: torch.Tensor) -> torch.Tensor:
        return run_layer(self.small, small_in, self.calls[1][len(small_in)][self.index])

    def _linear(self, role: Role) -> RoleLinear:
        return role_linear(self.small, self.decoder.family, role, self.shapes)


def without_bias(linear: RoleLinear, target: torch.Tensor) -> torch.Tensor:
    """Return the target minus the bias."""
    return target if linear.bias is None else target - linear.bias
