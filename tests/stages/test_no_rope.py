"""QK without RoPE is the paper's exact theorem: the errors that a solution predicts are those of its export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from a3cli.models.families import FAMILIES
from a3cli.work.files import read_json
from tests.conftest import MODELS, SHORT, decoder_layers, family_of_row, refused
from tests.helpers.literal import truncate
from tests.helpers.no_rope import head_weights, layer_input

WITHOUT = [name for name in MODELS if not family_of_row(name).rotates]
CUT = ("--components", "qk", "--attention-budget", 0.2, "--head-multiple", 2, "--shape", "per-layer")


@pytest.fixture(scope="module")
def calibrated(checkpoint, text_file, tmp_path_factory):
    """Return the work folder of a calibrated model of the table. Copy it to solve there."""
    from a3cli.settings import CalibrateSettings, make_settings
    from a3cli.stages.calibrate import calibrate
    from a3cli.work.folder import Work
    from a3cli.work.progress import silent

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "work"
            text = {"dataset": str(text_file), "samples": 6, "seq_len": 60}
            settings = make_settings(CalibrateSettings, model=str(checkpoint(name)), text=text)
            calibrate(settings, Work(made[name]), overwrite=False, progress=silent)
        return made[name]

    return make


@pytest.fixture
def exported(calibrated, a3, tmp_path):
    """Solve and export with options in a copy of the work folder; return the solution's manifest and the export."""

    def run(name: str, *options: object) -> tuple[dict, Path]:
        work, out = shutil.copytree(calibrated(name), tmp_path / "work"), tmp_path / "out"
        solved = a3("solve", *CUT, *options, "--work", work, "--json")
        assert solved.code == 0, solved.stderr
        assert a3("export", out, "--work", work).code == 0
        return solved.json, out

    return run


def inputs_and_weights(source: Path, out: Path, layer: int) -> list[torch.Tensor]:
    """Return attention's input `[n, d + 1]` with a constant 1, and q and k `[heads, d + 1, ·]` of source and export.

    The bias is the last row of a weight. The export's layers are given what the source's get.
    """
    blocks = load_file(out.parent / "work" / "calibration" / "tokens.safetensors")["tokens"]
    full = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    small = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True).eval()
    x = layer_input(full, layer, blocks).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    return [x, *(head_weights(decoder_layers(model)[layer], role) for model in (full, small) for role in ("q", "k"))]


def score_energy(x: torch.Tensor, form: torch.Tensor) -> torch.Tensor:
    """Return `E (x A yᵀ)²` of forms `[heads, d, d]` over all pairs of tokens."""
    autocorrelation = x.T @ x / len(x)
    return ((autocorrelation @ form @ autocorrelation) * form).sum((-1, -2))


@pytest.mark.parametrize("method", ["paper", "best"])
@pytest.mark.parametrize("name", WITHOUT)
@torch.inference_mode()
def test_predicted_score_error_is_the_measured_one(name, method, exported, checkpoint, hasty):
    """Compare the scores of every token with every token, in each head."""
    solved, out = exported(name, "--method", method)
    smaller = 0
    for layer, size in enumerate(solved["sizes"]):
        x, *weights = inputs_and_weights(checkpoint(name), out, layer)
        full, small = ((x @ q) @ (x @ k).mT for q, k in (weights[:2], weights[2:]))
        measured = ((full - small).square().sum() / full.square().sum()).sqrt().item()
        predicted = solved["per_layer"][layer]["score_error"]["relative"]
        assert set(predicted) == {predicted[0]}  # the same at every distance
        assert predicted[0] == pytest.approx(measured, rel=2e-3, abs=1e-6)
        smaller += size["qk"] < 16
    assert smaller


@pytest.mark.parametrize("name", WITHOUT)
@torch.inference_mode()
def test_the_paper_s_method_is_its_literal_theorem(name, exported, checkpoint):
    """The form `W_q W_kᵀ` of every head is the best one of its rank: by SVD between square roots of `E[x xᵀ]`."""
    solved, out = exported(name, "--method", "paper")
    layer = next(i for i, size in enumerate(solved["sizes"]) if size["qk"] < 16)
    x, q, k, small_q, small_k = inputs_and_weights(checkpoint(name), out, layer)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    root, inverse = ((vectors * values.clamp_min(1e-12).pow(power)) @ vectors.T for power in (0.5, -0.5))
    literal = inverse @ truncate_each(root @ q @ k.mT @ root, solved["sizes"][layer]["qk"]) @ inverse
    found = small_q @ small_k.mT
    exact = q @ k.mT
    distance = score_energy(x, found - literal).sum() / score_energy(x, exact).sum()
    assert distance.sqrt() < 1e-4
    assert score_energy(x, found - exact).sum() > 1e-3 * score_energy(x, exact).sum()


def truncate_each(forms: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.stack([truncate(form, rank) for form in forms])


@pytest.mark.parametrize("name", WITHOUT)
def test_nothing_of_rope_is_written(name, exported):
    solved, out = exported(name, "--method", "paper")
    config = read_json(out / "config.json")
    assert solved["rope_slots"] is None
    assert not [key for key in config if "rope" in key or "rotary" in key or key == "head_dim"]
    sizes = {"qk_head_dim", "v_head_dim", "intermediate_size"}
    assert all(own.keys() == sizes for own in config["per_layer_config"].values())
    card = (out / "README.md").read_text("utf-8")
    assert "not rotated" in card
    assert "RoPE" not in card.replace("--rope-form", "")


@pytest.mark.parametrize("name", WITHOUT)
def test_the_stock_shape_keeps_heads_and_says_why(name, a3, calibrated, tmp_path):
    work = ("--work", shutil.copytree(calibrated(name), tmp_path / "work"))
    why = FAMILIES[MODELS[name][0].model_type].stock_heads
    refused(a3("solve", "--budget", 0.2, "--components", "qk,ov,mlp", *work), why)
    refused(a3("solve", "--attention-budget", 0.2, *work), why, "--shape per-layer")
    refused(a3("solve", "--budget", 0.2, "--shape", "per-layer", "--context", 64, *work), "--context 64", "no RoPE")


def test_mpt_has_no_stock_shape(a3, checkpoint, calibrated, tmp_path):
    work, why = shutil.copytree(calibrated("mpt-mha"), tmp_path / "work"), FAMILIES["mpt"].stock_heads
    for command in (("solve", "--budget", 0.2, "--work", work), ("plan", checkpoint("mpt-mha"))):
        refused(
            a3(*command), "--shape stock: a3 cannot compress anything of model_type 'mpt'", why, "--shape per-layer"
        )


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("opt-mha", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt-mha", {"word_embed_proj_dim": 32}, "word_embed_proj_dim 32"),
        ("gpt2-mha", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2-mha", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2-mha", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("mpt-mha", {"attn_config": {"clip_qkv": 6.0}}, "clip_qkv 6.0"),
        ("mpt-mha", {"attn_config": {"softmax_scale": 0.1}}, "softmax_scale 0.1"),
        ("mpt-mha", {"attn_config": {"alibi": False}}, "alibi"),
        ("mpt-mha", {"attn_config": {"qk_ln": True}}, "qk_ln"),
    ],
)
def test_variants_that_are_not_supported(name, changes, word, a3, checkpoint, text_file, tmp_path):
    folder = shutil.copytree(checkpoint(name), tmp_path / "source")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | changes))
    words = (f"does not support {config['model_type']} with", word)
    refused(a3("calibrate", folder, "--dataset", text_file, *SHORT, "--work", tmp_path / "work"), *words)
    refused(a3("plan", folder, "--shape", "per-layer"), *words)


@pytest.mark.slow
def test_a_published_gpt2(a3, checkpoint, text_file, tmp_path):
    """Without the decoder's prefix and an MLP width, and with buffers of the mask, which its class ignores."""
    folder, work = shutil.copytree(checkpoint("gpt2-mha", n_inner=None), tmp_path / "source"), tmp_path / "work"
    tensors = load_file(folder / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 256, 256).tril() for layer in (0, 1)}
    masks |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in (0, 1)}
    save_file(short | masks, folder / "model.safetensors")
    config = read_json(folder / "config.json")
    del config["n_inner"]
    (folder / "config.json").write_text(json.dumps(config))
    for command in (
        ("calibrate", folder, "--dataset", text_file, *SHORT),
        ("solve", "--budget", 0.2, "--head-multiple", 2, "--mlp-multiple", 8, "--method", "paper"),
        ("export", tmp_path / "out"),
        ("verify", tmp_path / "out", "--require-reference"),
    ):
        outcome = a3(*command, "--work", work)
        assert outcome.code == 0, outcome.stderr
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert read_json(tmp_path / "out" / "config.json")["n_inner"] < 256


@pytest.mark.parametrize("name", WITHOUT)
def test_the_reference_of_a_second_sweep_agrees_with_its_export(name, a3, calibrated, tmp_path, hasty):
    work, sizes = shutil.copytree(calibrated(name), tmp_path / "work"), ("--head-multiple", 2, "--mlp-multiple", 8)
    for command in (
        ("solve", "--budget", 0.25, "--shape", "per-layer", *sizes, "--sequential", "--batch-size", 3),
        ("export", tmp_path / "out"),
        ("verify", tmp_path / "out", "--require-reference", "--trust-remote-code"),
    ):
        outcome = a3(*command, "--work", work)
        assert outcome.code == 0, outcome.stderr
