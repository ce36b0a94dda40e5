"""Gauss-Newton steps equal dense least squares with the literal Jacobian."""

import pytest
import torch
from torch.func import jacrev

from a3cli.solvers.gauss_newton import gauss_newton_step, pre_activations
from a3cli.solvers.linalg import conjugate_gradients


def gated(z: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(z[:, 0]) * z[:, 1]


def plain(z: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(z[:, 0], approximate="tanh")


@pytest.fixture
def problem():
    """Return an MLP of 5 channels, 6 inputs and 4 outputs, and 300 tokens in two batches; two layers read its input."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x, target, down = draw(300, 6), draw(300, 4), draw(4, 5)

    return down, draw(2, 5, 6), draw(2, 5), x, target


def batches_of(x: torch.Tensor, target: torch.Tensor):
    return [(x[:120], target[:120], None), (x[120:], target[120:], None)]


@pytest.mark.parametrize(("hidden", "inputs"), [(gated, 2), (plain, 1)])
def test_undamped_step_is_the_least_squares_solution(hidden, inputs, problem):
    down, weights, biases, x, target = problem
    weights, biases = weights[:inputs], biases[:inputs]
    step = gauss_newton_step(hidden, down, weights, biases, batches_of(x, target), damping=0.0, iterations=200)
    jacobian = jacrev(lambda w: hidden(pre_activations(x, w, biases)) @ down.mT)(weights).reshape(target.numel(), -1)
    residual = (target - hidden(pre_activations(x, weights, biases)) @ down.mT).reshape(-1, 1)
    literal = torch.linalg.lstsq(jacobian, residual).solution.view_as(weights)
    torch.testing.assert_close(step, literal, rtol=1e-6, atol=1e-8)


def test_a_token_of_weight_two_counts_as_two(problem):
    down, weights, biases, x, target = problem
    often = torch.arange(300) % 3 == 0
    counted = [(x, target, 1.0 + often[:, None].double())]
    repeated = [(torch.cat([x, x[often]]), torch.cat([target, target[often]]), None)]
    options = {"damping": 0.0, "iterations": 200}
    steps = [gauss_newton_step(gated, down, weights, biases, own, **options) for own in (counted, repeated)]
    torch.testing.assert_close(*steps, rtol=1e-6, atol=1e-8)
    plain_step = gauss_newton_step(gated, down, weights, biases, batches_of(x, target), **options)
    assert (steps[0] - plain_step).norm() > 1e-3 * plain_step.norm()


@pytest.mark.parametrize(("hidden", "inputs"), [(gated, 2), (plain, 1)])
def test_few_iterations_lower_the_error(hidden, inputs, problem):
    down, weights, biases, x, _ = problem
    weights, biases = weights[:inputs], biases[:inputs]
    reachable = weights + 0.05 * torch.randn(
        weights.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    target = hidden(pre_activations(x, reachable, biases)) @ down.mT

    def error(w: torch.Tensor) -> float:
        return (target - hidden(pre_activations(x, w, biases)) @ down.mT).square().sum().item()

    reached = weights
    errors = [error(reached)]
    for _ in range(3):
        reached = reached + gauss_newton_step(
            hidden, down, reached, biases, batches_of(x, target), damping=1e-3, iterations=8
        )
        errors.append(error(reached))
    assert errors[1] < 0.1 * errors[0]
    assert errors[3] < 1e-3 * errors[0]


def test_damping_shortens_the_step(problem):
    down, weights, biases, x, target = problem
    lengths = [
        gauss_newton_step(gated, down, weights, biases, batches_of(x, target), damping=damping, iterations=100)
        .norm()
        .item()
        for damping in (0.0, 0.1, 10.0)
    ]
    assert lengths == sorted(lengths, reverse=True)


def test_dead_channels_do_not_move(problem):
    """A channel that no output reads has no derivative: its row stays finite and unchanged."""
    _, weights, biases, x, target = problem
    down = torch.zeros(4, 5, dtype=torch.float64)
    down[:, :4] = 1.0
    step = gauss_newton_step(gated, down, weights, biases, batches_of(x, target), damping=1e-3, iterations=8)
    assert torch.isfinite(step).all()
    assert (step[:, 4] == 0).all()


def test_what_nothing_reaches_stays(problem):
    _, weights, biases, x, target = problem
    step = gauss_newton_step(
        gated,
        torch.zeros(4, 5, dtype=torch.float64),
        weights,
        biases,
        batches_of(x, target),
        damping=0.1,
        iterations=3,
    )
    assert (step == 0).all()


def test_conjugate_gradients_solve_a_dense_system():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    matrix, right = root @ root.mT + torch.eye(12), torch.randn(12, dtype=torch.float64, generator=generator)
    found = conjugate_gradients(lambda v: matrix @ v, right, lambda r: r / matrix.diagonal(), iterations=40)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right))
    assert (conjugate_gradients(lambda v: matrix @ v, torch.zeros_like(right), lambda r: r, iterations=5) == 0).all()
