"""Roles of fused and transposed tensors: taken out, changed one by one, and written where they were."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from a3cli.models import projections
from a3cli.models.families import LayerSizes, ModelShape, Place
from a3cli.models.families.llama import FAMILY as LLAMA
from a3cli.models.fused import RoleLinear, change_roles, role_linear, stored_shape, take_role
from a3cli.models.projections import apply_projection
from a3cli.models.shards import PlannedTensor
from a3cli.solvers.moments import LayerMoments
from a3cli.stages.weights import row_jobs
from a3cli.stream.hooks import moments_of, outputs_given
from tests.helpers.solutions import random_solution

SHAPE = ModelShape(
    hidden_size=48, layers=1, heads=4, kv_heads=2, head_dim=16, intermediate_size=96, attention_bias=True, mlp_bias=True
)
FULL, SIZES = SHAPE.linear_shapes(), LayerSizes(10, 14, 64)
SMALL = SHAPE.linear_shapes(SIZES)
# Rows in another order than the roles of the method, to show that only the places count.
ORDER = {"qkv": ("k", "q", "v"), "gate_up": ("up", "gate"), "o": ("o",), "down": ("down",)}


def family(*, transposed: bool):
    places = {
        role: Place(f"block.{module}", after=roles[:i] if len(roles) > 1 else None, transposed=transposed)
        for module, roles in ORDER.items()
        for i, role in enumerate(roles)
    }
    return replace(LLAMA, places={**places, "mlp_norm": Place("block.norm")})


def store(weights: dict[str, torch.Tensor], roles: tuple[str, ...], *, transposed: bool) -> torch.Tensor:
    """Return the tensor that holds the weights `[out, in]` or biases of these roles."""
    joined = torch.cat([weights[role] for role in roles])
    return joined.mT.contiguous() if transposed and joined.ndim == 2 else joined


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return {role: torch.randn(shape) for role, shape in FULL.items()}


@pytest.fixture
def solution():
    torch.manual_seed(1)
    found = random_solution("llama-gqa", SIZES, [0.0, 1.0, 2.0, 3.0, 4.5], method="best")
    return found | {name: torch.randn(SIZES.mlp, 48) for name in ("gate_weight", "up_weight")}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("module", ORDER)
def test_a_role_is_taken_out_of_its_tensor(module, transposed, weights):
    ours, roles = family(transposed=transposed), ORDER[module]
    stored = store(weights, roles, transposed=transposed)
    assert ours.find_roles(f"model.layers.0.block.{module}.weight") == (0, roles, "weight")
    for role in roles:
        assert stored_shape(ours, role, FULL) == tuple(stored.shape)
        assert torch.equal(take_role(stored, ours, role, FULL), weights[role])
        bias = torch.cat([weights[each][:, 0] for each in roles])
        assert stored_shape(ours, role, FULL, "bias") == tuple(bias.shape)
        assert torch.equal(take_role(bias, ours, role, FULL), weights[role][:, 0])
    changed = change_roles(stored, ours, roles, FULL, lambda role, own: own * len(role))
    expected = store({role: weights[role] * len(role) for role in roles}, roles, transposed=transposed)
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("module", ORDER)
def test_an_export_projects_each_role_of_a_tensor_alone(module, transposed, kind, weights, solution, monkeypatch):
    """Some rows at a time, except where roles are columns; the file has each role's result in its place."""
    monkeypatch.setattr(projections, "PIECE", 2000)
    ours, roles = family(transposed=transposed), ORDER[module]
    parts = {role: weights[role] if kind == "weight" else weights[role][:, 0] for role in roles}
    expected = store(
        {role: apply_projection(parts[role], role, solution, SHAPE, fold_scale=True) for role in roles},
        roles,
        transposed=transposed,
    ).float()
    name = f"model.layers.0.block.{module}.{kind}"
    shape = stored_shape(ours, roles[0], SMALL, kind)
    stored = store(parts, roles, transposed=transposed)
    source = SimpleNamespace(name="source", tensors={name}, read={name: stored}.__getitem__)
    model = SimpleNamespace(source=source, family=ours, shape=SHAPE)
    solved = SimpleNamespace(layer=lambda _layer: solution, per_layer=False)
    jobs = [job() for job in row_jobs(PlannedTensor(name, shape, torch.float32), model, solved)]
    assert tuple(torch.cat(jobs).shape) == shape
    torch.testing.assert_close(torch.cat(jobs), expected, rtol=1e-6, atol=1e-6)
    assert (len(jobs) > len(roles)) == (kind == "weight" and not transposed)


@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_a_part_of_a_linear_layer_is_a_view(transposed, weights):
    ours, roles = family(transposed=transposed), ORDER["gate_up"]
    linear = Conv1D(192, 48) if transposed else torch.nn.Linear(48, 192)
    linear.weight.copy_(store(weights, roles, transposed=transposed))
    layer = torch.nn.ModuleDict({"block": torch.nn.ModuleDict({"gate_up": linear})})
    gate = role_linear(layer, ours, "gate", FULL)
    assert torch.equal(gate.weight, weights["gate"])
    assert torch.equal(gate.bias, linear.bias[96:])
    x = torch.randn(5, 48)
    before, change = linear(x), torch.randn(96, 48)
    gate.weight.copy_(change)
    torch.testing.assert_close(linear(x)[:, 96:], x @ change.T + linear.bias[96:])
    assert torch.equal(linear(x)[:, :96], before[:, :96])


def test_outputs_of_a_fused_layer_are_in_the_order_of_its_rows():
    linear = torch.nn.Linear(48, 192)
    gate, up = (RoleLinear(linear, rows, transposed=False) for rows in (slice(96, 192), slice(96)))
    with outputs_given([gate, up], [torch.ones(3, 96), torch.zeros(3, 96)]):
        assert linear(torch.randn(3, 48)).sum(0).tolist() == [0] * 96 + [3] * 96
    assert "forward" not in vars(linear)


class Block(torch.nn.Module):
    """A layer whose attention is absent: it only calls the modules of the roles."""

    def __init__(self, qkv: torch.nn.Module) -> None:
        super().__init__()
        self.qkv, self.o, self.down = qkv, torch.nn.Linear(64, 48), torch.nn.Linear(96, 48)
        self.norm = torch.nn.Identity()


@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_heads_are_parts_of_the_output_of_a_fused_layer(transposed, weights):
    ours = family(transposed=transposed)
    qkv = Conv1D(128, 48) if transposed else torch.nn.Linear(48, 128)
    qkv.weight.copy_(store(weights, ORDER["qkv"], transposed=transposed))
    layer = torch.nn.ModuleDict({"block": Block(qkv)})
    moments, x = LayerMoments(16, False, torch.device("cpu"), None), torch.randn(2, 7, 48)
    with moments_of(layer, ours, SHAPE, moments):
        out = qkv(x).flatten(0, 1).double()
    found = moments.finished()
    for role, start, width in (("k", 0, 32), ("q", 32, 64), ("v", 96, 32)):
        heads = out[:, start : start + width].unflatten(1, (-1, 16)).transpose(0, 1)
        torch.testing.assert_close(found[f"{role}_gram"].double(), heads.mT @ heads, rtol=1e-5, atol=1e-5)
