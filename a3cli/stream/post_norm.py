"""A norm between a projection and the residual sum: what an error of the projection's output counts behind it.

The stream gets `γ ∘ f/rms(f)` of an output f. To first order an error e of f changes it by `γ ∘ e/rms(f)`, less a share
along f, which is small (docs/method.md) and left out.
"""

from dataclasses import dataclass

import torch
from torch import nn

from a3cli.models.families import Family, Role

LEAST = 1e-2  # of the mean square of γ: an output with less γ² is not driven to a change of the stream


@dataclass(frozen=True)
class PostNorm:
    """The weight γ `[d]` of a norm, and what it adds to the mean square."""

    gain: torch.Tensor
    epsilon: float

    def weights(self, output: torch.Tensor) -> torch.Tensor:
        """Return `1/rms²` `[...]` of outputs `[..., d]`."""
        return 1 / (output.float().square().mean(-1) + self.epsilon)

    def change_of_output(self, output: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """Return the change of outputs `[..., d]` that changes the stream by `change`, damped where γ is small."""
        squares = self.gain.square()
        factor = self.gain / (squares + LEAST * squares.mean()).clamp_min(torch.finfo(squares.dtype).tiny)
        return change * factor / self.weights(output).sqrt()[..., None]


def post_norm_of(layer: nn.Module, family: Family, role: Role) -> PostNorm | None:
    """Return the norm behind a projection of a layer, or None without one."""
    if role not in family.post_norms:
        return None
    norm = layer.get_submodule(family.post_norms[role])
    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon  # transformers has two names for it
    return PostNorm(norm.weight.float() + family.norm_offset, float(epsilon))  # type: ignore[arg-type, operator]
