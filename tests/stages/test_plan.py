"""`a3 plan` predicts what calibrate, solve and export do; its checks of weights are tested in `test_sources.py`."""

import copy
import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import NemotronConfig

from a3cli.methods import refits
from a3cli.models import correction_costs, costs, uniform
from a3cli.models.checkpoint import Checkpoint
from a3cli.models.config import read_shape
from a3cli.models.families import LayerSizes
from a3cli.models.model import describe
from a3cli.settings import SolveSettings
from a3cli.solvers import least_squares, ov, slots
from a3cli.stages import rates
from a3cli.stages.estimates import GREEDY_STEP, REFIT_ROUNDS, torch_build
from a3cli.stream import sequential
from tests.conftest import MODELS, can_cut, refused
from tests.helpers.published import PUBLISHED

LLAMA_8B = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
}


@pytest.fixture
def config(tmp_path):
    """Write only a config.json and return the folder."""

    def write(**changes) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        content = {key: value for key, value in (LLAMA_8B | changes).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(content))
        return folder

    return write


def runtimes(found: dict) -> dict:
    return {each["runtime"]: each for each in found["runtimes"]}


def test_llama_8b(a3, config):
    found = a3("plan", config(), "--json").json
    assert found["parameters"]["before"] == 8_030_261_248  # the figure on its model card
    assert found["kv_bytes_per_token"]["before"] == 131_072
    assert found["head_size"]["after"] == 96
    assert found["mlp_width"]["after"] == 10_752
    assert found["budget_reached"] == 0.25
    assert runtimes(found)["llama.cpp"]["loads"] == "no"
    assert found["machine"]["rates_are"] == dict.fromkeys(("start", "disk", "compute", "solve"), "assumed")
    assert 0 < found["seconds"]["solve --method paper"] < found["seconds"]["solve --method best"]


STARCODER2_3B = {
    "model_type": "starcoder2",
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "tie_word_embeddings": None,  # omitted on the Hub
    "use_bias": None,
}


def test_what_a_starcoder2_does_not_say(a3, config):
    """Embeddings are tied, every linear layer has a bias, and an ungated MLP has two weights per channel."""
    found = a3("plan", config(**STARCODER2_3B), "--json").json
    d, width, kv = 3072, 12288, 2 * 128
    linear, biases, norms = 2 * d * (d + kv) + 2 * width * d, 2 * d + 2 * kv + width + d, 4 * d
    assert found["parameters"]["before"] == 49152 * d + 30 * (linear + biases + norms) + 2 * d
    assert found["budget_reached"] == 0.25
    without = a3("plan", config(**{**STARCODER2_3B, "use_bias": False}), "--json").json
    assert found["parameters"]["before"] - without["parameters"]["before"] == 30 * biases
    untied = a3("plan", config(**{**STARCODER2_3B, "tie_word_embeddings": False}), "--json").json
    assert untied["parameters"]["before"] - found["parameters"]["before"] == 49152 * d
    assert "starcoder2 ignores head_dim" in runtimes(found)["llama.cpp"]["note"]


QWEN3 = {
    "model_type": "qwen3",
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 36,
}


def qwen3_config(hidden: int, width: int, layers: int, heads: int, tied: bool) -> dict:
    return {
        **QWEN3,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


def test_what_a_plan_says_of_heads_that_stay_whole(a3, config):
    folder = config(**PUBLISHED["Qwen3-0.6B"].config)
    why = "a norm follows each query and key head, so these keep their size"
    said = " ".join(a3("plan", folder).stdout.split())
    assert f"25.00 % of the decoder's linear weights (asked: 25 %), from the MLP alone: {why}, and the stock" in said
    said = " ".join(a3("plan", folder, "--shape", "per-layer").stdout.split())
    assert f"value heads and MLP alike: {why}; sizes are means" in said
    assert "head size of OV" in said
    refused(a3("plan", folder, "--budget", 0.6), "mlp with MLP multiple 64 remove at most 0.5875", why, "per-layer")
    cached = a3("plan", folder, "--kv-budget", 0.2, "--json").json
    assert (cached["head_size"]["after"], cached["value_head_size"]["after"], cached["whole_heads"]) == (96, 96, None)
    cached = a3("plan", folder, "--kv-budget", 0.2, "--shape", "per-layer", "--json").json
    assert cached["kv_bytes_per_token"]["after"] <= 0.8 * cached["kv_bytes_per_token"]["before"]
    assert (cached["head_size"]["after"], cached["value_head_size"]["after"]) == (128, 64)
    whole = {"shape": "stock", "whole_heads": f"{why}, and the stock shape has one size for all heads"}
    found = a3("plan", folder, "--json").json
    assert {key: found[key] for key in whole} == whole
    assert found["components"] == ["mlp"]


def test_a_mixture_of_qwen3_experts(a3, config):
    """The sizes of four layers of Qwen3-30B-A3B, of whose parameters a token meets a tenth."""
    sizes = qwen3_config(2048, 6144, 4, 32, tied=False)
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    folder = config(**{**sizes, **experts, "model_type": "qwen3_moe", "num_key_value_heads": 4})
    found = a3("plan", folder, "--budget", 0.24, "--json").json
    assert found["mlp_width"] == {"before": 768, "after": 576}
    assert found["budget_reached"] == pytest.approx(128 * 3 * 2048 * 192 / (128 * 3 * 2048 * 768 + 18_874_368))
    active = 8 * 3 * 2048 * 768 + 18_874_368
    heads = 2 * 2 * found["prefill_flops_per_token"]["seq_len"] * 32 * 128
    assert found["prefill_flops_per_token"]["before"] == 4 * (2 * active + heads)


@pytest.mark.parametrize("name", ["nemotron-gqa", "nemotron-mha-bias"])
def test_a_head_that_turns_in_part(name, a3, checkpoint):
    """Norms have biases; either spelling of the config entries is accepted."""
    found = a3("plan", checkpoint(name), "--head-multiple", 2, "--mlp-multiple", 8, "--seq-len", 64, "--json").json
    assert found["parameters"]["before"] == Checkpoint(checkpoint(name)).parameters()
    assert runtimes(found)["transformers 5"]["loads"] == "yes"


@pytest.mark.parametrize(
    ("said", "passed"),
    [
        ({}, 8),
        ({"partial_rotary_factor": 0.25}, 12),
        ({"partial_rotary_factor": 1.0}, 0),
        ({"partial_rotary_factor": 0.25, "rope_parameters": {"partial_rotary_factor": 0.75}}, 4),
    ],
)
def test_how_much_of_a_head_turns(said, passed):
    """The rotated share equals that of transformers."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 1}
    theirs = NemotronConfig(**sizes, **copy.deepcopy(said))
    plain = SimpleNamespace(**sizes, model_type="nemotron", **said)
    assert read_shape(plain).passed_dims == read_shape(theirs).passed_dims == passed


@pytest.mark.parametrize("factor", [0.2, 1.5, -0.5, float("nan"), "half"])
def test_what_is_no_number_of_pairs_is_refused(factor, a3, config):
    rope = {"rope_theta": None, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": factor}}
    refused(a3("plan", config(model_type="nemotron", head_dim=16, **rope)), "partial_rotary_factor", "head_dim 16")


@pytest.mark.slow
def test_in_a_few_seconds(checkpoint):
    """Measure CPU time of a separate process: 5 s on an idle machine, most of it imports."""
    sizes = ("--seq-len", "64", "--head-multiple", "2", "--mlp-multiple", "8")
    command = [sys.executable, "-m", "a3cli", "plan", str(checkpoint("llama-gqa")), *sizes, "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert json.loads(ended.stdout)["weights"]["checked"] == "tensors"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 12


@pytest.mark.parametrize("name", [name for name in MODELS if can_cut(name, "mlp")])
def test_sizes_are_those_of_the_checkpoint(name, a3, checkpoint):
    """The JSON configuration gives the same shape as transformers' own class, and every tensor is counted."""
    folder = checkpoint(name)
    found = a3("plan", folder, "--head-multiple", 2, "--mlp-multiple", 8, "--seq-len", 64, "--json").json
    source = Checkpoint(folder)
    shape = describe(source).shape
    sizes = [LayerSizes(found["head_size"]["after"], found["head_size"]["after"], found["mlp_width"]["after"])] * 2
    assert found["parameters"]["before"] == source.parameters()
    assert found["bytes"]["before"] == source.bytes()
    assert found["parameters"]["after"] == source.parameters() - costs.removed_parameters(shape, sizes)
    assert found["kv_bytes_per_token"]["after"] == costs.kv_bytes_per_token(shape, sizes, 4)
    assert 0.25 <= found["budget_reached"] < 0.35


def test_disk_is_what_calibration_takes(a3, checkpoint, text_file, tmp_path):
    folder, run = checkpoint("llama-gqa"), ("--samples", 6, "--seq-len", 64)
    for kind in ("full", "diagonal"):
        planned = a3("plan", folder, *run, "--mlp-stats", kind, "--head-multiple", 8, "--json").json
        work = tmp_path / kind
        assert a3("calibrate", folder, "--dataset", text_file, *run, "--mlp-stats", kind, "--work", work).code == 0
        header = 2000
        for layer in (work / "calibration").glob("layer-*"):
            size = layer.stat().st_size
            assert planned["disk_bytes"]["statistics_per_layer"] < size
            assert size < planned["disk_bytes"]["statistics_per_layer"] + header
        assert planned["disk_bytes"]["hidden_states"] == 2 * 6 * 64 * 48 * 4
    assert "solve --method best" not in planned["seconds"]


def test_calibration_flops_are_those_of_a_forward_and_the_products(checkpoint):
    """torch counts them; its counter omits the Gram matrices, which are added up in place."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    from a3cli.solvers.moments import LayerMoments
    from a3cli.stream.hooks import moments_of

    folder = checkpoint("llama-gqa")
    model = describe(Checkpoint(folder))
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").model
    moments = LayerMoments(16, True, torch.device("cpu"))
    with (
        torch.inference_mode(),
        moments_of(network.layers[0], model.family, model.shape, moments),
        FlopCounterMode(display=False) as c,
    ):
        network(torch.zeros(2, 64, dtype=torch.long), use_cache=False)
    one, two = (c.get_flop_counts()[f"LlamaModel.layers.{i}"] for i in (0, 1))
    plain, hooked = (sum(counts.values()) for counts in (two, one))
    shape = model.shape
    assert plain == 128 * costs.prefill_flops_per_token(shape, shape.sizes[:1], 64)
    in_place = 128 * (2 * (64 + 2 * 32) * 16 + 64**2 + 96**2)
    sampled = 2 * 2 * 8 * 64 * 4 * 16  # attention by distance: 8 queries per block
    assert hooked + in_place - sampled == pytest.approx(
        128 * costs.calibration_flops_per_token(shape, 64, full_mlp=True), rel=0.01
    )


def test_budgets_are_reached_by_the_least_unlike_sizes():
    shape = describe_shape(hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate_size=128)
    total = costs.linear_weights(shape, shape.sizes)
    for budget in (0.0, 0.1, 0.25, 0.4, 0.7):
        needed = costs.share_of(budget, total)
        size = uniform.equal_cuts(shape, needed, costs.linear_weights, head_multiple=4, mlp_multiple=8)
        removed = total - costs.linear_weights(shape, [size] * 2)
        assert removed >= budget * total
        assert abs(size.qk / 16 - size.mlp / 128) <= 0.2
    none, most = 0, costs.share_of(0.97, total)
    whole = uniform.equal_cuts(shape, none, costs.linear_weights, head_multiple=4, mlp_multiple=8)
    assert whole == LayerSizes(16, 16, 128)
    assert uniform.equal_cuts(shape, most, costs.linear_weights, head_multiple=8, mlp_multiple=64) is None


@pytest.mark.parametrize(
    ("components", "needed", "kv_budget", "expected"),
    [
        (("mlp",), 0, 0.0, (16, 16, 128)),
        (("mlp",), 1, 0.0, (16, 16, 120)),
        (("mlp",), 0, 0.1, None),
        (("ov",), 1, 0.0, (16, 12, 128)),
        (("ov",), 2 * 64 * 6 * 12 + 1, 0.0, None),  # more than value heads of 4 remove
        (("qk", "ov"), 0, 0.3, (8, 8, 128)),
        (("ov", "mlp"), 0, 0.25, (16, 8, 128)),
        (("ov", "mlp"), 0, 0.26, (16, 4, 128)),
        (("ov", "mlp"), 2 * 64 * 6 * 16, 0.0, (16, 12, 104)),
    ],
)
def test_a_plan_cuts_only_some_components(components, needed, kv_budget, expected):
    shape = describe_shape(hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate_size=128)
    found = uniform.equal_cuts(
        shape,
        needed,
        costs.linear_weights,
        head_multiple=4,
        mlp_multiple=8,
        components=components,
        kv_budget=kv_budget,
    )
    assert found == (expected and LayerSizes(*expected))


def describe_shape(**sizes):
    from a3cli.models.families import ModelShape

    return ModelShape(**sizes)


def test_what_was_stated_or_measured_counts(a3, config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    slow, fast = (
        a3("plan", config(), "--disk-gbps", rate, "--tflops", rate, "--solve-tflops", rate, "--json").json["seconds"]
        for rate in (1, 4)
    )
    early, late = (a3("plan", config(), "--start-seconds", start, "--json").json["seconds"] for start in (1, 4))
    assert all(fast[stage] < slow[stage] for stage in slow)
    assert all(early[stage] <= late[stage] - 3 for stage in late)
    exec(rates.NEEDED, {})  # the imports work; repeating them here costs nothing
    monkeypatch.setattr(rates, "NEEDED", "import time; time.sleep(0.1)")
    measured = a3("plan", config(), "--measure", "--tflops", 3, "--json").json["machine"]
    assert measured["rates_are"] == {"start": "measured", "disk": "measured", "compute": "stated", "solve": "measured"}
    assert measured["tflops"] == 3
    assert 0.001 < measured["solve_tflops"] < 100
    assert 0.001 < measured["disk_gbps"] < 100
    assert 0.1 < measured["start_seconds"] < 60
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_several_processes_are_faster_on_gpus_and_share_the_cores_of_a_cpu(a3, config):
    def calibrating(device: str, count: int) -> float:
        options = ("--devices", device, "--tflops", 1, "--num-processes", count, "--json")
        return a3("plan", config(), *options).json["seconds"]["calibrate"]

    assert calibrating("cuda", 2) < 0.7 * calibrating("cuda", 1)
    assert calibrating("cpu", 2) == calibrating("cpu", 1)


LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}


def test_a_gpu_selects_channels_one_after_another_and_solves_no_heads(a3, config):
    """On an H200, a layer of this shape took 10.5 s at 62 TFLOP/s, nearly all of it for sequential selection steps."""
    on_gpu = ("--devices", "cuda", "--disk-gbps", 1e6, "--json")
    solving = {
        rate: a3("plan", config(**LLAMA_70B), *on_gpu, "--solve-tflops", rate).json["seconds"] for rate in (62, 1e6)
    }
    assert solving[1e6]["solve --method best"] > 80 * 28672 * GREEDY_STEP
    assert solving[62]["solve --method best"] / 80 == pytest.approx(10.5, rel=0.4)  # plus slots, files and hashes
    assert solving[62]["solve --method paper"] == solving[1e6]["solve --method paper"]


def test_disk_for_the_solution_of_each_method(a3, config):
    found = a3("plan", config(**LLAMA_70B), "--json").json["disk_bytes"]
    assert found["solution"] == pytest.approx(72.7e9, rel=0.01)
    assert found["solution_paper"] == pytest.approx(0.14e9, rel=0.01)
    diagonal = a3("plan", config(**LLAMA_70B), "--mlp-stats", "diagonal", "--json").json["disk_bytes"]
    assert diagonal["solution"] == diagonal["solution_paper"] == found["solution_paper"]  # best needs full statistics


def test_devices_shape_and_dtype(a3, config):
    cpu, gpu = (a3("plan", config(), "--devices", kind, "--json").json for kind in ("cpu", "cuda:0,cuda:1"))
    assert gpu["machine"]["calibration_dtype"] == "bfloat16"
    assert (gpu["machine"]["batch_size_is"], cpu["machine"]["batch_size_is"]) == ("the least", "taken")
    assert "cuda at its peak at least" in a3("plan", config(), "--devices", "cuda").stdout.replace("\n", " ")
    assert "at least" not in a3("plan", config(), "--devices", "cuda", "--batch-size", 2).stdout
    assert gpu["device_memory_bytes"]["layer"] == cpu["device_memory_bytes"]["layer"] / 2
    per_layer = a3("plan", config(), "--shape", "per-layer", "--json").json
    assert "trust_remote_code" in runtimes(per_layer)["transformers 5"]["note"]
    assert "each layer will have its own" in a3("plan", config(), "--shape", "per-layer").stdout
    qwen = a3("plan", config(model_type="qwen2"), "--json").json
    assert "qwen2 ignores head_dim" in runtimes(qwen)["MLX"]["note"]
    assert qwen["parameters"]["before"] == 8_030_261_248 + 32 * 48 * 128


def test_of_a_hub_id_only_the_configuration_is_downloaded(a3, config, monkeypatch):
    asked = []

    def download(model, *, revision, allow_patterns, ignore_patterns, local_files_only):
        asked.append((model, revision, allow_patterns))
        return str(config())

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = a3("plan", "owner/name", "--revision", "v2", "--json").json
    assert found["model"] == "owner/name"
    assert found["weights"]["checked"] == "nothing"  # HF_HUB_OFFLINE also prevents requests to the Hub
    assert "headers could not be read" in found["weights"]["reason"]
    assert asked == [("owner/name", "v2", ["config.json", "model.safetensors.index.json", "adapter_config.json"])]


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"hidden_size": None, "vocab_size": "many"}, (), ("hidden_size", "vocab_size")),
        ({"model_type": "bert"}, (), ("'bert'", "llama, ministral3, mistral", "qwen2", "docs/add-a-family.md")),
        ({"num_key_value_heads": 3}, (), ("impossible sizes",)),
        ({"dtype": "int8"}, (), ("int8",)),
        ({"per_layer_config": {}}, (), ("layers differ in size",)),
        ({"quantization_config": {"quant_method": "gptq"}}, (), ("quantised",)),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, (), ("dynamic", "RoPE")),
        ({"hidden_size": "4096"}, (), ("config.json", "hidden_size", "integer")),
        ({"num_hidden_layers": 200_000_000}, (), ("config.json: num_hidden_layers is above 10,000",)),
        ({"head_dim": 10**9, "vocab_size": 10**400}, (), ("config.json: head_dim is above", "vocab_size is above")),
        ({"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 2 * 10**9}, (), ("head_dim is above",)),
        ({"intermediate_size": 10**400}, (), ("intermediate_size is above 2,147,483,647",)),
        ({"rope_parameters": []}, (), ("config.json", "rope_parameters")),
        ({"rope_parameters": "linear"}, (), ("config.json", "rope_parameters")),
        ({"rope_scaling": 5}, (), ("config.json", "rope_scaling")),
        ({}, ("--seq-len", 200_000), ("--seq-len 200000", "131072")),
        ({}, ("--budget", 0.999), ("cannot be reached",)),
        ({}, ("--budget", 1.5, "--devices", "tpu", "--tflops", -1), ("--budget", "--devices", "--tflops")),
    ],
)
def test_bad_input(changes, options, words, a3, config):
    refused(a3("plan", config(**changes), *options), *words)


def test_no_such_model(a3, tmp_path, monkeypatch):
    refused(a3("plan", tmp_path / "none"), "no such folder")
    refused(a3("plan", tmp_path), "config.json", "missing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(a3("plan", "owner/name"), "owner/name", "HF_HUB_OFFLINE")


def test_rounds_counted_are_those_run():
    """costs.py imports no solver, so it has its own copy of their loop limits."""
    assert costs.ROUNDS == slots.ROUNDS
    assert (costs.VALUE_ROUNDS, costs.VALUE_STEPS) == (refits.VALUE_ROUNDS, ov.REFINEMENT_STEPS)
    assert correction_costs.GAUSS_NEWTON_STEPS == sequential.ITERATIONS
    assert correction_costs.GRAM_ROWS == least_squares.ROWS
    assert SolveSettings.model_fields["refit_rounds"].default == REFIT_ROUNDS


@pytest.mark.parametrize(
    ("installed", "platform", "build"),
    [
        ("2.13.0+cpu", "linux", "cpu"),
        ("2.13.0", "linux", "cuda"),
        ("2.13.0+cu130", "linux", "cuda"),
        ("2.13.0", "darwin", "cpu"),
    ],
)
def test_imports_take_what_the_build_of_torch_takes(installed, platform, build, monkeypatch):
    monkeypatch.setattr("a3cli.stages.estimates.version", {"torch": installed}.__getitem__)
    monkeypatch.setattr("sys.platform", platform)
    assert torch_build() == build
