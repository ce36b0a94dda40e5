"""Sequential correction: refit each layer's projections after the cuts before it.

A second sweep runs the source and the smaller model side by side over calibration blocks. In each layer the output
projection, then the down projection, are fitted by least squares on the smaller model's own activations to the output
of the source's layer, plus half of the accumulated drift of the residual stream. If a norm follows the projection, each
token is weighted as in calibration, and the drift is taken back through the norm. The ridge pulls towards the
one-shot weights, which prevents overfitting. Between the two, the MLP's gate (if any) and up projections are
fitted to the same target by Gauss-Newton steps (`solvers/gauss_newton.py`), each on a part of the blocks, which is held
in memory. Weights are read once, attention is computed once; memory holds one layer of both models.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from a3cli.errors import A3Error
from a3cli.models.families import Role
from a3cli.solvers.gauss_newton import gauss_newton_step
from a3cli.solvers.least_squares import LeastSquares
from a3cli.solvers.moments import Tensors
from a3cli.stream.batches import Batching, Calls, embed_all, stream
from a3cli.stream.decoder import Decoder
from a3cli.stream.hidden import Blocks, EveryNth, HiddenStates, Readable, TwoFiles
from a3cli.stream.hooks import inputs_of, outputs_given
from a3cli.stream.post_norm import post_norm_of
from a3cli.stream.side_by_side import DRIFT, SideBySide, without_bias
from a3cli.stream.smaller import SmallerDecoder
from a3cli.work.processes import in_thread
from a3cli.work.progress import Progress

PULL = 100.0  # towards the one-shot weights, as strong as that many tokens for each input of the projection
DAMPING = 1e-3  # of a Gauss-Newton step, relative to the problem's own curvature
ITERATIONS = 3  # conjugate-gradient iterations per step; a second step gains more than further iterations of the first
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
    fitted_every: int,
    first: int,
    progress: Progress,
) -> Iterator[tuple[int, Tensors, list[Path]]]:
    """Yield from layer `first` on: its refit `output_weight` `[d, H·s]`, `down_weight` `[d, m]` and, with `rounds` of
    Gauss-Newton, `gate_weight` and `up_weight` `[m, d]`, float32; and the files that the next layer starts with.

    A round is on every `fitted_every`-th block.
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
            refit = _Layer(source, full, small, shapes, calls, index, files, batching).refit(rounds, fitted_every)
        progress(layer=index, layers=layers, tokens=tokens, total_tokens=tokens)
        yield index, refit, [files.of_source.input_of(index + 1).path, files.of_smaller.input_of(index + 1).path]


class Files:
    """For all blocks: hidden states of both models, the source's after attention, and what the smaller attention gives.

    A layer's inputs stay until it is finished, so that a killed sweep can resume there.
    """

    def __init__(self, folder: Path, decoder: Decoder, blocks: torch.Tensor) -> None:
        self.folder, self.blocks, self.dtype = folder, blocks, decoder.machine.dtype
        shape = (*blocks.shape, decoder.shape.hidden_size)
        self.of_source, self.of_smaller = (TwoFiles(folder, name, shape, self.dtype) for name in ("source", "smaller"))
        self.middle = HiddenStates(folder / "middle.bin", shape, self.dtype)

    def attended(self, width: int) -> HiddenStates:
        """Return the file for what a layer's output projection reads, `width` numbers for each token."""
        return HiddenStates(self.folder / "attended.bin", (*self.blocks.shape, width), self.dtype)

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


@dataclass
class _Fitted:
    """A batch of tokens that a round fits gate and up on: the MLP's input `[tokens, d]`, what down must output, and the
    tokens' weights."""

    x: torch.Tensor
    target: torch.Tensor
    weights: torch.Tensor | None


@dataclass
class _Layer(SideBySide):
    """One layer of both models, whose smaller projections are fitted."""

    files: Files
    batching: Batching

    def __post_init__(self) -> None:
        files, index = self.files, self.index
        self.full_in, self.small_in = files.of_source.input_of(index), files.of_smaller.input_of(index)
        self.full_out, self.small_out = files.of_source.input_of(index + 1), files.of_smaller.input_of(index + 1)
        self.attended = files.attended(self.decoder.shape.hidden_size if self.carried else self.shapes["o"][1])

    @torch.no_grad()  # not inference mode: Gauss-Newton takes derivatives
    def refit(self, rounds: int, fitted_every: int) -> Tensors:
        self.files.middle.create()
        self.attended.create()
        refit: list[Role] = ["down", *(self.decoder.shape.mlp_inputs if rounds else ())]
        if self.carried:
            self._each(self._run_both, [self.full_in, self.small_in], [self.files.middle, self.full_out, self.attended])
        else:
            self._fit("o", self._fit_attention)
            refit.insert(0, "o")
        for number in range(rounds):  # each on other blocks, if there are several parts
            self._improve_inputs(self._fitted(fitted_every, number * fitted_every // rounds))
        self._fit("down", self._fit_mlp)
        self._each(self._add_mlp, [self.small_out], [self.small_out])
        weights = {REFIT_NAMES[role]: self._linear(role).weight.float().cpu() for role in refit}
        return {name: weight.clone(memory_format=torch.contiguous_format) for name, weight in weights.items()}

    def _each(
        self,
        compute: Callable[..., Sequence[torch.Tensor]],
        inputs: Sequence[Readable],
        outputs: Sequence[Blocks] = (),
        batching: Batching | None = None,
    ) -> None:
        """Call `compute` with a batch of each input, on the device, for one batch after another."""
        device = self.decoder.machine.device
        stream(
            lambda _start, *batches: compute(*(batch.to(device) for batch in batches)),
            inputs,
            outputs,
            batching or self.batching,
        )

    def _improve_inputs(self, batches: list[_Fitted]) -> None:
        """Take one Gauss-Newton step of gate and up, and refit down; undo both if the error does not fall."""
        linears = [self._linear(role) for role in (*self.decoder.shape.mlp_inputs, "down")]
        error = self._fit("down", partial(self._add_fitted, batches))
        before = [linear.weight.clone() for linear in linears]
        step = self._gauss_newton_step(batches)
        for halving in range(HALVINGS):
            for linear, old, change in zip(linears, before, step, strict=False):  # down has no step
                linear.weight.copy_(old + 0.5**halving * change)
            linears[-1].weight.copy_(before[-1])
            if self._fit("down", partial(self._add_fitted, batches)) < error:
                return
        for linear, old in zip(linears, before, strict=True):
            linear.weight.copy_(old)

    def _gauss_newton_step(self, batches: list[_Fitted]) -> torch.Tensor:
        """Return the steps of the weights `[n, m, d]` of the linear layers that read the MLP's input."""
        linears = [self._linear(role) for role in self.decoder.shape.mlp_inputs]
        weights = torch.stack([linear.weight for linear in linears]).float()
        biases = torch.stack(
            [linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears]
        ).float()

        def hidden(before: torch.Tensor) -> torch.Tensor:
            with outputs_given(linears, before.to(linears[0].weight.dtype).unbind(1)):
                return self._down_input(before).float()  # the MLP's input is not used

        norm = post_norm_of(self.full, self.decoder.family, "down")
        gain = 1 if norm is None else norm.gain
        return gauss_newton_step(
            hidden,
            self._down_in_stream(),
            weights,
            biases,
            [(b.x, b.target * gain, None if b.weights is None else b.weights.reshape(-1, 1)) for b in batches],
            damping=DAMPING,
            iterations=ITERATIONS,
        )

    def _down_in_stream(self) -> torch.Tensor:
        """Return the smaller down projection `[d, m]`, times the weight of the norm that follows, if there is one."""
        norm, weight = post_norm_of(self.full, self.decoder.family, "down"), self._linear("down").weight.float()
        return weight if norm is None else weight * norm.gain[:, None]

    def _fit(self, role: Role, collect: Callable[[LeastSquares], None]) -> float:
        """Collect, solve, and put the new weight in the smaller layer; return the remaining squared error."""
        norm = post_norm_of(self.full, self.decoder.family, role)
        sums = LeastSquares(gain=None if norm is None else norm.gain)
        collect(sums)
        linear = self._linear(role)
        try:
            weight = in_thread(partial(sums.solve, linear.weight, pull=PULL))
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
        """Fit the output projection; write the source's stream after attention and after the MLP, and o's inputs."""
        linear = self._linear("o")

        def fit(full_in: torch.Tensor, small_in: torch.Tensor) -> list[torch.Tensor]:
            with inputs_of(self._behind("o")) as behind:
                middle, out = self._run_full(full_in)
            with inputs_of(linear.module, stop=True) as seen:
                self._run_small(small_in)
            attended = seen.pop()
            target, weights = self._target("o", behind.pop, middle - full_in, DRIFT * (full_in - small_in))
            sums.add(attended, without_bias(linear, target), weights)
            return [middle, out, attended.view(*full_in.shape[:2], -1)]

        self._each(fit, [self.full_in, self.small_in], [self.files.middle, self.full_out, self.attended])

    def _run_both(self, full_in: torch.Tensor, small_in: torch.Tensor) -> list[torch.Tensor]:
        """Return the source's stream after attention and after the MLP, and the smaller model's after attention."""
        middle, out = self._run_full(full_in)
        with inputs_of(self._reader(self.small), stop=True) as seen:
            self._run_small(small_in)
        return [middle, out, seen.pop().view_as(small_in)]

    def _fitted(self, every: int, first: int) -> list[_Fitted]:
        """Return the data of every so many blocks to fit gate and up on, in float32 on the device."""
        found: list[_Fitted] = []
        linear = self._linear("down")

        def add(*states: torch.Tensor) -> list[torch.Tensor]:
            _, x, target, weights = self._mlp_data(*states)
            wanted = without_bias(linear, target).flatten(0, 1).float()
            found.append(_Fitted(x.flatten(0, 1).float(), wanted, weights))
            return []

        blocks = range(first, self.batching.blocks, every)
        part = [EveryNth(each, every, first) for each in self._mlp_files]
        self._each(add, part, batching=replace(self.batching, blocks=len(blocks)))
        return found

    @property
    def _mlp_files(self) -> list[HiddenStates]:
        return [self.attended, self.small_in, self.files.middle, self.full_out]

    def _add_fitted(self, batches: list[_Fitted], sums: LeastSquares) -> None:
        """Add the tokens that gate and up are fitted on, with the current gate and up projections."""
        dtype = self.decoder.machine.dtype
        for batch in batches:
            sums.add(self._down_input(batch.x.to(dtype)), batch.target, batch.weights)

    def _fit_mlp(self, sums: LeastSquares) -> None:
        """Fit the down projection; write the smaller model's stream after attention in its output's place."""
        linear = self._linear("down")

        def fit(*states: torch.Tensor) -> list[torch.Tensor]:
            small_middle, x, target, weights = self._mlp_data(*states)
            sums.add(self._down_input(x), without_bias(linear, target), weights)
            return [small_middle]

        self._each(fit, self._mlp_files, [self.small_out])

    def _add_mlp(self, middle: torch.Tensor) -> list[torch.Tensor]:
        """Return the smaller model's stream after the MLP, from that after attention."""
        return [middle + self._in_stream("down", self._mlp(self._mlp_input(middle)).view_as(middle))]
