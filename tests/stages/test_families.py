"""A family's definition determines which components may be compressed and which tensors are carried."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from a3cli.models.families import FAMILIES
from a3cli.models.families.llama import FAMILY as LLAMA
from a3cli.work.files import read_json
from tests.conftest import SHORT, SOLVE, refused


@pytest.fixture
def limited(monkeypatch):
    """Change the definition of the llama family for one test."""

    def change(**fields):
        monkeypatch.setitem(FAMILIES, "llama", replace(LLAMA, **fields))

    return change


@pytest.mark.parametrize("shape", ["stock", "per-layer"])
def test_solve_refuses_a_component_that_the_family_does_not_allow(shape, limited, a3, work):
    only_here = "stock_components" if shape == "stock" else "per_layer_components"
    limited(**{only_here: ("mlp",)})
    command = (*SOLVE, "--overwrite", "--work", work)
    refused(a3(*command, "--shape", shape), "qk and ov", "'llama'", f"--shape {shape}", "--components mlp")
    other = "per-layer" if shape == "stock" else "stock"
    for allowed in (("--shape", shape, "--components", "mlp"), ("--shape", other, "--method", "paper")):
        outcome = a3(*command, *allowed)
        assert outcome.code == 0, outcome.stderr


def test_pareto_compresses_what_the_family_allows(limited, a3, work):
    limited(stock_components=("mlp",), per_layer_components=("mlp",))
    outcome = a3("pareto", "--budgets", "0.2", "--mlp-multiple", 8, "--work", work, "--json")
    assert outcome.code == 0, outcome.stderr
    for point in outcome.json["points"]:
        assert all(size["qk"] == size["ov"] == 16 for size in point["sizes"])
        assert all(size["mlp"] < 96 for size in point["sizes"])


def test_carried_tensors_are_copied(limited, a3, source, text_file, tmp_path):
    vision = {"vision.patches.weight": torch.randn(6, 4)}
    save_file(vision, source / "model-00099-of-00099.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(
        index.read_text().replace(
            '"weight_map": {', '"weight_map": {"vision.patches.weight": "model-00099-of-00099.safetensors",'
        )
    )
    work, out = ("--work", tmp_path / "other"), tmp_path / "out"
    calibrate = ("calibrate", source, "--dataset", text_file, *SHORT, *work)
    refused(a3(*calibrate), "not known to this class", "vision.patches.weight")

    limited(carried=("vision.",))
    for command in (calibrate, (*SOLVE, *work), ("export", out, *work), ("verify", out, *work, "--require-reference")):
        outcome = a3(*command)
        assert outcome.code == 0, outcome.stderr
    assert torch.equal(load_file(out / "model.safetensors")["vision.patches.weight"], vision["vision.patches.weight"])


@pytest.mark.parametrize("method", ["best", "paper"])
def test_a_softmax_scale_of_the_config_is_not_folded_into_queries(method, a3, checkpoint, text_file, tmp_path):
    """Test it on Granite's smaller query heads: with the scale folded in, the query weights would be scaled as well."""
    source, work, out = checkpoint("granite-gqa"), ("--work", tmp_path / "work"), tmp_path / "out"
    for command in (
        ("calibrate", source, "--dataset", text_file, *SHORT, *work),
        ("solve", "--method", method, "--attention-budget", 0.25, "--head-multiple", 2, *work),
        ("export", out, *work),
        ("verify", out, "--require-reference", *work),
    ):
        outcome = a3(*command)
        assert outcome.code == 0, outcome.stderr
    config, was = (read_json(folder / "config.json") for folder in (out, source))
    assert config["head_dim"] < 16
    for name in ("attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling"):
        assert config[name] == was[name] != 1


@pytest.mark.parametrize("name", ["attention_multiplier", "residual_multiplier"])
def test_a_multiplier_must_be_above_zero(name, a3, checkpoint, text_file, tmp_path):
    folder = shutil.copytree(checkpoint("granite-gqa"), tmp_path / "source")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, name: 0.0}))
    refused(a3("calibrate", folder, "--dataset", text_file, "--work", tmp_path / "work"), f"{name} is 0.0", "above 0")
