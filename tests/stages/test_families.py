"""A family's definition determines which components may be compressed and which tensors are carried."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from a3cli import compress
from a3cli.errors import A3Error
from a3cli.models.families import FAMILIES
from a3cli.models.families.llama import FAMILY as LLAMA
from a3cli.settings import CalibrateSettings, make_settings
from a3cli.stages.calibrate import calibrate
from a3cli.work.files import read_json
from a3cli.work.folder import Work
from a3cli.work.progress import silent
from tests.conftest import SHORT, SOLVE, but, refused

pytestmark = pytest.mark.usefixtures("hasty")


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
    named = ("--shape", shape, "--components", "qk,ov,mlp")
    refused(a3(*command, *named), "qk and ov", "'llama'", f"--shape {shape}", "--components mlp")
    other = "per-layer" if shape == "stock" else "stock"
    for allowed in (("--shape", shape, "--components", "mlp"), ("--shape", other, "--method", "paper")):
        outcome = a3(*command, *allowed)
        assert outcome.code == 0, outcome.stderr


@pytest.mark.parametrize("shape", ["stock", "per-layer"])
def test_by_default_solve_cuts_what_the_family_allows(shape, limited, a3, work):
    """The recorded settings name the components, as if they had been given."""
    limited(stock_components=("mlp",), per_layer_components=("ov", "mlp"))
    command = (*SOLVE, "--method", "paper", "--shape", shape, "--overwrite", "--json", "--work", work)
    found, allowed = a3(*command).json, ["mlp"] if shape == "stock" else ["ov", "mlp"]
    assert found["request"]["settings"]["components"] == allowed
    again = a3(*command, "--components", ",".join(allowed)).json
    assert again["sha256"] == found["sha256"]


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


def test_a_divisor_of_logits_is_also_the_factor_that_vllm_reads(a3, checkpoint, text_file, tmp_path):
    work, out = ("--work", tmp_path / "work"), tmp_path / "out"
    assert a3("calibrate", checkpoint("granite-gqa"), "--dataset", text_file, *SHORT, *work).code == 0
    assert a3("solve", "--budget", 0, "--shape", "per-layer", *work).code == 0
    assert a3("export", out, *work).code == 0
    config = read_json(out / "config.json")
    assert config["logit_scale"] * config["logits_scaling"] == 1


@pytest.mark.parametrize("name", ["attention_multiplier", "residual_multiplier"])
def test_a_multiplier_must_be_above_zero(name, a3, checkpoint, text_file, tmp_path):
    folder = shutil.copytree(checkpoint("granite-gqa"), tmp_path / "source")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, name: 0.0}))
    refused(a3("calibrate", folder, "--dataset", text_file, "--work", tmp_path / "work"), f"{name} is 0.0", "above 0")


# Norms on query and key heads


def calibrated(name, checkpoint, text_file, tmp_path_factory):
    """Return the work folder of a calibrated model of the table. Copy it to solve there."""
    folder = tmp_path_factory.mktemp(name)
    settings = make_settings(
        CalibrateSettings,
        model=str(checkpoint(name)),
        text={"dataset": str(text_file), "samples": 3, "seq_len": 32},
    )
    calibrate(settings, Work(folder / "work"), overwrite=False, progress=silent)
    return folder / "work"


@pytest.fixture(scope="module")
def qwen3(checkpoint, text_file, tmp_path_factory):
    return calibrated("qwen3-gqa", checkpoint, text_file, tmp_path_factory)


@pytest.fixture(scope="module")
def gemma3(checkpoint, text_file, tmp_path_factory):
    return calibrated("gemma3-gqa", checkpoint, text_file, tmp_path_factory)


@pytest.fixture
def work_of_qwen3(qwen3, tmp_path):
    return shutil.copytree(qwen3, tmp_path / "work")


@pytest.fixture
def work_of_gemma3(gemma3, tmp_path):
    return shutil.copytree(gemma3, tmp_path / "work")


WHOLE = "a norm follows each query and key head, so these keep their size"
PAPER = ("--method", "paper")
STOCK_TOO = f"{WHOLE}, and the stock shape has one size for all heads"


@pytest.mark.parametrize("shape", ["stock", "per-layer"])
def test_heads_with_a_norm_keep_their_size(shape, a3, work_of_qwen3, tmp_path):
    """Without a word about components: the MLP is cut, and values in the per-layer shape; the rest is exact."""
    work, out = ("--work", work_of_qwen3), tmp_path / "out"
    solved = a3(*SOLVE, "--shape", shape, *work, "--json").json
    assert solved["budget_reached"] >= 0.25
    assert {size["qk"] for size in solved["sizes"]} == {16}
    assert ({size["ov"] for size in solved["sizes"]} == {16}) == (shape == "stock")
    assert solved["predicted_loss"]["qk"] == 0
    assert set(solved["predicted_score_error"]["relative"]) == {0.0}
    assert a3("export", out, *work).code == 0
    verified = a3("verify", out, *work, "--require-reference", "--trust-remote-code", "--quiet")
    assert verified.code == 0, verified
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, source_of(work_of_qwen3)))
    for layer in (0, 1):
        for name in ("q_norm", "k_norm", "q_proj", "k_proj"):
            tensor = f"model.layers.{layer}.self_attn.{name}.weight"
            assert torch.equal(ours[tensor], theirs[tensor]), tensor


def source_of(work):
    return Path(read_json(work / "source.json")["model"])


def test_whole_heads_are_shown_as_whole(a3, work_of_qwen3, tmp_path):
    """No warning is about statistics of heads that nothing cuts; the card names the command that was meant."""
    work, out, html = ("--work", work_of_qwen3), tmp_path / "out", tmp_path / "report.html"
    before = a3("inspect", work_of_qwen3, "--json").json
    assert a3(*SOLVE, *work).code == 0
    assert a3("export", out, *work).code == 0
    for folder in (work_of_qwen3, out):
        found = a3("inspect", folder, "--json").json
        assert [layer["qk"]["size"] for layer in found["layers"]] == [16, 16]
        for each in (before, found):
            assert any(warning.startswith("OV: ") for warning in each["warnings"])
            assert not any(warning.startswith("QK: ") for warning in each["warnings"])
        assert a3("report", folder, "--html", html).code == 0
        assert "query and key head size" in html.read_text("utf-8")
    card = (out / "README.md").read_text("utf-8")
    assert "| query and key head size | 16 | 16 |" in card
    assert "RoPE as in the source." in card
    assert "--components mlp" in card


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--components", "qk", *PAPER), ("--components qk", "'qwen3'", STOCK_TOO, "use --components mlp")),
        (("--components", "qk,ov,mlp", *PAPER), ("cannot compress qk and ov", STOCK_TOO, "use --components mlp")),
        (("--components", "qk", "--shape", "per-layer", *PAPER), (f"{WHOLE}; use --components ov,mlp",)),
        (("--attention-budget", 0.1, *PAPER), ("cannot compress attention", STOCK_TOO, "use --shape per-layer")),
        (
            ("--budget", 0.58),
            (
                "mlp with MLP multiple 8 remove at most 0.55",
                STOCK_TOO,
                "(--min-mlp), or use --shape per-layer or --components qk,ov,mlp",
            ),
        ),
        (
            ("--budget", 0.78, "--shape", "per-layer"),
            ("ov,mlp with head multiple 2 and MLP multiple 8", WHOLE, "or use --components qk,ov,mlp"),
        ),
        (
            ("--attention-budget", 0.45, "--shape", "per-layer"),
            ("attention budget 0.45", "remove at most 0.4375", WHOLE),
        ),
    ],
)
def test_what_a_norm_on_heads_forbids_is_refused_with_the_reason(options, words, a3, work_of_qwen3):
    command = but(("solve", "--budget", 0.2, "--head-multiple", 2, "--mlp-multiple", 8), *options)
    refused(a3(*command, "--work", work_of_qwen3), *words)


FITTED = "solution/layer-000.safetensors"


def sizes_of(tensors):
    return {name.split(".")[4]: len(tensor) for name, tensor in tensors.items() if "layers.0.self_attn" in name}


@pytest.mark.parametrize("shape", ["stock", "per-layer"])
@pytest.mark.parametrize("source", ["qwen3", "gemma3"])
def test_smaller_heads_get_norms_of_their_own(source, shape, a3, request, tmp_path):
    """If asked for: the export answers like the full-size source with the same maps, and has the predicted size."""
    work, out = ("--work", request.getfixturevalue(f"work_of_{source}")), tmp_path / "out"
    cut = ("--components", "qk,ov", "--budget", 0.2, "--head-multiple", 2, "--shape", shape)
    solved = a3("solve", *cut, "--sensitivity", "residual", *work, "--json").json
    assert max(size["qk"] for size in solved["sizes"]) < 16
    assert solved["predicted_loss"]["qk"] > 0
    assert solved["predicted_score_error"]["relative"][0] > 0
    for layer in solved["per_layer"]:
        assert 0 < layer["attention_error"]["refined"] <= layer["attention_error"]["closed_form"]
    assert a3("export", out, *work).code == 0
    verified = a3("verify", out, *work, "--require-reference", "--trust-remote-code", "--quiet")
    assert verified.code == 0, verified
    ours = load_file(out / "model.safetensors")
    rank = solved["sizes"][0]["qk"]
    found = sizes_of(ours)
    assert (found["q_norm"], found["k_norm"], found["q_proj"], found["k_proj"]) == (rank, rank, 4 * rank, 2 * rank)
    assert sum(tensor.numel() for tensor in ours.values()) == solved["parameters"]["after"]


@pytest.mark.parametrize(("form", "in_4"), [("longrope", "no"), ("theta", "yes")])
def test_each_type_of_attention_has_its_own_slots(form, in_4, a3, work_of_gemma3, tmp_path):
    """The frequencies of smaller heads are those of the slots in the source's table for that type of attention."""
    work, out = ("--work", work_of_gemma3), tmp_path / "out"
    command = ("solve", "--kv-budget", 0.25, "--head-multiple", 2, "--rope-form", form, *work)
    sliding, full = a3(*command, "--json").json["rope_slots"]
    assert len(sliding) == len(full) == 6
    assert sliding != full or form == "theta"
    assert a3("export", out, *work).code == 0
    verified = a3("verify", out, *work, "--require-reference", "--quiet")
    assert verified.code == 0, verified
    config, model = read_json(out / "config.json"), AutoModelForCausalLM.from_pretrained(out)
    for kind, theta, factor, slots in (("sliding", 1e3, 1, sliding), ("full", 1e4, 2, full)):
        found = getattr(model.model.rotary_emb, f"{kind}_attention_inv_freq")
        torch.testing.assert_close(found, torch.tensor([theta ** (-slot / 8) / factor for slot in slots]))
        assert config["rope_parameters"][f"{kind}_attention"]["rope_type"] in (form, "default", "linear")
    fitted, written = (load_file(folder) for folder in (work_of_gemma3 / FITTED, out / "model.safetensors"))
    torch.testing.assert_close(
        written["model.layers.0.self_attn.q_norm.weight"] + 1, fitted["query_norm"], check_dtype=False
    )
    # transformers 4 would turn the heads of sliding attention otherwise; a theta of null stops it.
    assert (config["rope_local_base_freq"] is None) == (form == "longrope")
    loads = {each["runtime"]: each["loads"] for each in read_json(out / "a3_manifest.json")["runtimes"]}
    assert (loads["transformers 5"], loads["transformers 4.57"]) == ("yes", in_4)
    prompt = {"input_ids": torch.arange(10, 50)[None], "attention_mask": torch.ones(1, 40, dtype=torch.long)}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(**prompt, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    text = ("--dataset", work_of_gemma3.parent / "text.txt", "--samples", 2, "--seq-len", 40)
    (work_of_gemma3.parent / "text.txt").write_text("Some text to measure. " * 20)
    assert a3("eval", out, *text).code == 0
    assert "RoPE has 6 rotated pairs of 8" in (out / "README.md").read_text()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("option", ["--kv-budget", "--attention-budget"])
def test_a_budget_that_only_smaller_heads_meet_takes_them(option, a3, work_of_qwen3):
    """In the stock shape nothing else is left to cut for it; in the per-layer shape values are."""
    command = ("solve", option, 0.2, "--head-multiple", 2, "--mlp-multiple", 8, "--work", work_of_qwen3, "--json")
    found = a3(*command).json
    assert found["request"]["settings"]["components"] == ["qk", "ov", "mlp"]
    assert {(size["qk"], size["ov"], size["mlp"]) for size in found["sizes"]} == {(12, 12, 96)}
    found = a3(*command, "--shape", "per-layer", "--overwrite").json
    assert found["request"]["settings"]["components"] == ["ov", "mlp"]
    assert {size["qk"] for size in found["sizes"]} == {16}


def test_a_plan_takes_such_a_budget(a3, checkpoint):
    found = a3("plan", checkpoint("qwen3-gqa"), "--kv-budget", 0.2, "--head-multiple", 2, "--json").json
    assert found["components"] == ["qk", "ov", "mlp"]
    assert [found[name]["after"] for name in ("head_size", "value_head_size")] == [12, 12]
    assert found["whole_heads"] is None


def test_budgets_of_attention_and_mlp_where_only_values_are_cut(a3, work_of_qwen3):
    command = ("solve", "--head-multiple", 2, "--mlp-multiple", 8, "--shape", "per-layer", "--method", "paper")
    budgets = ("--attention-budget", 0.25, "--mlp-budget", 0)
    (found, *_) = [a3(*command, *budgets, "--work", work_of_qwen3, "--json").json]
    assert {size["mlp"] for size in found["sizes"]} == {96}
    assert sum(16 - size["ov"] for size in found["sizes"]) / (2 * 32) >= 0.25


def test_a_recipe_for_heads_with_a_norm_fails_before_it_calibrates(a3, checkpoint, text_file, tmp_path):
    source = checkpoint("qwen3-gqa")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"work: {tmp_path / 'work'}\nout: {tmp_path / 'out'}\n"
        f"calibrate: {{model: {source}, text: {{dataset: {text_file}, samples: 2, seq_len: 32}}}}\n"
        "solve: {attention_budget: 0.2, method: paper}\n"
    )
    for options in ((), ("--dry-run",)):
        refused(a3("run", recipe, *options, "--quiet"), "--attention-budget 0.2", STOCK_TOO)
    with pytest.raises(A3Error, match="a norm follows"):
        compress(source, tmp_path / "out", components=("qk",), dataset=str(text_file), budget=0.1, method="paper")
    assert not (tmp_path / "work").exists()


def test_rounding_names_only_the_multiple_of_what_is_cut(a3, work_of_qwen3):
    found = a3("solve", "--budget", 0.05, "--mlp-multiple", 64, "--work", work_of_qwen3, "--json").json
    (warning,) = [each for each in found["warnings"] if "were asked for" in each]
    assert "rounded to --mlp-multiple 64; use --mlp-multiple 8 to" in warning


def test_pareto_compares_what_a_norm_on_heads_allows(a3, work_of_qwen3):
    command = ("pareto", "--budgets", "0.2,0.7", "--mlp-multiple", 8, "--head-multiple", 2, "--work", work_of_qwen3)
    points = a3(*command, "--json").json["points"]
    reached = {point["variant"] for point in points if "error" not in point and point["budget_asked"] == 0.7}
    assert reached == {"best, per-layer"}
    assert all(size["qk"] == 16 for point in points if "error" not in point for size in point["sizes"])
    assert all(STOCK_TOO in point["error"] for point in points if "error" in point)


# Layers without RoPE


@pytest.mark.parametrize("name", ["smollm3-bias", "smollm3-window"])
@pytest.mark.parametrize("shape", ["stock", "per-layer"])
def test_heads_keep_their_size_where_some_layers_have_no_rope(name, shape, a3, checkpoint, text_file, tmp_path):
    work, out = ("--work", tmp_path / "work"), tmp_path / "out"
    assert a3("calibrate", checkpoint(name), "--dataset", text_file, *SHORT, *work).code == 0
    solved = a3(*SOLVE, "--shape", shape, *work, "--json").json
    assert {size["qk"] for size in solved["sizes"]} == {16}
    assert ({size["ov"] for size in solved["sizes"]} == {16}) == (shape == "stock")
    assert a3("export", out, *work).code == 0
    verified = a3("verify", out, *work, "--require-reference", "--trust-remote-code", "--quiet")
    assert verified.code == 0, verified
    why = "some layers have no RoPE, so query and key heads keep their size"
    refused(a3(*SOLVE, "--components", "qk", "--shape", "per-layer", "--overwrite", *work), "'smollm3'", why)


@pytest.mark.parametrize("said", [[1], "1,0", 1])
def test_layers_without_rope_that_are_not_named_one_by_one(said, a3, checkpoint, text_file, tmp_path):
    folder = shutil.copytree(checkpoint("smollm3-bias"), tmp_path / "source")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "no_rope_layers": said}))
    outcome = a3("calibrate", folder, "--dataset", text_file, "--work", tmp_path / "work")
    refused(outcome, "config.json", "no_rope_layers")


# Fused projections


def test_a_stock_shape_that_takes_no_smaller_heads_compresses_the_mlp(a3, checkpoint, text_file, tmp_path):
    """Its reason is in every refusal; layers with sizes of their own may have smaller heads."""
    work, why = ("--work", tmp_path / "work"), "its configuration refuses RoPE factors for smaller heads"
    source = checkpoint("phi3-window")
    assert a3("calibrate", source, "--dataset", text_file, *SHORT, *work).code == 0
    refused(a3("solve", "--attention-budget", 0.2, *work), "cannot compress attention", why, "use --shape per-layer")
    refused(a3(*SOLVE, "--components", "qk,ov,mlp", *work), "cannot compress qk and ov", why, "use --components mlp")
    assert why in a3("plan", source, "--budget", 0.2, "--mlp-multiple", 8, "--json").json["whole_heads"]
    solved = a3(*SOLVE, *work, "--json").json
    assert {(size["qk"], size["ov"]) for size in solved["sizes"]} == {(16, 16)}
    solved = a3(*SOLVE, "--attention-budget", 0.3, "--shape", "per-layer", "--overwrite", *work, "--json").json
    assert max(size["qk"] + size["ov"] for size in solved["sizes"]) < 32


def test_rope_scaling_has_only_what_transformers_4_takes(a3, checkpoint, text_file, tmp_path):
    work, out = ("--work", tmp_path / "work"), tmp_path / "out"
    commands = (
        ("calibrate", checkpoint("phi3-longrope"), "--dataset", text_file, *SHORT),
        (*SOLVE, "--shape", "per-layer", "--method", "paper"),
        ("export", out),
    )
    for command in commands:
        outcome = a3(*command, *work)
        assert outcome.code == 0, outcome.stderr
    config = read_json(out / "config.json")
    assert config["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert config["rope_scaling"]["long_factor"] == config["rope_parameters"]["long_factor"]
    assert config["original_max_position_embeddings"] == 64
    assert "| transformers 4.57 | yes |" in (out / "README.md").read_text("utf-8")
