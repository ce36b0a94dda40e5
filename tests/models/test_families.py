"""Families as data: each definition is found by its model type, and names map to roles and back."""

from dataclasses import replace

import pytest
import torch

from a3cli.models.experts import hold_apart, stored_name, weight_names
from a3cli.models.families import FAMILIES, LayerSizes, ModelShape, Place
from a3cli.models.families.expert_names import index_of
from a3cli.models.families.llama import FAMILY as LLAMA
from tests.conftest import MODELS, build_model

SHAPE = ModelShape(hidden_size=48, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate_size=96)
FUSED = replace(
    LLAMA,
    model_type="fused",
    places={
        "up": Place("mlp.gate_up_proj", after=("gate",)),
        "gate": Place("mlp.gate_up_proj", after=()),
        "q": Place("self_attn.qkv_proj", after=()),
        "k": Place("self_attn.qkv_proj", after=("q",)),
        "v": Place("self_attn.qkv_proj", after=("q", "k")),
        **{role: LLAMA.places[role] for role in ("o", "mlp_norm", "down")},
    },
)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_role_of_a_family_is_a_module_of_its_stock_class(model_type):
    name = next(name for name, (config, _, _) in MODELS.items() if config.model_type == model_type)
    family, model = FAMILIES[model_type], build_model(name)
    hold_apart(model, family)
    parameters = {stored_name(family, name) for name, _ in model.named_parameters()}
    for role in family.places:
        for layer in range(2):
            for index, tensor in enumerate(weight_names(family, layer, role, 4)):
                assert tensor in parameters
                found, roles, kind = family.find_roles(tensor)
                assert (found, kind) == (layer, "weight")
                assert role in roles
                assert roles == tuple(other for other in roles if tensor in weight_names(family, layer, other, 4))
                assert index_of(tensor) == (index if ".experts." in tensor else None)
    assert isinstance(model.get_submodule(family.embedding), torch.nn.Embedding)
    assert len(model.get_submodule(family.layers)) == 2
    assert model.get_submodule(family.layers)[0].get_submodule(family.mlp)


def test_a_tensor_without_a_role_is_found_nowhere():
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.x.mlp.up_proj.weight"):
        assert LLAMA.find_roles(name) is None


@pytest.mark.parametrize("sizes", [None, LayerSizes(qk=6, ov=10, mlp=32)])
def test_a_fused_tensor_holds_several_roles(sizes):
    shapes = SHAPE.linear_shapes(sizes)
    for tensor, expected in (
        ("model.layers.1.self_attn.qkv_proj.bias", ("q", "k", "v")),
        ("model.layers.1.mlp.gate_up_proj.weight", ("gate", "up")),
    ):
        layer, roles, kind = FUSED.find_roles(tensor)
        assert (layer, roles) == (1, expected)
        assert [FUSED.tensor(layer, role, kind) for role in roles] == [tensor] * len(roles)
        weights = {role: torch.randn(shapes[role]) for role in roles}
        fused = torch.cat([weights[role] for role in roles])
        for role in roles:
            assert torch.equal(fused[FUSED.rows(role, shapes)], weights[role])
    assert FUSED.find_roles("model.layers.0.self_attn.o_proj.weight") == (0, ("o",), "weight")
    assert FUSED.rows("o", shapes) == slice(None)
