"""Least squares for linear layers followed by a nonlinear function: Gauss-Newton with conjugate gradients.

The layers' outputs z become hidden values `h(z)`, of which only derivatives are used, and these become outputs
`h(z) Vᵀ`. The outputs are linearised in the layers' weights, preconditioned conjugate gradients solve the linear
least-squares problem, and no tensor is larger than the weights. An iteration costs about two forward passes over all
tokens. n layers of m outputs read the same d inputs.
"""

from collections.abc import Callable, Iterable

import torch
from torch.func import jvp, vjp

from a3cli.solvers.linalg import conjugate_gradients

Hidden = Callable[[torch.Tensor], torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
Batches = Callable[[], Iterable[Batch]]


def gauss_newton_step(
    hidden: Hidden,
    output: torch.Tensor,
    weights: torch.Tensor,
    biases: torch.Tensor,
    batches: Batches,
    *,
    damping: float,
    iterations: int,
) -> torch.Tensor:
    """Return the step `[n, m, d]` to `argmin_δ Σ w‖t − h(z) Vᵀ − J δ‖² + damping · ‖δ‖²_P` from weights `[n, m, d]`.

    hidden maps pre-activations `z` `[tokens, n, m]` to hidden values `[tokens, h]`, token by token, and output is V
    `[k, h]`; `batches()` yields inputs `[tokens, d]`, targets `[tokens, k]` and the tokens' weights w `[tokens, 1]` or
    None for 1 each, the same each time. The metric
    `P = diag(s) ⊗ E[x xᵀ]`, `s` `[n, m]` the energy of the outputs' derivative by each pre-activation, stands for JᵀJ
    row by row: it damps and preconditions.
    """
    gram, rows, right = _first_pass(hidden, output, weights, biases, batches)
    inverse = torch.linalg.inv(gram.double()).to(weights.dtype)
    still = torch.zeros_like(biases)

    def metric(step: torch.Tensor) -> torch.Tensor:
        return rows[..., None] * (step @ gram)

    def normal(step: torch.Tensor) -> torch.Tensor:
        total = damping * metric(step)
        for x, _, counted in batches():
            before = pre_activations(x, weights, biases)
            moved = jvp(hidden, (before,), (pre_activations(x, step, still),))[1]
            total += _as_weights(vjp(hidden, before)[1](_times(moved @ output.mT @ output, counted))[0], x)
        return total

    return conjugate_gradients(normal, right, lambda r: r / rows[..., None] @ inverse, iterations=iterations)


def pre_activations(x: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """Return `x Wᵀ + b`, `[tokens, n, m]`."""
    return torch.addmm(biases.flatten(), x, weights.flatten(0, 1).mT).view(len(x), *biases.shape)


def _times(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return x if weights is None else x * weights


def _as_weights(by_pre_activations: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Convert derivatives by pre-activations `[tokens, n, m]` to derivatives by weights `[n, m, d]`."""
    return (by_pre_activations.flatten(1).mT @ x).view(*by_pre_activations.shape[1:], -1)


def _first_pass(
    hidden: Hidden, output: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor, batches: Batches
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `E[x xᵀ]` slightly damped, the energies `s`, and `Jᵀ(t − f)`.

    s is estimated with random signs for the outputs: `E_r (∂(rᵀf)/∂z)² = Σ_k (∂f_k/∂z)²`, averaged over all tokens.
    """
    generator = torch.Generator(weights.device).manual_seed(0)
    gram = weights.new_zeros(weights.shape[2], weights.shape[2])
    rows, right, tokens = torch.zeros_like(biases), torch.zeros_like(weights), 0
    for x, target, counted in batches():
        values, pull = vjp(hidden, pre_activations(x, weights, biases))[:2]
        signs = torch.randint(2, target.shape, generator=generator, device=target.device) * 2 - 1
        rows += pull(signs.to(output.dtype) @ output)[0].square().sum(0)
        right += _as_weights(pull(_times((target - values @ output.mT) @ output, counted))[0], x)
        gram.addmm_(x.mT, _times(x, counted))
        tokens += len(x)
    gram /= tokens
    mean = gram.diagonal().mean()
    gram.diagonal().add_(torch.where(mean > 0, 1e-3 * mean, 1.0))
    least = torch.finfo(rows.dtype).tiny  # the step is zero where nothing reaches the outputs
    return gram, rows.clamp_min(1e-6 * rows.mean()).clamp_min(least), right
