"""A norm between a projection and the residual sum: predicted losses are those of the stream behind it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from a3cli.models.families import FAMILIES
from tests.conftest import MODELS as ALL
from tests.conftest import build_model, gain_of, mlp_linears, post_norms, refused

MODELS = ["gemma2-gqa", "gemma3-gqa", "olmo2-gqa"]
STEP = 1e-3  # of the change of a weight: norms round to float32, and only the first order is wanted


def smaller_weight(solution, linear, component):
    """Return a solution's down or output projection for the source's channels or values, float64."""
    if component == "mlp":
        weight = torch.zeros_like(linear.weight)
        weight[:, solution["channels"]] = solution["down_weight"].double()
        return weight
    maps = solution["value_map"].double().repeat_interleave(4 // len(solution["value_map"]), 0)
    return solution["output_weight"].double() @ torch.block_diag(*maps).mT


def stream_behind(norm, model, blocks):
    """Return what a norm adds to the stream, `[tokens, d]`."""
    kept = []
    handle = norm.register_forward_hook(lambda _m, _a, out: kept.append(out.flatten(0, 1)))
    model(blocks)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("component", ["mlp", "ov"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_predicted_loss_is_the_change_of_the_stream(name, component, a3, checkpoint, text_file, tmp_path):
    """To first order, and but for what is along the output: take a small step towards the solution's projection."""
    source, work = checkpoint(name), tmp_path / "work"
    text = ("--dataset", text_file, "--samples", 8, "--seq-len", 60)
    assert a3("calibrate", source, *text, "--work", work).code == 0
    cut = ("--mlp-budget", 0.5) if component == "mlp" else ("--attention-budget", 0.2)
    options = ("--shape", "per-layer", "--mlp-multiple", 8, "--head-multiple", 2, "--sensitivity", "residual")
    solved = a3("solve", *cut, "--components", component, *options, "--work", work, "--json").json
    curve = solved["per_layer"][0]["curves"][component]
    predicted = curve["loss"][curve["size"].index(solved["sizes"][0][component])]
    stored = load_file(work / "calibration" / "layer-000.safetensors")
    blocks = load_file(work / "calibration" / "tokens.safetensors")["tokens"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    layer = model.model.layers[0]
    linear = mlp_linears(layer)["down"] if component == "mlp" else layer.self_attn.o_proj
    norm = post_norms(layer)["down" if component == "mlp" else "o"]
    change = smaller_weight(load_file(work / "solution" / "layer-000.safetensors"), linear, component) - linear.weight

    seen = []
    hook = linear.register_forward_hook(lambda _m, args, output: seen.extend([args[0], output]))
    before = stream_behind(norm, model, blocks)
    hook.remove()
    linear.weight += STEP * change
    moved = (stream_behind(norm, model, blocks) - before) / STEP

    x, output = (each.flatten(0, 1) for each in seen)
    wrong, gain = x @ change.mT, gain_of(norm).double()
    mean = output.square().mean(1, keepdim=True) + model.config.rms_norm_eps
    along = output * (output * wrong).mean(1, keepdim=True) / mean
    weighted, exact = wrong * gain / mean.sqrt(), (wrong - along) * gain / mean.sqrt()
    assert (moved - exact).norm() < 0.02 * exact.norm()  # some norms compute in float32
    inverse = stored["mlp_inverse" if component == "mlp" else "attention_inverse"].item()
    energy = stored["tokens"].item() ** 2 / inverse
    counted = weighted.square().sum().item() / energy
    if component == "mlp":
        assert predicted == pytest.approx(counted, rel=1e-3)
    else:  # joint refits over all heads only help
        assert 0.3 * predicted < counted <= predicted * (1 + 1e-3)
    assert 1 <= weighted.square().sum() / moved.square().sum() < 2
    assert wrong.square().sum().item() / energy != pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_the_mlp_has_no_bias_behind_which_tokens_would_have_to_be_weighted(name):
    family = FAMILIES[ALL[name][0].model_type]
    layer = build_model(name, attention_bias=True).model.layers[0]
    assert family.post_norms.keys() == {"o", "down"}
    assert mlp_linears(layer)["down"].bias is None
    for role, norm in post_norms(layer).items():
        assert layer.get_submodule(family.post_norms[role]) is norm


def test_a_model_that_sees_what_comes_after_a_token_is_refused(a3, checkpoint, text_file, tmp_path):
    folder = shutil.copytree(checkpoint("gemma3-gqa"), tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_bidirectional_attention": True}))
    outcome = a3("calibrate", folder, "--dataset", text_file, "--work", tmp_path / "work")
    refused(outcome, "config.json", "gemma3_text", "attention to later tokens")


def test_weights_of_samples_are_merged_with_them(a3, checkpoint, text_file, tmp_path):
    text = ("--dataset", text_file, "--samples", 3, "--seq-len", 40)
    for seed in (0, 1):
        work = ("--seed", seed, "--work", tmp_path / str(seed))
        assert a3("calibrate", checkpoint("gemma2-gqa"), *text, *work).code == 0
    assert a3("stats", "merge", tmp_path / "0", tmp_path / "1", "--into", tmp_path / "both").code == 0
    parts = [load_file(tmp_path / each / "calibration" / "layer-001.safetensors") for each in ("0", "1", "both")]
    assert torch.equal(parts[2]["sample_weight"], torch.cat([part["sample_weight"] for part in parts[:2]]))
    torch.testing.assert_close(parts[2]["o_weight"], parts[0]["o_weight"] + parts[1]["o_weight"])
