"""`a3 export --as llama` writes the same model under Llama's class, or says why it cannot."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import a3cli
from a3cli.models.families import FAMILIES
from a3cli.runtimes import NO, YES, Verdict, judge, tokenizer_class_of
from a3cli.work.files import read_json
from tests.conftest import MODELS, SHORT, VOCABULARY, build_model, refused
from tests.helpers.commands import write_recipe

pytestmark = pytest.mark.usefixtures("hasty")

ONLY_QWEN2 = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
SMALLER_HEADS = ("--attention-budget", 0.25, "--mlp-budget", 0.25)
MULTIPLES = ("--mlp-multiple", 8, "--head-multiple", 2)
ZERO = re.compile(r"model\.layers\.\d\.self_attn\.o_proj\.bias")


@pytest.fixture
def solved(a3, checkpoint, text_file, tmp_path):
    """Return a function that solves for a model of the table and returns its source and work folder."""

    def solve(name: str, *options: object, source: Path | None = None, **changes: Any) -> tuple[Path, Path]:
        source, work = source or checkpoint(name, **changes), tmp_path / "work"
        calibrated = a3("calibrate", source, "--dataset", text_file, *SHORT, "--work", work)
        assert calibrated.code == 0, calibrated.stderr
        outcome = a3("solve", *(options or SMALLER_HEADS), *MULTIPLES, "--work", work)
        assert outcome.code == 0, outcome.stderr
        return source, work

    return solve


@torch.inference_mode()
def answers(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a folder's logits of fixed tokens, and its greedy continuation with a cache."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.randint(VOCABULARY - 3, (2, 120), generator=torch.Generator().manual_seed(7))
    prompt = {"attention_mask": torch.ones_like(tokens[:, :16]), "pad_token_id": 0}
    return model(tokens).logits, model.generate(tokens[:, :16], max_new_tokens=16, do_sample=False, **prompt)


@pytest.mark.parametrize(
    ("changes", "dtype"), [({}, "source"), ({"tie_word_embeddings": True}, "bfloat16")], ids=["untied", "tied"]
)
def test_a_qwen2_as_a_llama_is_the_same_model(changes, dtype, solved, a3, tmp_path):
    """Weights, logits and generated tokens equal those of the export as a Qwen2, bit for bit."""
    source, work = solved("qwen2-gqa", **changes)
    plain, llama, common = tmp_path / "plain", tmp_path / "llama", ("--dtype", dtype, "--work", work)
    assert a3("export", plain, *common).code == 0
    assert a3("export", llama, "--as", "llama", *common).code == 0
    for one, other in zip(answers(plain), answers(llama), strict=True):
        assert torch.equal(one, other)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (llama, plain))
    added = {name: ours.pop(name) for name in [*ours] if ZERO.fullmatch(name)}
    assert len(added) == 2
    assert all(torch.equal(each, torch.zeros(48, dtype=each.dtype)) for each in added.values())
    assert {each.dtype for each in added.values()} == {each.dtype for each in theirs.values()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config, was = read_json(llama / "config.json"), read_json(plain / "config.json")
    changed = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": False}
    assert changed.items() <= config.items()
    assert not ONLY_QWEN2 & config.keys()
    assert config["head_dim"] < 16
    added = {"rope_theta", "rope_scaling", "attention_bias", "mlp_bias"} - was.keys()
    assert config.keys() == was.keys() - ONLY_QWEN2 | added
    assert all(config[key] == was[key] for key in was.keys() - ONLY_QWEN2 - changed.keys())
    verified = a3("verify", llama, "--work", work, "--require-reference", "--json")
    assert verified.code == 0, verified.stdout
    assert read_json(source / "config.json")["model_type"] == "qwen2"


def test_card_manifest_and_figures_of_a_qwen2_as_a_llama(solved, a3, text_file, tmp_path):
    source, work = solved("qwen2-gqa")
    plain, llama, text = tmp_path / "plain", tmp_path / "llama", ("--dataset", text_file, *SHORT, "--json")
    assert a3("export", plain, "--work", work).code == 0
    assert a3("export", llama, "--as", "llama", "--work", work).code == 0
    before, after = (read_json(folder / "a3_manifest.json") for folder in (plain, llama))
    assert after["as_type"] == "llama"
    assert "as_type" not in before
    assert before["solution"] == after["solution"]
    expected = judge(read_json(llama / "config.json"), smaller_heads=True, tokenizer_class=tokenizer_class_of(llama))
    assert [Verdict(**each) for each in after["runtimes"]] == expected
    loads, loaded = ({each["runtime"]: each for each in found["runtimes"]} for found in (before, after))
    for runtime in ("vLLM", "MLX", "llama.cpp"):
        assert (loads[runtime]["loads"], "export with --as llama" in loads[runtime]["note"]) == (NO, True)
        assert "ignores head_dim" not in loaded[runtime]["note"]
    assert loaded["vLLM"]["loads"] == loaded["MLX"]["loads"] == YES
    assert "--components mlp" in loads["CTranslate2"]["note"]  # whose Llama does not read head_dim either
    card = (llama / "README.md").read_text("utf-8")
    assert "a3 export OUT --dtype source --max-shard-size 5000000000 --as llama\n" in card
    assert "`config.json` says `llama`, not the source's `qwen2`" in card
    assert "--as" not in re.search(r"````\n(.+)````", (plain / "README.md").read_text("utf-8"), re.S)[1]
    assert a3("report", llama, "--html", tmp_path / "page.html").code == 0
    assert "--as llama" in (tmp_path / "page.html").read_text("utf-8")
    ours, theirs = (a3("eval", folder, "--against", source, *text).json for folder in (llama, plain))
    assert [ours[key] for key in ("perplexity", "kl")] == [theirs[key] for key in ("perplexity", "kl")]


@pytest.mark.parametrize(
    ("name", "changes", "unsaid"),
    [
        ("qwen2-gqa", {}, {"bos_token_id": None}),  # Llama's is 1
        ("mistral-gqa", {"sliding_window": None, "num_attention_heads": 16, "num_key_value_heads": 8},
         {"num_key_value_heads": 8, "max_position_embeddings": 131072}),
        ("llama-gqa-bias", {}, {}),
    ],
)  # fmt: skip
def test_what_config_json_leaves_to_the_class_is_said(name, changes, unsaid, solved, a3, checkpoint, tmp_path):
    """Without cuts the export equals the source, where Llama's class has other defaults than the source's too."""
    folder = Path(shutil.copytree(checkpoint(name, **changes), tmp_path / "source"))
    config = read_json(folder / "config.json")
    for key in unsaid:
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    _, work = solved(name, "--budget", 0, source=folder)
    assert a3("export", tmp_path / "out", "--as", "llama", "--work", work).code == 0
    written = read_json(tmp_path / "out" / "config.json")
    assert written["model_type"] == "llama"
    assert {"rope_theta", "rope_scaling", "rope_parameters"} <= written.keys()  # transformers 4 reads the first two
    assert unsaid.items() <= written.items()
    for one, other in zip(answers(folder), answers(tmp_path / "out"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", sorted(name for name in MODELS if FAMILIES[MODELS[name][0].model_type].like_llama))
def test_families_that_are_like_llama_differ_by_biases_alone(name):
    """Llama's class takes such a model's parameters; what it has beyond them are biases of output projections."""
    model = build_model(name)
    ours = model.state_dict()
    sizes = {key: value for key, value in model.config.to_dict().items() if key in LlamaConfig().to_dict()}
    for key, linear in (("attention_bias", "q_proj"), ("mlp_bias", "up_proj")):
        sizes[key] = any(tensor.endswith(f"{linear}.bias") for tensor in ours)
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**sizes)).state_dict()
    assert ours.keys() <= theirs.keys()
    assert all(ZERO.fullmatch(key) for key in theirs.keys() - ours.keys())
    assert all(ours[key].shape == theirs[key].shape for key in ours)


@pytest.mark.parametrize("name", ["mistral-gqa", "qwen2-window"])
def test_windows_that_cut_the_context_are_refused(name, solved, a3, tmp_path):
    """A context that no window cuts is served the same, so --context is a remedy."""
    _, work = solved(name)
    out = tmp_path / "out"
    refused(
        a3("export", out, "--as", "llama", "--work", work),
        "--as llama", "sliding window of 24 tokens", "its context of 256", "leave out --as", "--context 24",
    )  # fmt: skip
    assert not out.exists()
    assert a3("export", out, "--work", work).code == 0
    manifest = read_json(out / "a3_manifest.json")
    assert "--as llama" not in str(manifest["runtimes"])
    lower = ("--context", 24, "--overwrite", "--work", work)
    assert a3("solve", *SMALLER_HEADS, *MULTIPLES, *lower).code == 0
    assert a3("export", tmp_path / "llama", "--as", "llama", "--work", work).code == 0
    verified = a3("verify", tmp_path / "llama", "--work", work, "--require-reference", "--json")
    assert verified.code == 0, verified.stdout
    assert "sliding_window" not in read_json(tmp_path / "llama" / "config.json")


def test_layers_of_their_own_are_refused(solved, a3, tmp_path):
    _, work = solved("qwen2-gqa", "--budget", 0.2, "--shape", "per-layer", "--method", "paper")
    refused(
        a3("export", tmp_path / "out", "--as", "llama", "--work", work),
        "--as llama: the solution has --shape per-layer", "leave out --as, or solve with --shape stock",
    )  # fmt: skip


def test_other_families_are_refused_before_any_work(solved, a3, checkpoint, text_file, tmp_path):
    words = ("--as llama", "'starcoder2'", "more than biases", "leave out --as", "llama, mistral, qwen2")
    source = checkpoint("starcoder2-gqa")
    recipe = write_recipe(tmp_path / "recipe.yaml", source, text_file, export={"as_type": "llama"})
    refused(a3("run", recipe, "--quiet"), *words)
    with pytest.raises(a3cli.A3Error, match="more than biases"):
        a3cli.compress(source, tmp_path / "out", dataset=str(text_file), export={"as_type": "llama"})
    assert not (tmp_path / "work").exists()
    _, work = solved("starcoder2-gqa", "--budget", 0.2, "--method", "paper")
    refused(a3("export", tmp_path / "out", "--as", "llama", "--work", work), *words)


def test_sizes_that_llama_refuses_are_refused(solved, a3, tmp_path):
    """Its class wants a hidden size that the heads divide."""
    _, work = solved("qwen2-gqa", "--budget", 0.2, "--method", "paper", hidden_size=46)
    refused(a3("export", tmp_path / "out", "--as", "llama", "--work", work), "Llama's class refuses", "leave out --as")
    assert not (tmp_path / "out").exists()


def test_a_model_type_that_is_not_offered(a3, tmp_path):
    refused(a3("export", tmp_path, "--as", "mistral"), "--as 'mistral'", "'llama'")


def test_an_export_as_another_type_is_another_request(a3, checkpoint, text_file, tmp_path):
    """A recipe rewrites the export when `as_type` changes, and does nothing when it is the same."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", checkpoint("qwen2-gqa"), text_file,
        export={"as_type": "llama"}, eval=None, solve={"budget": 0.25, "mlp_multiple": 8, "method": "paper"},
    )  # fmt: skip
    out = tmp_path / "out"

    def run(*options: object) -> str:
        outcome = a3("run", recipe, *options, "--quiet")
        assert outcome.code == 0, outcome.stderr
        return read_json(out / "config.json")["model_type"]

    assert run() == "llama"
    written = (out / "a3_manifest.json").stat().st_mtime_ns
    assert run() == "llama"
    assert (out / "a3_manifest.json").stat().st_mtime_ns == written
    refused(a3("export", out, "--work", tmp_path / "work"), "is not empty")
    assert a3("export", out, "--as", "llama", "--work", tmp_path / "work").code == 0
    assert (out / "a3_manifest.json").stat().st_mtime_ns == written
    assert run("--set", "export.as_type=null", "--set", "export.overwrite=true") == "qwen2"
    refused(a3("export", out, "--as", "llama", "--work", tmp_path / "work"), "is not empty")


def test_a_plan_names_the_way_to_read_smaller_heads(a3, checkpoint):
    sizes = ("--seq-len", 32, "--head-multiple", 2, "--mlp-multiple", 8, "--json")
    for name, named in (("qwen2-gqa", True), ("qwen2-window", False)):
        notes = {each["runtime"]: each["note"] for each in a3("plan", checkpoint(name), *sizes).json["runtimes"]}
        assert ("export with --as llama" in notes["vLLM"]) == named
        assert ("--components mlp" in notes["vLLM"]) != named


def test_zero_biases_beyond_a_budget_of_bytes_are_mentioned(solved, a3, tmp_path):
    _, work = solved("qwen2-gqa", "--budget", 0)
    size = read_json(work / "solution" / "manifest.json")["bytes"]["before"]
    assert a3("solve", "--budget-bytes", size, "--method", "paper", "--overwrite", "--work", work).code == 0
    plain = a3("export", tmp_path / "plain", "--work", work)
    llama = a3("export", tmp_path / "llama", "--as", "llama", "--work", work)
    assert plain.code == llama.code == 0
    assert "--budget-bytes" not in plain.stderr
    said = " ".join(llama.stderr.split())
    assert "of weights with zero biases, more than --budget-bytes" in said
    assert "export with no --as" in said
