"""Qwen3.5: most layers have linear attention, the others a gate on its output. Attention is carried, the MLP is cut."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)

from a3cli.models import costs
from a3cli.models.checkpoint import Checkpoint
from a3cli.models.config import read_shape
from a3cli.models.model import describe
from a3cli.work.files import read_json
from tests.conftest import CONTEXT, SHORT, build_model, build_tokenizer, but, refused

pytestmark = pytest.mark.usefixtures("hasty")

NAME = "qwen3_5-hybrid"
LAYERS = {"num_hidden_layers": 4, "full_attention_interval": ...}  # the fourth without linear attention, as published
SOLVE = ("solve", "--budget", 0.15, "--mlp-multiple", 8)
WHY = "most layers have linear attention, and the others a gate on its output, so attention stays as it is"
STATISTICS = {"mlp_gram", "mlp_energy", "x_sum", "attention_inverse", "mlp_inverse", "tokens"}


@pytest.fixture
def source(checkpoint) -> Path:
    """Return the checkpoint. Do not write there."""
    return checkpoint(NAME, **LAYERS)


@pytest.fixture(scope="module")
def calibrated(checkpoint, text_file, tmp_path_factory) -> Path:
    """Return a work folder with a calibration. Copy it to solve there."""
    from a3cli.settings import CalibrateSettings, make_settings
    from a3cli.stages.calibrate import calibrate
    from a3cli.work.folder import Work

    folder = tmp_path_factory.mktemp("hybrid") / "work"
    text = {"dataset": str(text_file), "samples": 3, "seq_len": 32}
    settings = make_settings(CalibrateSettings, model=str(checkpoint(NAME, **LAYERS)), text=text)
    calibrate(settings, Work(folder), overwrite=False, progress=lambda **at: None)
    return folder


@pytest.fixture
def work(calibrated, tmp_path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "work"))


@pytest.mark.parametrize(
    "options",
    [("--sequential",), ("--method", "paper"), ("--shape", "per-layer", "--sequential", "--sensitivity", "probe")],
    ids=" ".join,
)
def test_the_mlp_is_cut_and_attention_is_carried(options, a3, work, source, tmp_path):
    out, place = tmp_path / "out", ("--work", work)
    solved = a3(*SOLVE, *options, *place, "--json")
    assert solved.code == 0, solved.stderr
    assert 0.15 <= solved.json["budget_reached"] < 0.2
    assert {(size["qk"], size["ov"]) for size in solved.json["sizes"]} == {(16, 16)}
    assert solved.json["predicted_loss"]["qk"] == solved.json["predicted_loss"]["ov"] == 0
    assert solved.json["rope_slots"] is None
    assert a3("export", out, *place).code == 0
    verified = a3("verify", out, *place, "--require-reference", "--trust-remote-code", "--json")
    assert verified.code == 0, verified.stdout
    assert {check["outcome"] for check in verified.json["checks"]} == {"passed"}
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, source))
    assert ours.keys() == theirs.keys()
    carried = [name for name in theirs if ".mlp." not in name]
    assert {name.split(".")[3] for name in carried if ".layers." in name} >= {"linear_attn", "self_attn"}
    assert all(torch.equal(ours[name], theirs[name]) for name in carried)
    assert any(ours[name].shape != theirs[name].shape for name in theirs)
    config, before = (read_json(folder / "config.json") for folder in (out, source))
    changed = {"intermediate_size", "per_layer_config", "auto_map", "architectures"}
    assert {key for key in config if config[key] != before.get(key)} <= changed


def test_costs_are_those_of_the_class(source):
    """A budget counts the weights of all linear layers; only the layer with full attention has a KV cache."""
    model, shape = build_model(NAME, **LAYERS), describe(Checkpoint(source)).shape
    linears = {name: each for name, each in model.model.layers.named_modules() if isinstance(each, torch.nn.Linear)}
    attention = sum(each.weight.numel() for name, each in linears.items() if ".mlp." not in name)
    assert costs.attention_weights(shape, shape.sizes) == attention
    assert costs.linear_weights(shape, shape.sizes) == sum(each.weight.numel() for each in linears.values())
    tokens = torch.randint(1, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        linear, *_, full = model(tokens, use_cache=True).past_key_values.layers
    held = full.keys.nbytes + full.values.nbytes
    assert costs.kv_bytes_per_token(shape, shape.sizes, 4) * 40 == held
    assert costs.kv_cache_bytes(shape, shape.sizes, 4, 40) == held
    state = linear.recurrent_states[0].numel()
    assert shape.carried_attention.state == 3 * state
    products = 2 * 2 * 40 * 4 * 16  # a multiplication and an addition, for scores and values, of four heads
    expected = 2 * sum(each.weight.numel() for each in linears.values()) + products + 3 * 6 * state
    assert costs.prefill_flops_per_token(shape, shape.sizes, 40) == expected


def test_layers_are_counted_from_types_or_from_the_interval(source):
    config = read_json(source / "config.json")
    shape = read_shape(SimpleNamespace(**config))
    assert shape == describe(Checkpoint(source)).shape
    types = config.pop("layer_types")
    assert types == ["linear_attention"] * 3 + ["full_attention"]
    assert read_shape(SimpleNamespace(**config)) == shape
    assert read_shape(SimpleNamespace(**config, full_attention_interval=2)) != shape
    types = [types[-1], *types[:-1]]
    assert read_shape(SimpleNamespace(**config, layer_types=types)) == shape


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--components", "qk"), ("--components qk: a3 cannot compress qk", "'qwen3_5_text'", WHY, "--components mlp")),
        (("--components", "ov", "--shape", "per-layer"), ("cannot compress ov", WHY, "--components mlp")),
        (("--kv-budget", 0.2), ("--kv-budget 0.2: a3 cannot compress attention", WHY)),
        (("--attention-budget", 0.2), ("--attention-budget 0.2: a3 cannot compress attention", WHY)),
        (("--budget", 0.6), ("mlp with MLP multiple 8 remove at most", WHY)),
        (("--context", 64), ("--context 64", "keeps its attention as it is; leave it out")),
    ],
    ids=lambda value: " ".join(map(str, value))[:24],
)
def test_what_would_change_attention_is_refused_with_the_reason(options, words, a3, work):
    outcome = a3(*but(SOLVE, *options), "--work", work)
    refused(outcome, *words)
    assert "--shape per-layer" not in outcome.stderr.replace("with --shape per-layer", "")  # which would not help


def test_statistics_are_of_the_mlp_alone(a3, calibrated, work, source, text_file, tmp_path):
    """Merged ones are sums, and their size is what a plan says."""
    text, other = tmp_path / "text.txt", tmp_path / "other"
    text.write_text(text_file.read_text("utf-8")[9000:])
    assert a3("calibrate", source, "--dataset", text, *SHORT, "--work", other).code == 0
    assert a3("stats", "merge", work, other, "--into", tmp_path / "merged").code == 0
    name = "calibration/layer-000.safetensors"
    one, two, both = (load_file(folder / name) for folder in (work, other, tmp_path / "merged"))
    assert one.keys() == both.keys() == STATISTICS
    assert all(torch.allclose(both[key], one[key] + two[key]) for key in both)
    assert a3(*SOLVE, "--work", tmp_path / "merged").code == 0
    planned = a3("plan", source, *SHORT, "--mlp-multiple", 8, "--json").json
    (size,) = {file.stat().st_size for file in (calibrated / "calibration").glob("layer-*")}
    assert planned["disk_bytes"]["statistics_per_layer"] < size < planned["disk_bytes"]["statistics_per_layer"] + 1000
    assert (planned["whole_heads"], planned["components"]) == (WHY, ["mlp"])
    assert planned["kv_cache"] == {"tokens": CONTEXT, "before": CONTEXT * 256, "after": CONTEXT * 256}


def test_nothing_is_said_of_heads_that_are_not_read(a3, work, tmp_path):
    out, html = tmp_path / "out", tmp_path / "report.html"
    before = a3("inspect", work, "--json").json
    assert a3(*SOLVE, "--work", work).code == 0
    assert a3("export", out, "--work", work).code == 0
    for found in (before, *(a3("inspect", folder, "--json").json for folder in (work, out))):
        assert not any(warning.startswith(("QK: ", "OV: ")) for warning in found["warnings"])
        for layer in found["layers"]:
            for part in (layer["qk"], layer["ov"]):
                assert part["full_size"] == 16
                assert (part["effective_rank"], part["tokens_per_dimension"]) == (None, None)
                assert part["bytes"] == {"before": None, "after": None}
            assert layer["mlp"]["bytes"]["before"] == 3 * 96 * 48 * 4
    for folder in (work, out):
        assert a3("inspect", folder).code == 0
        assert a3("report", folder, "--html", html).code == 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda t: t.pop("model.layers.1.linear_attn.A_log"),
            ("1 tensor is missing", "model.layers.1.linear_attn.A_log"),
        ),
        (
            lambda t: t.update({"model.layers.3.linear_attn.A_log": torch.ones(4)}),
            ("1 tensor is not known to this class", "model.layers.3.linear_attn.A_log"),
        ),
        (
            lambda t: t.update({"model.layers.3.self_attn.q_proj.weight": torch.ones(64, 48)}),
            ("model.layers.3.self_attn.q_proj.weight is [64, 48], config.json says [128, 48]",),
        ),
    ],
    ids=["missing", "unknown", "without its gate"],
)
def test_damaged_attention_is_refused_before_any_work(damage, words, a3, source, text_file, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    refused(a3("calibrate", folder, "--dataset", text_file, "--work", tmp_path / "work"), *words)


def test_a_model_without_a_kv_cache_is_refused(a3, source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    config = read_json(folder / "config.json")
    config["layer_types"] = ["linear_attention"] * 4
    (folder / "config.json").write_text(json.dumps(config))
    refused(a3("plan", folder), "a3 does not support qwen3_5_text with linear attention in every layer")


VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 48,  # that of the decoder
}
IMAGE = 5  # the token in place of a part of an image
FURTHER = {"mtp.fc.weight": (48, 96), "mtp.layers.0.mlp.gate_proj.weight": (96, 48)}  # of the head for further tokens


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the decoder inside its wrapper, with a vision tower, as published. Do not write there."""
    folder, decoder = tmp_path_factory.mktemp("hybrid") / "whole", build_model(NAME, **LAYERS)
    torch.manual_seed(1)
    model = Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=decoder.config.to_dict(), vision_config=VISION, image_token_id=IMAGE)
    )
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert {"model.language_model.layers.0.linear_attn.A_log", "model.visual.patch_embed.proj.weight"} <= tensors.keys()
    tensors |= {name: torch.randn(shape) for name, shape in FURTHER.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.inference_mode()
def test_its_wrapper_is_written_again(a3, whole, source, calibrated, text_file, tmp_path):
    out, place = tmp_path / "out", ("--work", tmp_path / "work")
    assert a3("calibrate", whole, "--dataset", text_file, *SHORT, *place).code == 0
    for layer in range(4):  # the same weights in a checkpoint of their own give the same bytes
        name = f"calibration/layer-{layer:03d}.safetensors"
        assert (tmp_path / "work" / name).read_bytes() == (calibrated / name).read_bytes()
    refused(a3(*SOLVE, "--shape", "per-layer", *place), "qwen3_5_text decoder of a 'qwen3_5' model", "--shape stock")
    assert a3(*SOLVE, *place).code == 0
    assert a3("export", out, *place).code == 0
    verified = a3("verify", out, *place, "--require-reference", "--json")
    assert verified.code == 0, verified.stdout
    assert {check["outcome"] for check in verified.json["checks"]} == {"passed"}

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, whole))
    assert ours.keys() == theirs.keys()
    changed = {name for name in theirs if ours[name].shape != theirs[name].shape}
    assert {".".join(name.split(".")[:3] + name.split(".")[4:]) for name in changed} == {
        f"model.language_model.layers.mlp.{each}_proj.weight" for each in ("gate", "up", "down")
    }
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs.keys() - changed)
    config, before = (read_json(folder / "config.json") for folder in (out, whole))
    own, was = config.pop("text_config"), before.pop("text_config")
    assert config == before
    assert {key for key in own if own[key] != was.get(key)} == {"intermediate_size"}

    small, full = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval() for folder in (out, whole)
    )
    alone = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**own)).eval()
    alone.load_state_dict(
        {name.replace("language_model.", ""): ours[name] for name in ours if "language_model" in name}
        | {"lm_head.weight": ours["lm_head.weight"]}
    )
    tokens = torch.randint(10, 250, (2, 60), generator=torch.Generator().manual_seed(7))
    logits = small(tokens).logits
    torch.testing.assert_close(logits, alone(tokens).logits, rtol=1e-4, atol=1e-4)
    assert (logits - full(tokens).logits).norm() > 1e-2 * logits.norm()
    image = {"pixel_values": torch.randn(16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    seen = [torch.cat(list(each.model.get_image_features(**image).pooler_output)) for each in (small, full)]
    assert torch.equal(*seen)
    texts = [small.generate(tokens, max_new_tokens=12, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*texts)


def test_nothing_removed_keeps_every_byte_of_the_wrapper(a3, whole, text_file, tmp_path):
    out, place = tmp_path / "out", ("--work", tmp_path / "work")
    for command in (("calibrate", whole, "--dataset", text_file, *SHORT), ("solve", "--budget", 0), ("export", out)):
        assert a3(*command, *place).code == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_its_wrapper_is_planned_and_evaluated(a3, whole, source, text_file):
    planned = a3("plan", whole, "--budget", 0.1, "--mlp-multiple", 8, "--json").json
    alone = a3("plan", source, "--budget", 0.1, "--mlp-multiple", 8, "--json").json
    for figure in ("components", "whole_heads", "budget_reached", "kv_cache", "prefill_flops_per_token", "mlp_width"):
        assert planned[figure] == alone[figure]
    loads = {each["runtime"]: each["loads"] for each in planned["runtimes"]}
    assert (loads["transformers 5"], loads["transformers 4.57"]) == ("yes", "no")
    ran = [a3("eval", folder, "--dataset", text_file, *SHORT, "--json") for folder in (whole, source)]
    assert ran[0].json["perplexity"] == pytest.approx(ran[1].json["perplexity"], rel=1e-4)
