"""Singular statistics have a finite solution with its damping reported; a NaN is rejected with its place."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import build_tokenizer, put_in_statistics, refused, reseal

pytestmark = pytest.mark.usefixtures("hasty")

ROUNDING = ("--head-multiple", 2, "--mlp-multiple", 8)


def duplicate_channels(layer) -> None:
    for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
        projection.weight[48:] = projection.weight[:48]
    for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        heads = projection.weight.view(-1, 16, 48)
        heads[:, 8:] = heads[:, :8]


def kill_channels(layer) -> None:
    layer.mlp.up_proj.weight[::3] = 0
    for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        projection.weight.view(-1, 16, 48)[:, 5:9] = 0


def kill_all(layer) -> None:
    """Zero all weights of a layer."""
    for projection in (layer.mlp.up_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        projection.weight[:] = 0


def nothing(layer) -> None:
    """Change nothing: the statistics are singular because there are fewer tokens than dimensions."""


@pytest.fixture(params=[duplicate_channels, kill_channels, kill_all, nothing], ids=lambda change: change.__name__)
def singular(request, checkpoint, text_file, a3, tmp_path) -> Path:
    folder = Path(shutil.copytree(checkpoint("llama-gqa"), tmp_path / "source"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        request.param(model.model.layers[1])
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    samples = 1 if request.param is nothing else 8
    length = 12 if request.param is nothing else 48
    text = ("--dataset", text_file, "--samples", samples, "--seq-len", length)
    assert a3("calibrate", folder, *text, "--work", tmp_path / "work").code == 0
    return tmp_path / "work"


@pytest.mark.parametrize(
    "options",
    [("--method", "best"), ("--method", "best", "--shape", "per-layer"), ("--method", "paper"), ("--sequential",)],
    ids=["best", "per-layer", "paper", "sequential"],
)
def test_singular_statistics_are_solved(options, singular, a3, tmp_path):
    budgets = ("--attention-budget", 0.25, "--mlp-budget", 0.25)
    outcome = a3("solve", *budgets, *ROUNDING, *options, "--work", singular, "--json")
    assert outcome.code == 0, outcome.stderr
    per_layer = outcome.json["per_layer"]
    assert torch.isfinite(
        torch.tensor([v for each in per_layer for c in each["curves"].values() for v in c["loss"]])
    ).all()
    for file in (singular / "solution").glob("*.safetensors"):
        assert all(torch.isfinite(tensor.float()).all() for tensor in load_file(file).values()), file
    assert a3("export", tmp_path / "out", "--work", singular).code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code="per-layer" in options)
    assert torch.isfinite(model(torch.arange(40)[None]).logits).all()
    found = a3("inspect", singular, "--json").json
    assert any("singular statistics in layer" in warning for warning in found["warnings"])
    assert found["layers"][1]["qk"]["singular"] or found["layers"][1]["ov"]["singular"]
    for layer, used in zip(found["layers"], per_layer, strict=True):
        assert {c: layer[c]["damping"] for c in used["damping"]} == used["damping"]
    assert "singular" in a3("inspect", singular).stdout


@pytest.mark.parametrize(
    ("singular", "raised"),
    [(duplicate_channels, [1]), (nothing, [0, 1])],
    indirect=["singular"],
    ids=["duplicate_channels", "nothing"],
)
def test_damping_is_raised_where_statistics_are_singular(singular, raised, a3):
    """Damping is raised only there; without a ridge, all of it is the minimum that a refit needs."""
    budgets = ("--attention-budget", 0.25, "--mlp-budget", 0.25)
    outcome = a3("solve", *budgets, *ROUNDING, "--ridge", 0, "--work", singular, "--json")
    found = a3("inspect", singular, "--json").json["layers"]
    for layer, described in enumerate(outcome.json["per_layer"]):
        for component in ("ov", "mlp"):
            damping = described["damping"][component]
            assert (damping > 0) == (layer in raised)
            assert found[layer][component]["damping"] == damping
            told = f"layer {layer}, {component.upper()}: singular statistics, damped by {damping:g}"
            assert (told in outcome.stderr) == (layer in raised)


@pytest.mark.parametrize(
    ("name", "component"),
    [
        *((name, "QK") for name in ("q_gram", "q_sum", "k_gram", "k_sum", "distance")),
        *((name, "OV") for name in ("v_gram", "v_sum", "o_gram", "o_sum", "attention_inverse")),
        *((name, "MLP") for name in ("mlp_gram", "mlp_energy", "x_sum", "mlp_inverse")),
        ("tokens", "layer 1:"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(name, component, value, work, a3):
    put_in_statistics(work, name, value)
    solution = json.loads((work / "solution" / "manifest.json").read_text())
    assert solution
    refused(a3("solve", "--budget", 0.25, *ROUNDING, "--overwrite", "--work", work), "layer 1", component, name, "NaN")


def test_statistics_of_an_earlier_version_are_refused(work, a3):
    path = work / "calibration" / "layer-001.safetensors"
    sums = load_file(path)
    del sums["mlp_inverse"]
    save_file(sums, path)
    reseal(path)
    told = "layer 1", "mlp_inverse", "run a3 calibrate --overwrite"
    outcome = a3("solve", "--budget", 0.25, *ROUNDING, "--overwrite", "--work", work)
    refused(outcome, *told)
    assert "--mlp-stats" not in outcome.stderr
