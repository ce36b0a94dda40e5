"""The sequential correction equals literal ridge regressions on the finished model's own activations, and helps."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from a3cli.models import correction_costs
from a3cli.models.checkpoint import Checkpoint
from a3cli.models.families import LayerSizes
from a3cli.models.model import describe
from a3cli.stream import sequential
from a3cli.stream.post_norm import LEAST
from a3cli.stream.sequential import PULL
from a3cli.stream.side_by_side import DRIFT
from tests.conftest import carries_attention, gain_of, mlp_linears, post_norms, stream_reader

pytestmark = pytest.mark.usefixtures("hasty")

OPTIONS = ("--budget", 0.3, "--head-multiple", 2, "--mlp-multiple", 8)


def chain(
    a3, source: Path, text: Path, folder: Path, *options: object, rounds: int = 0, samples: int = 6
) -> dict[str, Path]:
    """Return the exports of one calibration, one-shot and corrected."""
    work = folder / "work"
    calibrated = a3("calibrate", source, "--dataset", text, "--samples", samples, "--seq-len", 60, "--work", work)
    assert calibrated.code == 0, calibrated
    one_shot = solved(a3, folder / "one-shot", *options, "--work", work)
    return {"one-shot": one_shot, "corrected": corrected(a3, folder / "corrected", rounds, *options, "--work", work)}


def solved(a3, out: Path, *options: object) -> Path:
    ran = [a3("solve", *options, "--overwrite"), a3("export", out, *options[-2:])]
    assert [outcome.code for outcome in ran] == [0] * 2, ran
    return out


def corrected(a3, out: Path, rounds: int, *options: object) -> Path:
    return solved(a3, out, "--sequential", "--refit-rounds", rounds, "--batch-size", 4, *options)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()


@torch.no_grad()
def activations(model: Any, blocks: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Return per layer, over all tokens: input, output, stream after attention, and the linear layers' inputs."""
    seen: list[dict[str, torch.Tensor]] = [{} for _ in model.model.layers]

    def keep(layer: int, name: str):
        return lambda _m, args: seen[layer].__setitem__(name, args[0].flatten(0, 1).double())

    def keep_output(layer: int):
        def hook(_m, _a, output):
            seen[layer]["output"] = (output[0] if isinstance(output, tuple) else output).flatten(0, 1).double()

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(keep(i, "input"))
        stream_reader(layer).register_forward_pre_hook(keep(i, "middle"))
        for name, norm in post_norms(layer).items():
            norm.register_forward_pre_hook(keep(i, f"behind_{name}"))
        if not carries_attention(model):
            layer.self_attn.o_proj.register_forward_pre_hook(keep(i, "o"))
        mlp_linears(layer)["down"].register_forward_pre_hook(keep(i, "down"))
        layer.register_forward_hook(keep_output(i))
    model.model(blocks, use_cache=False)
    return seen


def ridge_regression(x: torch.Tensor, target: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    gram = x.T @ x
    damped = gram + PULL * gram.trace() / len(x) * torch.eye(len(gram), dtype=torch.float64)
    return start.double() + torch.linalg.solve(damped, x.T @ (target - x @ start.double().T)).T


def behind_norm(norm: Any, output: torch.Tensor, drift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the target of a projection whose output is normalised, and the roots of its tokens' weights."""
    gain = gain_of(norm).double()
    damped = gain / (gain.square() + LEAST * gain.square().mean())
    target = output + drift * damped * (output.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return target, (target.square().mean(1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize("shape", ["stock", "per-layer"])
@pytest.mark.parametrize(
    "name",
    [
        "llama-gqa",
        "llama-gqa-bias",
        "mistral-gqa",
        "llama-longrope",
        "starcoder2-gqa",
        "nemotron-gqa",
        "granite-gqa",
        "qwen3-bias",
        "gemma3-gqa",
        "smollm3-bias",
        "phi3-window",
        "qwen3_5-hybrid",
    ],
)
def test_weights_are_the_literal_regressions(a3, checkpoint, text_file, tmp_path, name, shape):
    source = checkpoint(name)
    outs = chain(a3, source, text_file, tmp_path, *OPTIONS, "--shape", shape)
    blocks = load_file(tmp_path / "work" / "calibration" / "tokens.safetensors")["tokens"]
    check_regressions(source, outs, blocks)


def test_a_long_calibration_is_corrected_on_every_second_block(a3, checkpoint, text_file, tmp_path):
    """With more tokens than 32 for each channel of the MLP, half of them are enough."""
    source = checkpoint("llama-gqa")
    outs = chain(a3, source, text_file, tmp_path, *OPTIONS, samples=55)
    blocks = load_file(tmp_path / "work" / "calibration" / "tokens.safetensors")["tokens"]
    check_regressions(source, outs, blocks[::2])


def check_regressions(source: Path, outs: dict[str, Path], blocks: torch.Tensor) -> None:
    """Check that o and down are the ridge regressions on these blocks, which lower the drift."""
    one_shot, corrected = load(outs["one-shot"]), load(outs["corrected"])
    full, small = activations(load(source), blocks), activations(corrected, blocks)
    for f, s, before, after in zip(full, small, one_shot.model.layers, corrected.model.layers, strict=True):
        targets = {
            "o": f["middle"] - f["input"] + DRIFT * (f["input"] - s["input"]),
            "down": f["output"] - f["middle"] + DRIFT * (f["middle"] - s["middle"]),
        }
        modules = {"down": (mlp_linears(before)["down"], mlp_linears(after)["down"])}
        if not carries_attention(corrected):
            modules["o"] = (before.self_attn.o_proj, after.self_attn.o_proj)
        for role, (was, now) in modules.items():
            target, root = targets[role] / getattr(corrected.config, "residual_multiplier", 1.0), 1.0
            if norm := post_norms(after).get(role):
                drift = DRIFT * (f["input"] - s["input"] if role == "o" else f["middle"] - s["middle"])
                target, root = behind_norm(norm, f[f"behind_{role}"], drift)
            target = target if now.bias is None else target - now.bias.detach().double()
            expected = ridge_regression(s[role] * root, target * root, was.weight.detach())
            difference = (now.weight - expected).norm() / expected.norm()
            assert difference < 1e-3, role  # from float32 activations and an ill-conditioned Gram matrix
    drift = {
        kind: (activations(model, blocks)[-1]["output"] - full[-1]["output"]).norm()
        for kind, model in (("one-shot", one_shot), ("corrected", corrected))
    }
    assert drift["corrected"] < drift["one-shot"]


@pytest.mark.parametrize(
    "name",
    [
        "llama-gqa",
        "llama-gqa-bias",
        "mistral-gqa",
        "starcoder2-gqa",
        "starcoder2-window",
        "nemotron-gqa",
        "granite-gqa",
        "qwen3-gqa",
        "phi3-window",
    ],
)
def test_gate_and_up_are_fitted_too(a3, checkpoint, text_file, tmp_path, name):
    """The error of the first layer's MLP relative to its target falls when gate and up may change."""
    source, missed = checkpoint(name), {}
    outs = chain(a3, source, text_file, tmp_path, *OPTIONS)
    work = ("--work", tmp_path / "work")
    by_rounds = {0: outs["corrected"], 2: corrected(a3, tmp_path / "fitted", 2, *OPTIONS, *work)}
    blocks = load_file(tmp_path / "work" / "calibration" / "tokens.safetensors")["tokens"]
    full, one_shot = activations(load(source), blocks)[0], mlp_linears(load(outs["one-shot"]).model.layers[0])
    for rounds, out in by_rounds.items():
        model = load(out)
        small, fitted = activations(model, blocks)[0], mlp_linears(model.model.layers[0])
        target = full["output"] - full["middle"] + DRIFT * (full["middle"] - small["middle"])
        missed[rounds] = ((small["output"] - small["middle"] - target).norm() / target.norm()).item()
        for role in fitted.keys() - {"down"}:
            assert torch.equal(fitted[role].weight, one_shot[role].weight) == (rounds == 0), role
    assert missed[2] < 0.9 * missed[0]


@pytest.mark.parametrize(("samples", "parts"), [(6, [(1, 0), (1, 0)]), (110, [(3, 0), (3, 1)])])
def test_each_round_is_on_other_blocks(a3, checkpoint, text_file, tmp_path, monkeypatch, samples, parts):
    """Here the calibration is long enough for every sixth, that is every third of those of the sweep."""
    fitted, seen = sequential._Layer._fitted, []

    def record(layer, every, first):
        batches = fitted(layer, every, first)
        seen.append((every, first))
        blocks = len(range(first, layer.batching.blocks, every))
        assert sum(len(batch.x) for batch in batches) == 60 * blocks
        x = layer._mlp_data(*(file.read(first, 1) for file in layer._mlp_files))[1]
        torch.testing.assert_close(batches[0].x[:60], x.flatten(0, 1))
        return batches

    monkeypatch.setattr(sequential._Layer, "_fitted", record)
    chain(a3, checkpoint("llama-gqa"), text_file, tmp_path, *OPTIONS, rounds=2, samples=samples)
    assert seen == 2 * parts  # two layers


def test_tokens_are_left_out_only_where_many_remain():
    shape = SimpleNamespace(intermediate_size=100)
    expected = {100: (1, 1), 1000: (1, 1), 3199: (1, 3), 3200: (2, 1), 8000: (2, 4), 100_000: (2, 4)}
    for tokens, (corrected, fitted) in expected.items():
        assert correction_costs.corrected_every(shape, tokens, 1) == corrected
        assert correction_costs.fitted_every(shape, tokens, 1) == fitted


class Products(TorchDispatchMode):
    """Count the FLOPs of matrix products; torch's own counter supports neither `addmm_` nor attention on a CPU."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            q, k, v = args[:3]
            self.flops += 2 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("name", "rounds"), [("llama-gqa", 0), ("llama-gqa", 2), ("starcoder2-gqa", 2)])
def test_its_products_are_those_that_a_plan_counts(a3, checkpoint, text_file, tmp_path, name, rounds):
    source, work, samples = checkpoint(name, hidden_size=96, intermediate_size=192), tmp_path / "work", 128
    text = ("--dataset", text_file, "--samples", samples, "--seq-len", 60)
    assert a3("calibrate", source, *text, "--work", work).code == 0
    solve = ("solve", *OPTIONS, "--method", "paper", "--overwrite", "--num-processes", 1, "--json", "--work", work)
    counted = []
    for options in ((), ("--sequential", "--refit-rounds", rounds, "--batch-size", 8)):
        with Products() as products:
            solved = a3(*solve, *options).json
        counted.append(products.flops)
    shape = describe(Checkpoint(source)).shape
    flops = [
        correction_costs.sequential_flops(shape, LayerSizes(**size), rounds, samples, 60) for size in solved["sizes"]
    ]
    assert counted[1] - counted[0] == pytest.approx(sum(flops), rel=0.1)


def test_nothing_removed_stays_as_it_is(a3, checkpoint, text_file, tmp_path):
    source = checkpoint("llama-gqa")
    outs = chain(a3, source, text_file, tmp_path, "--budget", 0, rounds=1)
    tokens = torch.randint(250, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = load(source)(tokens).logits, load(outs["corrected"])(tokens).logits
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_per_layer_solution_keeps_to_its_budget(a3, checkpoint, text_file, tmp_path):
    """Sizes differ by layer; at least the budget is removed, and at most one step of the largest kind more."""
    source, work = checkpoint("llama-gqa"), tmp_path / "work"
    assert a3("calibrate", source, "--dataset", text_file, "--samples", 6, "--seq-len", 60, "--work", work).code == 0
    solved = a3("solve", *OPTIONS, "--shape", "per-layer", "--work", work, "--json").json
    assert 0.3 <= solved["budget_reached"] < 0.32
    assert len({tuple(sizes.values()) for sizes in solved["sizes"]}) > 1
    own = ("--attention-budget", 0.5, "--mlp-budget", 0, "--head-multiple", 2, "--shape", "per-layer")
    parts = a3("solve", *own, "--work", work, "--json", "--overwrite").json
    assert {sizes["mlp"] for sizes in parts["sizes"]} == {96}
    attention = [sizes["qk"] + sizes["ov"] for sizes in parts["sizes"]]
    assert sum(attention) <= 0.5 * len(attention) * 32
    assert a3("export", tmp_path / "out", "--work", work).code == 0
    refused = a3("eval", tmp_path / "out", "--dataset", text_file, "--seq-len", 60, "--samples", 2)
    assert refused.code == 2
    assert "--trust-remote-code" in refused.stderr
    one = ("eval", tmp_path / "out", "--against", source, "--dataset", text_file, "--seq-len", 60, "--samples", 2)
    assert a3(*one, "--trust-remote-code", "--json").json["kl"] > 0


def test_lower_context_is_written_and_a_longer_one_refused(a3, checkpoint, text_file, tmp_path):
    source, work = checkpoint("llama-gqa"), tmp_path / "work"
    assert a3("calibrate", source, "--dataset", text_file, "--samples", 6, "--seq-len", 60, "--work", work).code == 0
    said = "texts of up to 100 tokens"
    assert said in a3("solve", *OPTIONS, "--context", 100, "--work", work).stdout
    assert said in a3("export", tmp_path / "out", "--work", work).stdout
    assert said in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert load(tmp_path / "out").config.max_position_embeddings == 100
    refused = a3("solve", *OPTIONS, "--context", 100000, "--work", work, "--overwrite")
    assert refused.code == 2
    assert "longer than the context" in refused.stderr
