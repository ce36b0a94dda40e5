"""Probes measure the effect of zeroing one component of one layer on the whole model, once, and survive a kill."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from a3cli.solvers.qk import keep_pairs, score_pairs
from a3cli.stages import probe as module
from a3cli.stages.probe import plan_probes, weigh_curve
from tests.conftest import as_slots, can_cut, mlp_linears, turning_pairs
from tests.helpers.damage import flip

pytestmark = pytest.mark.usefixtures("hasty")

ROUNDING = ("--head-multiple", 4, "--mlp-multiple", 16)
PROBE = ("--sensitivity", "probe", "--probe-blocks", 3, "--probe-points", 2)


@pytest.fixture
def calibrated(a3, checkpoint, text_file, tmp_path):
    def calibrate(name: str) -> tuple[Path, Path]:
        source, work = checkpoint(name), tmp_path / "work"
        made = a3("calibrate", source, "--dataset", text_file, "--samples", 6, "--seq-len", 60, "--work", work)
        assert made.code == 0, made.stderr
        return source, work

    return calibrate


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def divergence(source: Any, other: Any, blocks: torch.Tensor) -> float:
    log_q, log_p = (model(blocks).logits.double().log_softmax(-1) for model in (source, other))
    return float((log_q.exp() * (log_q - log_p)).sum() / blocks.numel())


def zero_channels(model: Any, layer: int, statistics: dict[str, torch.Tensor], width: int) -> None:
    """Zero the channels that the paper's method drops, written out on the stock model."""
    down = mlp_linears(model.model.layers[layer])["down"].weight
    score = statistics["mlp_energy"] * down.double().square().sum(0)
    down[:, score.argsort(descending=True)[width:]] = 0


def zero_pairs(model: Any, layer: int, statistics: dict[str, torch.Tensor], rank: int) -> None:
    q_gram, k_gram = statistics["q_gram"], statistics["k_gram"]
    size = q_gram.shape[-1]
    turning = turning_pairs(model.config)
    dims = torch.view_as_real(as_slots(torch.arange(float(size)), turning)).long().mT.flatten()
    pairs = keep_pairs(score_pairs(q_gram[:, dims][..., dims], k_gram[:, dims][..., dims]).sum(0), rank // 2)
    dropped = torch.ones(size, dtype=torch.bool)
    dropped[dims[torch.cat([pairs, pairs + size // 2])]] = False
    key = model.model.layers[layer].self_attn.k_proj
    for part in (key.weight, key.bias):
        if part is not None:
            part.view(-1, size, *part.shape[1:])[:, dropped] = 0


@pytest.mark.parametrize(
    "name",
    [
        "llama-gqa",
        "llama-gqa-tied",
        "llama-gqa-bias",
        "mistral-gqa",
        "starcoder2-gqa",
        "nemotron-gqa",
        "granite-gqa",
        "smollm3-window",
        "qwen3-gqa",
    ],
)
def test_probes_equal_the_zeroed_stock_model(a3, calibrated, name):
    source, work = calibrated(name)
    options = ("--budget", 0.2, "--method", "paper", "--shape", "per-layer", "--batch-size", 2)
    solved = a3("solve", *options, *ROUNDING, *PROBE, "--work", work, "--json")
    assert solved.code == 0, solved.stderr
    blocks = load_file(work / "calibration" / "tokens.safetensors")["tokens"][:3]
    layers = json.loads((work / "probes" / "paper-per-layer.json").read_text())["result"]["layers"]
    of_qk, zeroing = ({"qk": [4, 12]}, {"qk": zero_pairs}) if can_cut(name, "qk", shape="per-layer") else ({}, {})
    for layer, found in enumerate(layers):
        assert {c: each["size"] for c, each in found.items()} == {**of_qk, "ov": [4, 12], "mlp": [16, 80]}
        statistics = load_file(work / "calibration" / f"layer-{layer:03d}.safetensors")
        for component, cut in {"mlp": zero_channels, **zeroing}.items():
            for size, measured in zip(*found[component].values(), strict=True):
                zeroed = load(source)
                with torch.no_grad():
                    cut(zeroed, layer, statistics, size)
                expected = divergence(load(source), zeroed, blocks)
                assert measured == pytest.approx(expected, rel=2e-3, abs=1e-7), (layer, component, size)


def test_smaller_sizes_hurt_more_and_full_ones_not_at_all(a3, calibrated):
    _, work = calibrated("llama-gqa")
    solved = a3("solve", "--budget", 0.2, *ROUNDING, *PROBE, "--work", work, "--json").json
    for found in json.loads((work / "probes" / "best-stock.json").read_text())["result"]["layers"]:
        for losses in (each["kl"] for each in found.values()):
            assert losses == sorted(losses, reverse=True)
            assert losses[-1] >= 0
    for layer in solved["per_layer"]:
        for curve in layer["curves"].values():
            assert curve["loss"][-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_measured_once_and_reused_by_every_later_budget(a3, calibrated, monkeypatch):
    _, work = calibrated("llama-gqa")
    assert a3("solve", "--budget", 0.2, *ROUNDING, *PROBE, "--work", work).code == 0
    kept = sorted(path.name for path in (work / "probes").iterdir())
    assert kept == ["best-stock.json"]
    monkeypatch.setattr(module, "_Sweep", None)  # measuring again would fail
    other = a3("solve", "--budget", 0.3, *ROUNDING, *PROBE, "--work", work, "--overwrite")
    assert other.code == 0, other.stderr
    monkeypatch.undo()
    more = (*PROBE[:-1], 3)  # other probe settings need another measurement
    assert a3("solve", "--budget", 0.3, *ROUNDING, *more, "--work", work, "--overwrite").code == 0
    finished = work / "probes" / "best-stock.json"
    assert json.loads(finished.read_text())["request"]["probe_points"] == 3
    monkeypatch.setattr(module, "versions", lambda: {"a3cli": "0.0"})  # the predicted curves may differ
    assert a3("solve", "--budget", 0.3, *ROUNDING, *more, "--work", work, "--overwrite").code == 0
    assert json.loads(finished.read_text())["request"]["versions"] == {"a3cli": "0.0"}


def test_predicted_losses_are_called_what_they_are(a3, calibrated, tmp_path):
    _, work = calibrated("llama-gqa")
    out, page = tmp_path / "out", tmp_path / "page.html"
    of_options = {
        "KL(source ‖ compressed) as probed": PROBE,
        "KL(source ‖ compressed) to second order": (),
        "squared error relative to the residual": ("--sensitivity", "residual"),
    }
    for unit, options in of_options.items():
        assert a3("solve", "--budget", 0.2, *ROUNDING, *options, "--work", work, "--overwrite").code == 0
        assert a3("export", out, "--work", work, "--overwrite").code == 0
        assert a3("report", out, "--html", page).code == 0
        for text in ((out / "README.md").read_text("utf-8"), page.read_text("utf-8")):
            assert unit[1:] in " ".join(text.split())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(("damage", "again"), [(None, [1]), (truncate, [0, 1]), (flip, [0, 1]), (Path.unlink, [0, 1])])
def test_goes_on_at_the_layer_where_it_stopped(damage, again, a3, calibrated, monkeypatch, tmp_path):
    """If a file that it needs has changed since it was written, it starts again from the beginning."""
    _, work = calibrated("llama-gqa")
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(work, undisturbed)
    options = ("solve", "--budget", 0.2, *ROUNDING, *PROBE)
    assert a3(*options, "--work", undisturbed).code == 0

    passed = []
    original = module._Sweep._pass

    def stop_in_layer_1(self, layer, *args):
        passed.append(layer)
        if layer == 1 and passed.count(1) == 1:
            raise KeyboardInterrupt
        return original(self, layer, *args)

    monkeypatch.setattr(module._Sweep, "_pass", stop_in_layer_1)
    assert a3(*options, "--work", work).code == 3
    if damage:
        damage(work / "probes" / "streams-1.bin")
    outcome = a3(*options, "--work", work)
    assert outcome.code == 0
    assert ("streams-1.bin has changed since it was written" in outcome.stderr) == (damage is not None)
    assert ("resuming at layer 2 of 2" in outcome.stderr) == (damage is None)
    assert passed == [0, 1, *again]
    for name in ("probes/best-stock.json", "solution/manifest.json"):
        assert (work / name).read_bytes() == (undisturbed / name).read_bytes()


def test_probed_points_span_every_allowed_size():
    curves = [{"qk": {4: 3.0, 8: 2.0, 12: 1.0, 16: 0.0}, "ov": {16: 0.0}, "mlp": dict.fromkeys(range(8, 97, 8), 1.0)}]
    probes = plan_probes(curves, 3)
    assert [(p.component, p.size) for p in probes if p.component == "qk"] == [("qk", 4), ("qk", 8), ("qk", 12)]
    assert not [p for p in probes if p.component == "ov"]  # nothing to choose
    assert [p.size for p in probes if p.component == "mlp"] == [8, 48, 88]
    assert [(p.component, p.size) for p in plan_probes(curves, 1)] == [("qk", 12), ("mlp", 72)]


def test_weighed_curve_meets_the_measurements():
    predicted = {4: 8.0, 8: 4.0, 12: 2.0, 16: 0.0}
    weighed = weigh_curve(predicted, {4: 4.0, 12: 4.0})
    assert weighed == {4: 4.0, 8: 4.0 * (0.5 + 2.0) / 2, 12: 4.0, 16: 0.0}
    assert weigh_curve(predicted, {}) == predicted
    dead = weigh_curve({4: 0.0, 8: 0.0, 16: 0.0}, {4: 1e-12, 8: -1e-12})
    assert max(dead.values()) == 0.0


def test_ratios_are_interpolated_and_constant_beyond_the_measurements():
    flat = dict.fromkeys((1, 2, 3, 4, 9), 1.0)
    assert weigh_curve(flat, {2: 1.0, 4: 3.0}) == {1: 1.0, 2: 1.0, 3: 2.0, 4: 3.0, 9: 3.0}
