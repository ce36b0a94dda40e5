"""Least squares for linear layers followed by a nonlinear function: Gauss-Newton with conjugate gradients.

The layers' outputs z become hidden values `h(z)`, channel by channel, and these become outputs `h(z) Vᵀ`. The outputs
are linearised in the layers' weights, and preconditioned conjugate gradients solve the linear least-squares problem.
The derivatives of h are computed once and kept, so that an iteration takes two products of the layers' size and two
with V, as a forward and a backward pass do. n layers of m outputs read the same d inputs.
"""

from collections.abc import Callable, Sequence

import torch
from torch.func import vjp

from a3cli.solvers.linalg import conjugate_gradients

Hidden = Callable[[torch.Tensor], torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def gauss_newton_step(
    hidden: Hidden,
    output: torch.Tensor,
    weights: torch.Tensor,
    biases: torch.Tensor,
    batches: Sequence[Batch],
    *,
    damping: float,
    iterations: int,
) -> torch.Tensor:
    """Return the step `[n, m, d]` to `argmin_δ Σ w‖t − h(z) Vᵀ − J δ‖² + damping · ‖δ‖²_P` from weights `[n, m, d]`.

    hidden maps pre-activations `z` `[tokens, n, m]` to hidden values `[tokens, m]`, each from the n of its own token
    and channel, and output is V `[k, m]`; `batches` are inputs `[tokens, d]`, targets `[tokens, k]` and the tokens'
    weights w `[tokens, 1]` or None for 1 each. The metric `P = diag(s) ⊗ E[x xᵀ]`, `s` `[n, m]` the energy of the
    outputs' derivative by each pre-activation, stands for JᵀJ row by row: it damps and preconditions.
    """
    gram, rows, right, slopes = _first_pass(hidden, output, weights, biases, batches)
    inverse = torch.linalg.inv(gram.double()).to(weights.dtype)
    still = torch.zeros_like(biases)

    def metric(step: torch.Tensor) -> torch.Tensor:
        return rows[..., None] * (step @ gram)

    def normal(step: torch.Tensor) -> torch.Tensor:
        total = damping * metric(step)
        for (x, _, counted), slope in zip(batches, slopes, strict=True):
            moved = pre_activations(x, step, still).mul_(slope).sum(1)
            total += _as_weights(slope, _times(moved @ output.mT @ output, counted), x)
        return total

    return conjugate_gradients(normal, right, lambda r: r / rows[..., None] @ inverse, iterations=iterations)


def pre_activations(x: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """Return `x Wᵀ + b`, `[tokens, n, m]`."""
    return torch.addmm(biases.flatten(), x, weights.flatten(0, 1).mT).view(len(x), *biases.shape)


def _times(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return x if weights is None else x * weights


def _as_weights(slope: torch.Tensor, by_hidden: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Convert derivatives by hidden values `[tokens, m]` to derivatives by weights `[n, m, d]`."""
    by_pre_activations = slope * by_hidden[:, None]
    return (by_pre_activations.flatten(1).mT @ x).view(*slope.shape[1:], -1)


def _first_pass(
    hidden: Hidden, output: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor, batches: Sequence[Batch]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return `E[x xᵀ]` slightly damped, the energies `s`, `Jᵀ(t − f)`, and `∂h/∂z` `[tokens, n, m]` of each batch."""
    gram = weights.new_zeros(weights.shape[2], weights.shape[2])
    rows, right, tokens = torch.zeros_like(biases), torch.zeros_like(weights), 0
    slopes = []
    for x, target, counted in batches:
        values, pull = vjp(hidden, pre_activations(x, weights, biases))[:2]
        slope = pull(torch.ones_like(values))[0]
        slopes.append(slope)
        rows += slope.square().sum(0)
        right += _as_weights(slope, _times((target - values @ output.mT) @ output, counted), x)
        gram.addmm_(x.mT, _times(x, counted))
        tokens += len(x)
    rows *= output.square().sum(0)
    gram /= tokens
    mean = gram.diagonal().mean()
    gram.diagonal().add_(torch.where(mean > 0, 1e-3 * mean, 1.0))
    least = torch.finfo(rows.dtype).tiny  # the step is zero where nothing reaches the outputs
    return gram, rows.clamp_min(1e-6 * rows.mean()).clamp_min(least), right, slopes
