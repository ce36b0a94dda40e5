"""The sweep equals an ordinary forward pass with hooks on the whole model, and resumes at any point."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from a3cli.models.checkpoint import Checkpoint
from a3cli.models.families import family_of
from a3cli.solvers.moments import LayerMoments, gram_blocks, pack_upper, unpack_upper
from tests.conftest import (
    MODELS,
    attention_of,
    by_token,
    carries_attention,
    decoder_layers,
    family_of_row,
    head_linears,
    mlp_linears,
    output_linear,
    post_norms,
    stream_reader,
)
from tests.helpers.experts import routed
from tests.helpers.statistics import calibration_files

SETTINGS = ("--samples", 6, "--seq-len", 80, "--batch-size", 4)


@torch.inference_mode()
def hooked_sums(folder, blocks):
    """Return each layer's Gram matrices from one plain forward over all blocks, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = decoder_layers(model)
    seen: list[dict[str, torch.Tensor]] = [{} for _ in layers]

    def keep(index, name, value):
        seen[index][name] = value.flatten(0, -2).double()

    def hook_attention(i, attention):
        for name, (linear, part) in head_linears(attention).items():
            heads = getattr(attention, f"{name}_norm", linear)
            heads.register_forward_hook(
                lambda m, a, out, i=i, name=name, part=part: keep(i, name, by_token(out, model)[..., part])
            )
        output_linear(attention)[0].register_forward_pre_hook(lambda m, a, i=i: keep(i, "o", a[0]))

    for i, layer in enumerate(layers):
        if not carries_attention(model):
            hook_attention(i, attention_of(layer))
        if family_of(model.config.model_type).experts:
            layer.mlp.experts.register_forward_pre_hook(lambda m, a, i=i: seen[i].update(routed=routed(m, a)))
        else:
            mlp_linears(layer)["down"].register_forward_pre_hook(lambda m, a, i=i: keep(i, "x", a[0]))
        stream_reader(layer).register_forward_pre_hook(lambda m, a, i=i: keep(i, "after_attention", a[0]))
        for name, norm in post_norms(layer).items():
            seen[i]["epsilon"] = model.config.rms_norm_eps
            norm.register_forward_pre_hook(lambda m, a, i=i, name=name: keep(i, f"behind_{name}", a[0]))
        layer.register_forward_hook(
            lambda m, a, out, i=i: keep(i, "after_mlp", out[0] if isinstance(out, tuple) else out)
        )
    model(blocks, use_cache=False)
    return seen


def weights(seen, projection):
    """Return what an error of a projection's output counts in the stream, by token `[n, 1]`."""
    behind = seen.get(f"behind_{projection}")
    return 1 if behind is None else 1 / (behind.square().mean(1, keepdim=True) + seen["epsilon"])


@pytest.mark.parametrize("name", MODELS)
def test_statistics_equal_those_of_a_plain_forward(name, a3, checkpoint, text_file, tmp_path, monkeypatch):
    """Run the MLP in pieces, with a smaller batch at the end."""
    monkeypatch.setattr("a3cli.stream.hooks.MLP_TOKENS", 150)
    folder, pieces, add_mlp = checkpoint(name), [], LayerMoments.add_mlp

    def noted(self, x, weights):
        pieces.append(len(x))
        add_mlp(self, x, weights)

    monkeypatch.setattr(LayerMoments, "add_mlp", noted)
    assert a3("calibrate", folder, "--dataset", text_file, *SETTINGS, "--work", tmp_path).code == 0
    blocks = load_file(tmp_path / "calibration" / "tokens.safetensors")["tokens"]
    layers = hooked_sums(folder, blocks)
    carried = family_of_row(name).carried_attention is not None
    whole = not family_of_row(name).mlp  # no module of its own, which could run in pieces
    expected = [320, 160] if whole else [150, 150, 20, 150, 10]
    assert pieces == expected * sum("x" in seen for seen in layers)
    for index, seen in enumerate(layers):
        stored = load_file(tmp_path / "calibration" / f"layer-{index:03d}.safetensors")
        assert stored["tokens"].item() == blocks.numel()
        if carried:
            assert stored.keys() == {"mlp_gram", "mlp_energy", "x_sum", "attention_inverse", "mlp_inverse", "tokens"}
        else:
            check_heads(stored, seen)
        if "routed" in seen:
            check_experts(stored, seen["routed"])
        else:
            x = seen["x"] * weights(seen, "down")
            close(unpack_upper(stored["mlp_gram"], x.shape[1]), seen["x"].T @ x)
            close(stored["mlp_energy"], (seen["x"] * x).sum(0))
            close(stored["x_sum"], seen["x"].sum(0))
        close(stored["attention_inverse"], (1 / seen["after_attention"].square().sum(-1)).sum())
        close(stored["mlp_inverse"], (1 / seen["after_mlp"].square().sum(-1)).sum())


def check_experts(stored, experts):
    """Check each expert's sums, in which a token has its routing weight."""
    assert stored["expert_tokens"].tolist() == [len(each.x) for each in experts]
    assert all(len(each.x) for each in experts)
    for packed, energy, each in zip(stored["mlp_gram"], stored["mlp_energy"], experts, strict=True):
        close(unpack_upper(packed, each.x.shape[1]), each.weighted.T @ each.weighted)
        close(energy, each.weighted.square().sum(0))


def check_heads(stored, seen):
    """Check the sums of queries, keys, values and the input of the output projection."""
    for part in "qkv":
        heads = seen[part].unflatten(1, (-1, 16)).transpose(0, 1)
        close(stored[f"{part}_gram"], heads.mT @ heads)
        close(stored[f"{part}_sum"], heads.sum(1))
    o = seen["o"] * weights(seen, "o")
    close(unpack_upper(stored["o_gram"], o.shape[1]), seen["o"].T @ o)
    close(stored["o_sum"], seen["o"].sum(0))
    assert ("o_weight" in stored) == ("behind_o" in seen)
    if "behind_o" in seen:
        close(stored["o_weight"], weights(seen, "o").sum())


def test_fewer_tokens_than_channels_are_solved_or_refused_in_one_line(a3, checkpoint, text_file, tmp_path):
    work = ("--work", tmp_path / "work")
    few = ("--samples", 1, "--seq-len", 40)
    assert a3("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *few, *work).code == 0
    options = ("--budget", 0.25, "--mlp-multiple", 8, "--head-multiple", 2)
    for ridge in (1e-6, 1e-2):
        outcome = a3("solve", *options, "--ridge", ridge, "--overwrite", *work)
        assert outcome.code == 0 or "--ridge" in outcome.stderr
    assert outcome.code == 0


@pytest.mark.parametrize(
    "name",
    [
        "llama-gqa",
        "llama-yarn",
        "mistral-gqa",
        "starcoder2-gqa",
        "nemotron-gqa",
        "granite-gqa",
        "qwen3-window",
        "smollm3-bias",
        "gemma3-gqa",
        "phi3-window",
        "ministral3-gqa",
    ],
)
def test_attention_mass_is_that_of_the_models_own_attention(name, a3, checkpoint, text_file, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = checkpoint(name)
    assert a3("calibrate", folder, "--dataset", text_file, *SETTINGS, "--work", tmp_path).code == 0
    blocks = load_file(tmp_path / "calibration" / "tokens.safetensors")["tokens"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        attentions = model(blocks, output_attentions=True).attentions
    rows = [round(79 * i / 8) for i in range(1, 9)]
    for index, weights in enumerate(attentions):
        expected = torch.zeros(80, dtype=torch.float64)
        for row in rows:
            for key in range(row + 1):
                expected[row - key] += weights[:, :, row, key].sum()
        stored = load_file(tmp_path / "calibration" / f"layer-{index:03d}.safetensors")
        close(stored["distance"], expected)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ((ours.double() - theirs).norm() / theirs.norm()).item() < 1e-5


def test_diagonal_statistics_are_enough_for_the_paper(a3, checkpoint, text_file, tmp_path):
    solutions = []
    for kind in ("full", "diagonal"):
        work = tmp_path / kind
        source = checkpoint("llama-gqa")
        assert a3("calibrate", source, "--dataset", text_file, *SETTINGS, "--mlp-stats", kind, "--work", work).code == 0
        options = ("--method", "paper", "--head-multiple", 2, "--mlp-multiple", 8)
        assert a3("solve", "--budget", 0.25, *options, "--work", work).code == 0
        solutions.append(load_file(work / "solution" / "layer-000.safetensors"))
    refused = a3("solve", "--budget", 0.25, "--mlp-multiple", 8, "--overwrite", "--work", tmp_path / "diagonal")
    assert refused.code == 2
    assert "mlp_gram" in refused.stderr
    assert "--mlp-stats full" in refused.stderr
    swept = a3("pareto", "--budgets", "0.1,0.2", *options[2:], "--work", tmp_path / "diagonal", "--json").json
    assert {point["variant"] for point in swept["points"]} == {"paper"}
    assert "mlp_gram" not in load_file(tmp_path / "diagonal" / "calibration" / "layer-000.safetensors")
    assert all(torch.equal(solutions[0][key], solutions[1][key]) for key in solutions[0])


def test_each_weight_is_read_once(a3, checkpoint, text_file, tmp_path, monkeypatch):
    reads: Counter[str] = Counter()
    read = Checkpoint.read

    def counting(self, tensor):
        reads[tensor] += 1
        return read(self, tensor)

    monkeypatch.setattr(Checkpoint, "read", counting)
    folder = checkpoint("llama-gqa")
    assert a3("calibrate", folder, "--dataset", text_file, *SETTINGS, "--work", tmp_path).code == 0
    assert set(reads.values()) == {1}
    assert set(reads) == {
        name for name in Checkpoint(folder).tensors if name not in ("lm_head.weight", "model.norm.weight")
    }


@pytest.mark.parametrize("layer", [0, 1])
def test_interrupted_in_a_layer_it_goes_on_there_with_the_same_bytes(
    layer, a3, checkpoint, text_file, tmp_path, monkeypatch
):
    from a3cli.cli.progress import SweepProgress

    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *SETTINGS, "--work")
    assert a3(*command, tmp_path / "whole").code == 0
    layers_run = []
    plain = SweepProgress.__call__

    def interrupting(self, **at):
        if "layer" in at:
            layers_run.append(at["layer"])
        if at.get("layer") == layer and len(layers_run) <= 2 * layer + 1:
            raise KeyboardInterrupt
        plain(self, **at)

    monkeypatch.setattr(SweepProgress, "__call__", interrupting)
    assert a3(*command, tmp_path / "cut").code == 3
    assert not (tmp_path / "cut" / "calibration" / "manifest.json").exists()
    layers_run.clear()
    layers_run += [-1] * 9
    assert a3(*command, tmp_path / "cut").code == 0
    assert min(layers_run[9:]) == layer
    assert calibration_files(tmp_path / "cut") == calibration_files(tmp_path / "whole")


@pytest.mark.slow
def test_killed_it_goes_on_with_the_same_bytes(a3, checkpoint, text_file, tmp_path):
    """Send SIGKILL to a real process once its first layer is on disk."""
    folder = checkpoint("llama-gqa", num_hidden_layers=24)
    arguments = [str(part) for part in ("calibrate", folder, "--dataset", text_file, "--samples", 8, "--seq-len", 80)]
    work = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, "-m", "a3cli", *arguments, "--work", str(work)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (work / "calibration" / "layer-000.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (work / "calibration" / "manifest.json").exists()
    assert a3(*arguments, "--work", work).code == 0
    assert a3(*arguments, "--work", tmp_path / "whole").code == 0
    assert calibration_files(work) == calibration_files(tmp_path / "whole")


def test_packed_triangle_round_trips():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(7, 7, generator=generator)
    matrix = matrix + matrix.T
    packed = pack_upper(matrix)
    assert packed.shape == (28,)
    assert torch.equal(unpack_upper(packed, 7), matrix)


def test_gram_blocks_are_the_diagonal_blocks():
    matrix = torch.arange(36.0).view(6, 6)
    assert torch.equal(gram_blocks(matrix, 3)[1], matrix[2:4, 2:4])
