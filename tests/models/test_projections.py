"""Weights projected a few rows at a time equal weights projected at once."""

import pytest
import torch

from a3cli.models import projections
from a3cli.models.families import LayerSizes, ModelShape
from a3cli.models.projections import apply_projection, pieces
from tests.helpers.solutions import random_solution

SHAPE = ModelShape(hidden_size=48, layers=1, heads=4, kv_heads=2, head_dim=16, intermediate_size=96)


@pytest.mark.parametrize("at_once", [1, 1000, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["paper", "best", "sequential"])
def test_pieces_are_rows_of_the_whole(method, dtype, at_once, monkeypatch):
    monkeypatch.setattr(projections, "PIECE", at_once)
    sizes = LayerSizes(12, 12, 40)
    solution = random_solution("llama-gqa", sizes, list(range(6)), method="paper" if method == "paper" else "best")
    if method == "sequential":
        solution |= {name: torch.randn(sizes.mlp, 48) for name in ("gate_weight", "up_weight")}
    for role, full in SHAPE.linear_shapes().items():
        for weight in (torch.randn(full).to(dtype), torch.randn(full[0]).to(dtype)):
            whole = apply_projection(weight, role, solution, SHAPE, fold_scale=True)
            parts = [
                apply_projection(part, role, of_rows, SHAPE, fold_scale=True)
                for part, of_rows in pieces(weight, role, solution, SHAPE)
            ]
            torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
            if weight.ndim == 2 and at_once == 1000:
                assert len(parts) > 1


def test_what_no_solution_touches_is_not_copied():
    weight = torch.randn(96, 48)
    parts = [
        apply_projection(part, "gate", of_rows, SHAPE, fold_scale=True)
        for part, of_rows in pieces(weight, "gate", {"unchanged": torch.zeros(0)}, SHAPE)
    ]
    assert [part.data_ptr() for part in parts] == [weight.data_ptr()]


def test_products_of_half_precision_are_rounded_to_it_once():
    """Computed in float32 they equal the rounded float64 result, except for ties."""
    weight = torch.randn(64, 48, dtype=torch.bfloat16)
    solution = random_solution("llama-gqa", LayerSizes(12, 12, 96), [], method="best")
    ours = apply_projection(weight, "q", solution, SHAPE, fold_scale=True).to(torch.bfloat16)
    exact = apply_projection(weight.double(), "q", solution, SHAPE, fold_scale=True).to(torch.bfloat16)
    assert (ours != exact).float().mean() < 0.002
    torch.testing.assert_close(ours.double(), exact.double(), rtol=2**-7, atol=1e-6)
