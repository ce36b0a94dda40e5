"""Losses are converted to KL by the energy of the stream's gradient, found in a sweep that survives a kill."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from a3cli.models import costs
from a3cli.stages import gradients as module
from a3cli.stream.backward import draw
from tests.conftest import decoder_layers, stream_reader
from tests.helpers.damage import flip

pytestmark = pytest.mark.usefixtures("hasty")

SOLVE = ("solve", "--budget", 0.2, "--head-multiple", 4, "--mlp-multiple", 16, "--method", "paper")
ENERGIES = "gradients/energies.json"


@pytest.fixture
def calibrated(a3, checkpoint, text_file, tmp_path):
    def calibrate(name: str, samples: int = 6) -> tuple[Path, Path]:
        source, work = checkpoint(name), tmp_path / "work"
        made = a3("calibrate", source, "--dataset", text_file, "--samples", samples, "--seq-len", 60, "--work", work)
        assert made.code == 0, made.stderr
        return source, work

    return calibrate


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def calibration_blocks(work: Path) -> torch.Tensor:
    return load_file(work / "calibration" / "tokens.safetensors")["tokens"]


def found_energies(work: Path) -> list[dict[str, float]]:
    return json.loads((work / ENERGIES).read_text())["result"]["layers"]


def literal_energies(model: Any, blocks: torch.Tensor) -> list[dict[str, float]]:
    """Return ½ E‖g‖² / d in every layer, by autograd through the whole stock model."""
    layers = decoder_layers(model)
    streams: dict[tuple[str, int], torch.Tensor] = {}
    for index, layer in enumerate(layers):
        reader = stream_reader(layer)
        reader.register_forward_pre_hook(lambda _m, args, i=index: streams.update({("attention", i): args[0]}))
        layer.register_forward_hook(
            lambda _m, _args, out, i=index: streams.update({("mlp", i): out if torch.is_tensor(out) else out[0]})
        )
    chances = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = [{"attention": 0.0, "mlp": 0.0} for _ in layers]
    for block, chance in zip(blocks, chances, strict=True):
        likelihoods = model(block[None]).logits[0].log_softmax(-1)
        cumulated = likelihoods.detach().double().exp().cumsum(-1)
        drawn = (cumulated <= chance[:, None] * cumulated[:, -1:]).sum(-1)
        places = list(streams)
        gradients = torch.autograd.grad(likelihoods.gather(-1, drawn[:, None]).sum(), [streams[p] for p in places])
        for (component, index), gradient in zip(places, gradients, strict=True):
            sums[index][component] += gradient.square().sum().item()
    width = streams["mlp", 0].shape[-1]
    return [{c: total / (2 * blocks.numel() * width) for c, total in each.items()} for each in sums]


@pytest.mark.parametrize(
    "name",
    ["llama-gqa", "gemma3-gqa", "olmo2-gqa", "granite-gqa", "mixtral-gqa", "opt-mha", "mpt-mha", "qwen3_5-hybrid"],
)
def test_energies_equal_autograd_through_the_stock_model(a3, calibrated, name):
    source, work = calibrated(name)
    solved = a3(
        "solve", "--budget", 0.1, "--mlp-multiple", 8, "--components", "mlp", "--shape", "per-layer", "--work", work
    )
    assert solved.code == 0, solved.stderr
    assert [path.name for path in (work / "gradients").iterdir()] == ["energies.json"]
    blocks = -(-costs.GRADIENT_TOKENS // 60)
    expected = literal_energies(load(source), calibration_blocks(work)[:blocks])
    for found, wanted in zip(found_energies(work), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3)


def test_energy_predicts_the_kl_of_a_small_error(a3, calibrated, monkeypatch):
    """An error of every token's stream, in a direction that has nothing to do with the model's gradients."""
    monkeypatch.setattr(costs, "GRADIENT_TOKENS", 2400)
    source, work = calibrated("llama-gqa", 40)
    assert a3(*SOLVE, "--work", work).code == 0
    model, blocks = load(source), calibration_blocks(work)
    layers, generator = decoder_layers(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = model(blocks).logits.double().log_softmax(-1)
        for index, layer in enumerate(layers):
            error = torch.randn(*blocks.shape, model.config.hidden_size, generator=generator) * 1e-2
            hook = layer.register_forward_hook(lambda _m, _args, out, e=error: out + e)  # a Llama layer's is a tensor
            after = model(blocks).logits.double().log_softmax(-1)
            hook.remove()
            measured = (before.exp() * (before - after)).sum().item() / blocks.numel()
            predicted = found_energies(work)[index]["mlp"] * error.double().square().sum().item() / blocks.numel()
            assert measured == pytest.approx(predicted, rel=0.1)


def test_curves_and_energies_of_a_solution_are_in_nats(a3, calibrated):
    _, work = calibrated("llama-gqa")
    by_length = a3(*SOLVE, "--sensitivity", "residual", "--work", work, "--json").json
    by_gradient = a3(*SOLVE, "--work", work, "--overwrite", "--json").json
    for index, (energies, old, new) in enumerate(
        zip(found_energies(work), by_length["per_layer"], by_gradient["per_layer"], strict=True)
    ):
        statistics = load_file(work / "calibration" / f"layer-{index:03d}.safetensors")
        for component, stream in (("qk", "attention"), ("ov", "attention"), ("mlp", "mlp")):
            factor = energies[stream] / (statistics[f"{stream}_inverse"] / statistics["tokens"]).item()
            losses = [factor * loss for loss in old["curves"][component]["loss"]]
            assert new["curves"][component]["loss"] == pytest.approx(losses, rel=1e-4)
            assert new["energy"][component] == pytest.approx(factor * old["energy"][component], rel=1e-4)


def test_drawn_tokens_follow_the_distribution():
    distribution = torch.tensor([0.5, 0.0, 0.25, 0.25])
    chances = torch.linspace(0, 1, 4001, dtype=torch.float64)[None, :-1]
    drawn = draw(distribution.expand(1, 4000, 4), chances)
    assert drawn.flatten().bincount(minlength=4).tolist() == [2000, 0, 1000, 1000]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("stopped", ["_forward", "_from_logits", "_backward"])
@pytest.mark.parametrize("damage", [None, truncate, flip, Path.unlink])
def test_goes_on_at_the_pass_where_it_stopped(damage, stopped, a3, calibrated, monkeypatch, tmp_path):
    """If a file that it needs has changed since it was written, it starts again from the beginning."""
    _, work = calibrated("llama-gqa")
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(work, undisturbed)
    assert a3(*SOLVE, "--work", undisturbed).code == 0

    calls = dict.fromkeys(("_forward", "_from_logits", "_backward"), 0)
    limit = {"_forward": 2, "_from_logits": 1, "_backward": 2}[stopped]  # the call that is interrupted

    def counted(name: str) -> Any:
        original = getattr(module._Sweep, name)

        def call(self: Any, *args: Any) -> Any:
            calls[name] += 1
            if name == stopped and calls[name] == limit:
                raise KeyboardInterrupt
            return original(self, *args)

        return call

    for name in calls:
        monkeypatch.setattr(module._Sweep, name, counted(name))
    assert a3(*SOLVE, "--work", work).code == 3
    if damage:
        damage(work / "gradients" / "states-001.bin")
    outcome = a3(*SOLVE, "--work", work)
    assert outcome.code == 0, outcome.stderr
    assert ("states-001.bin has changed since it was written" in outcome.stderr) == (damage is not None)
    assert ("resuming after" in outcome.stderr) == (damage is None)
    if damage is None:
        assert calls == {"_forward": 2, "_from_logits": 1, "_backward": 2} | {stopped: limit + 1}
    for name in (ENERGIES, "solution/manifest.json"):
        assert (work / name).read_bytes() == (undisturbed / name).read_bytes()


def test_computed_once_for_all_budgets_and_methods(a3, calibrated, monkeypatch):
    _, work = calibrated("llama-gqa")
    assert a3(*SOLVE, "--work", work).code == 0
    monkeypatch.setattr(module, "_Sweep", None)  # computing again would fail
    assert a3(*SOLVE, "--shape", "per-layer", "--work", work, "--overwrite").code == 0
    assert a3("solve", "--budget", 0.1, "--components", "mlp", "--work", work, "--overwrite").code == 0


def test_a_gradient_that_is_not_finite_is_refused(a3, calibrated, monkeypatch):
    _, work = calibrated("llama-gqa")
    monkeypatch.setattr(module, "gradient_of_likelihood", lambda _logits, states, _chances: states * torch.inf)
    outcome = a3(*SOLVE, "--work", work)
    assert outcome.code == 2
    assert "layer 1: the gradient is not finite; compute in a wider type (--dtype float32)" in outcome.stderr
    assert not (work / ENERGIES).exists()
    assert not (work / "solution").exists()
