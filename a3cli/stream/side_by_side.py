"""One layer of the source and of the smaller model, side by side: what each part reads, outputs and should output."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from a3cli.models.families import Role
from a3cli.models.families.base import LinearShapes
from a3cli.models.fused import RoleLinear, role_linear
from a3cli.stream.batches import Calls
from a3cli.stream.decoder import Decoder, run_layer
from a3cli.stream.hooks import inputs_of
from a3cli.stream.post_norm import post_norm_of

DRIFT = 0.5  # share of the drift of the residual stream that each refit corrects; 0.5 was better than 0 and 1


@dataclass
class SideBySide:
    """A layer of both models, with weights; hidden states are batches `[B, T, d]`."""

    decoder: Decoder
    full: nn.Module
    small: nn.Module
    shapes: LinearShapes
    calls: tuple[Calls, Calls]
    index: int

    @property
    def carried(self) -> bool:
        return self.decoder.family.carried_attention is not None

    def _mlp_data(
        self, attended: torch.Tensor, small_in: torch.Tensor, middle: torch.Tensor, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the smaller stream after attention, the MLP's input, and down's target and weights for the tokens."""
        small_middle = self._after_attention(attended, small_in)
        drift = DRIFT * (middle - small_middle)
        target, weights = self._target("down", lambda: self._mlp_output(middle), out - middle, drift)
        return small_middle, self._mlp_input(small_middle), target, weights

    def _after_attention(self, attended: torch.Tensor, small_in: torch.Tensor) -> torch.Tensor:
        """Return the smaller model's stream after attention."""
        return attended if self.carried else small_in + self._in_stream("o", self._linear("o").module(attended))

    def _in_stream(self, role: Role, output: torch.Tensor) -> torch.Tensor:
        """Return what the output of the smaller o or down projection adds to the stream."""
        norms = self.decoder.family.post_norms
        normed = self.small.get_submodule(norms[role])(output) if role in norms else output
        added: torch.Tensor = normed * self.decoder.shape.residual_multiplier
        return added

    def _mlp_input(self, middle: torch.Tensor) -> torch.Tensor:
        """Return what the smaller MLP reads of the stream after attention."""
        read: torch.Tensor = self._reader(self.small)(middle) if "mlp_norm" in self.decoder.family.places else middle
        return read

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the smaller MLP."""
        of, between = self.decoder.family, self.decoder.family.activation
        for module in [of.module("up"), between, of.module("down")] if between else [of.mlp]:
            x = self.small.get_submodule(module)(x)
        return x

    def _down_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the smaller down projection reads."""
        with inputs_of(self._linear("down").module, stop=True) as seen:
            self._mlp(x)
        return seen.pop()

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
