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
from a3cli.solvers.metric import metric_root
from a3cli.solvers.mlp import order_channels
from a3cli.solvers.moments import unpack_upper
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


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def calibration_blocks(work: Path) -> torch.Tensor:
    return load_file(work / "calibration" / "tokens.safetensors")["tokens"]


def found_energies(work: Path) -> list[dict[str, float]]:
    return json.loads((work / ENERGIES).read_text())["result"]["layers"]


def found_moments(work: Path, layer: int) -> torch.Tensor:
    """Return `E[g gᵀ]` of the stream after a layer's MLP, from the work folder."""
    packed = load_file(work / "gradients" / f"layer-{layer:03d}.safetensors")["moments"]
    return unpack_upper(packed.double(), int((2 * len(packed)) ** 0.5))


def literal_moments(model: Any, blocks: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Return `E[g gᵀ]` in every layer, by autograd through the whole stock model."""
    layers = decoder_layers(model)
    streams: dict[tuple[str, int], torch.Tensor] = {}
    for index, layer in enumerate(layers):
        reader = stream_reader(layer)
        reader.register_forward_pre_hook(lambda _m, args, i=index: streams.update({("attention", i): args[0]}))
        layer.register_forward_hook(
            lambda _m, _args, out, i=index: streams.update({("mlp", i): out if torch.is_tensor(out) else out[0]})
        )
    chances = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums: list[dict[str, Any]] = [{"attention": 0.0, "mlp": 0.0} for _ in layers]
    for block, chance in zip(blocks, chances, strict=True):
        likelihoods = model(block[None]).logits[0].log_softmax(-1)
        cumulated = likelihoods.detach().double().exp().cumsum(-1)
        drawn = (cumulated <= chance[:, None] * cumulated[:, -1:]).sum(-1)
        places = list(streams)
        gradients = torch.autograd.grad(likelihoods.gather(-1, drawn[:, None]).sum(), [streams[p] for p in places])
        for (component, index), gradient in zip(places, gradients, strict=True):
            rows = gradient.flatten(0, -2).double()
            sums[index][component] += rows.mT @ rows
    return [{c: total / blocks.numel() for c, total in each.items()} for each in sums]


@pytest.mark.parametrize(
    "name",
    ["llama-gqa", "gemma3-gqa", "olmo2-gqa", "granite-gqa", "mixtral-gqa", "opt-mha", "mpt-mha", "qwen3_5-hybrid"],
)
def test_moments_and_energies_equal_autograd_through_the_stock_model(a3, calibrated, name):
    source, work = calibrated(name)
    solved = a3(
        "solve", "--budget", 0.1, "--mlp-multiple", 8, "--components", "mlp", "--shape", "per-layer", "--work", work
    )
    assert solved.code == 0, solved.stderr
    blocks = -(-costs.GRADIENT_TOKENS // 60)
    expected = literal_moments(load(source), calibration_blocks(work)[:blocks])
    for layer, (found, wanted) in enumerate(zip(found_energies(work), expected, strict=True)):
        for stream, moments in wanted.items():
            assert found[stream] == pytest.approx(moments.diagonal().mean().item() / 2, rel=1e-3)
        tolerance = 1e-3 * wanted["mlp"].diagonal().mean().item()
        torch.testing.assert_close(found_moments(work, layer), wanted["mlp"], rtol=1e-3, atol=tolerance)
    files = {path.name for path in (work / "gradients").iterdir()}
    assert files == {"energies.json", *(f"layer-{layer:03d}.safetensors" for layer in range(len(expected)))}


@pytest.mark.parametrize(("direction", "tolerance"), [("any", 0.1), ("costly", 0.15), ("cheap", 0.15)])
def test_moments_predict_the_kl_of_a_small_error(direction, tolerance, a3, calibrated, monkeypatch):
    """An error of every token's stream: random, or in the direction on which the output depends most or least.

    Of these two, the moments of few tokens exaggerate how much and how little.
    """
    monkeypatch.setattr(costs, "GRADIENT_TOKENS", 2400)
    source, work = calibrated("llama-gqa", 40)
    assert a3(*SOLVE, "--work", work).code == 0
    model, blocks = load(source), calibration_blocks(work)
    layers, generator = decoder_layers(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = model(blocks).logits.double().log_softmax(-1)
        for index, layer in enumerate(layers):
            moments = found_moments(work, index)
            vectors = torch.linalg.eigh(moments).eigenvectors.float()
            error = torch.randn(*blocks.shape, model.config.hidden_size, generator=generator) * 1e-2
            if direction != "any":  # of one length, and of either sign
                error = error[..., :1].sign() * vectors[:, -1 if direction == "costly" else 0] * 0.05
            hook = layer.register_forward_hook(lambda _m, _args, out, e=error: out + e)  # a Llama layer's is a tensor
            after = model(blocks).logits.double().log_softmax(-1)
            hook.remove()
            measured = (before.exp() * (before - after)).sum().item() / blocks.numel()
            rows = error.double().flatten(0, -2)
            predicted = ((rows @ moments) * rows).sum().item() / (2 * blocks.numel())
            assert measured == pytest.approx(predicted, rel=tolerance)


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


def test_channels_are_selected_in_the_metric_of_the_moments(a3, calibrated):
    """As if the down projection were S W, with `SᵀS` the moments pulled towards the identity; without gradients W."""
    source, work = calibrated("llama-gqa")
    cut = ("solve", "--budget", 0.2, "--components", "mlp", "--mlp-multiple", 16, "--work", work)
    assert a3(*cut).code == 0
    assert a3(*cut, "--sensitivity", "residual", "--name", "plain").code == 0
    for index, layer in enumerate(decoder_layers(load(source))):
        statistics = load_file(work / "calibration" / f"layer-{index:03d}.safetensors")
        weight = layer.mlp.down_proj.weight.detach().double()
        gram = unpack_upper(statistics["mlp_gram"].double(), weight.shape[1]) / statistics["tokens"]
        root = metric_root(found_moments(work, index), min(6, -(-costs.GRADIENT_TOKENS // 60)) * 60)
        directed = order_channels(gram, root @ weight, block=1).order
        plain = order_channels(gram, weight, block=1).order
        orders = [
            json.loads((work / "channels" / f"layer-{index:03d}{kind}.json").read_text())["result"]["order"]
            for kind in ("-directed", "")
        ]
        assert orders == [directed.tolist(), plain.tolist()]
        assert orders[0] != orders[1]


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_changed_moments_are_computed_again(damage, a3, calibrated):
    _, work = calibrated("llama-gqa")
    assert a3(*SOLVE, "--work", work).code == 0
    file = work / "gradients" / "layer-001.safetensors"
    before = file.read_bytes()
    damage(file)
    outcome = a3(*SOLVE, "--work", work, "--overwrite")
    assert outcome.code == 0, outcome.stderr
    assert "layer-001.safetensors has changed since it was written; the gradients are computed again" in outcome.stderr
    assert file.read_bytes() == before


def test_drawn_tokens_follow_the_distribution():
    distribution = torch.tensor([0.5, 0.0, 0.25, 0.25])
    chances = torch.linspace(0, 1, 4001, dtype=torch.float64)[None, :-1]
    drawn = draw(distribution.expand(1, 4000, 4), chances)
    assert drawn.flatten().bincount(minlength=4).tolist() == [2000, 0, 1000, 1000]


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
