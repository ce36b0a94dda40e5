"""Compare computations on a CUDA device with those on the CPU. Skipped without a GPU.

In float32 without TF32 the two differ only by rounding. With a GPU, `make test` runs all other tests there too,
since `--device auto` chooses it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, StaticCache

from a3cli.models import costs
from a3cli.models.checkpoint import Checkpoint
from a3cli.models.model import describe
from tests.conftest import build_tokenizer, refused
from tests.helpers.statistics import assert_close, calibration_files

pytestmark = pytest.mark.gpu

TEXT = ("--samples", 8, "--seq-len", 64, "--batch-size", 3)
SIZES = ("--budget", 0.3, "--head-multiple", 2, "--mlp-multiple", 8)
DEVICES = ("cpu", "cuda")


@pytest.fixture
def calibrated(a3, checkpoint, text_file, tmp_path):
    """Return work folders of one model, calibrated in float32 on each device."""

    def make(name: str, **options: object) -> dict[str, Path]:
        works = {device: tmp_path / device for device in DEVICES}
        for device, work in works.items():
            where = ("--device", device, "--dtype", "float32", "--work", work)
            ended = a3("calibrate", checkpoint(name, **options), "--dataset", text_file, *TEXT, *where)
            assert ended.code == 0, ended
        return works

    return make


@pytest.mark.parametrize("name", ["llama-gqa-bias", "llama-llama3", "mistral-gqa", "qwen2-window"])
def test_the_same_statistics(name, calibrated):
    assert_close(list(calibrated(name).values()))


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "paper"),
        (),
        ("--shape", "per-layer"),
        ("--sensitivity", "probe"),
        ("--sequential", "--refit-rounds", 2, "--batch-size", 4),
    ],
    ids=["paper", "best", "per-layer", "probe", "sequential"],
)
def test_the_same_solution(options, a3, calibrated, checkpoint, text_file, tmp_path):
    """The sizes are equal, the loss nearly so, and the checkpoint is equally far from its source."""
    source, work = checkpoint("llama-gqa", num_hidden_layers=3), calibrated("llama-gqa", num_hidden_layers=3)["cpu"]
    solved, kl = [], []
    for device in DEVICES:
        ran = a3("solve", *SIZES, *options, "--device", device, "--work", work, "--overwrite", "--json")
        assert ran.code == 0, ran
        solved.append(ran.json)
        out = tmp_path / f"out-{device}"
        assert a3("export", out, "--work", work).code == 0
        measure = ("--dataset", text_file, "--samples", 4, "--seq-len", 64, "--bootstrap", 0, "--device", "cpu")
        code = ("--trust-remote-code",) if "per-layer" in options else ()
        evaluated = a3("eval", out, "--against", source, *measure, *code, "--json")
        assert evaluated.code == 0, evaluated
        kl.append(evaluated.json["kl"])
    assert solved[0]["sizes"] == solved[1]["sizes"]
    for part, loss in solved[0]["predicted_loss"].items():
        close = 1e-2 if part == "qk" else 1e-5  # query and key maps are refined in float32, step by step
        assert solved[1]["predicted_loss"][part] == pytest.approx(loss, rel=close), part
    assert kl[0] == pytest.approx(kl[1], rel=2e-2)  # and the signs of the sequential correction are random


def test_the_same_figures(a3, calibrated, checkpoint, text_file, tmp_path):
    work = calibrated("llama-gqa")["cuda"]
    assert a3("solve", *SIZES, "--work", work).code == 0
    assert a3("export", tmp_path / "out", "--work", work).code == 0
    measure = ("--dataset", text_file, "--samples", 8, "--seq-len", 64, "--batch-size", 4, "--json")
    found = []
    for device in DEVICES:
        where = ("--device", device, "--dtype", "float32")
        ran = a3("eval", tmp_path / "out", "--against", checkpoint("llama-gqa"), *measure, *where)
        assert ran.code == 0, ran
        found.append(ran.json)
    for figure in ("perplexity", "kl", "perplexity_increase"):
        assert found[1][figure] == pytest.approx(found[0][figure], rel=1e-4), figure
    verified = a3("verify", tmp_path / "out", "--work", work, "--device", "cuda", "--require-reference")
    assert verified.code == 0, verified


def test_layers_in_a_row_on_a_device_named_twice(a3, checkpoint, text_file, tmp_path):
    command = ("calibrate", checkpoint("llama-gqa", num_hidden_layers=5), "--dataset", text_file, *TEXT, "--work")
    assert a3(*command, tmp_path / "one", "--device", "cuda").code == 0
    for devices in ("cuda:0", "cuda:0,cuda:0"):
        assert a3(*command, tmp_path / devices, "--devices", devices).code == 0
        assert calibration_files(tmp_path / devices) == calibration_files(tmp_path / "one")


@pytest.mark.parametrize("where", ["memory", "device"])
def test_hidden_states_off_the_disk(where, a3, checkpoint, text_file, tmp_path):
    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *TEXT, "--device", "cuda", "--work")
    assert a3(*command, tmp_path / "disk").code == 0
    assert a3(*command, tmp_path / where, "--hidden-states", where).code == 0
    assert calibration_files(tmp_path / where) == calibration_files(tmp_path / "disk")


def test_half_precision_is_summed_as_on_the_cpu(a3, checkpoint, text_file, tmp_path):
    """bfloat16 activations differ between devices; their sums differ by no more than that."""
    folder = checkpoint("llama-gqa", dtype=torch.bfloat16, num_hidden_layers=1)
    command = ("calibrate", folder, "--dataset", text_file, *TEXT, "--dtype", "bfloat16", "--work")
    for device in DEVICES:
        assert a3(*command, tmp_path / device, "--device", device).code == 0
    expected, found = (load_file(tmp_path / device / "calibration" / "layer-000.safetensors") for device in DEVICES)
    for name, value in expected.items():
        assert (found[name].double() - value.double()).norm() < 1e-2 * value.double().norm(), name


def test_real_memory_that_runs_out_halves_the_batch(a3, checkpoint, text_file, tmp_path):
    """The device reports 80 GB, of which this process may use little."""
    folder = checkpoint("llama-gqa")
    shape = describe(Checkpoint(folder)).shape
    text = ("--dataset", text_file, "--samples", 512, "--seq-len", 256, "--device", "cuda")
    assert a3("calibrate", folder, *text, "--batch-size", 8, "--work", tmp_path / "small").code == 0
    torch.cuda.empty_cache()
    room = 64 * costs.block_bytes(shape, 4, 256) + torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        ended = a3("calibrate", folder, *text, "--batch-size", "auto", "--work", tmp_path / "auto", "--json")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert ended.code == 0, ended
    assert "out of memory: continuing with" in ended.stderr
    assert 1 <= ended.json["made_with"][0]["batch_size"] <= 128
    assert_close([tmp_path / "small", tmp_path / "auto"])


@pytest.mark.parametrize("mlp_stats", ["full", "diagonal"])
def test_memory_is_as_planned(mlp_stats, a3, text_file, tmp_path):
    """For two layers of the 1B shape, compare PyTorch's peak allocation with `a3 plan`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=260,
        max_position_embeddings=2048,
    )
    with torch.device("cuda"):
        LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    build_tokenizer().save_pretrained(tmp_path / "source")
    text = ("--samples", 8, "--seq-len", 1024, "--batch-size", 4, "--mlp-stats", mlp_stats)
    planned = a3("plan", tmp_path / "source", *text, "--devices", "cuda", "--json").json["device_memory_bytes"]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    where = ("--device", "cuda", "--work", tmp_path / "work")
    assert a3("calibrate", tmp_path / "source", "--dataset", text_file, *text, *where).code == 0
    peak = torch.cuda.max_memory_allocated() - before
    print(f"peak {peak / 1e6:.0f} MB, planned {planned}")
    assert 0.75 * peak < planned["total"] < 1.5 * peak


def test_a_launcher_with_one_gpu(a3, checkpoint, text_file, tmp_path):
    """`accelerate launch` with one process changes nothing; with more processes than GPUs it fails with an error."""
    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *TEXT, "--device", "cuda", "--quiet")
    assert a3(*command, "--work", tmp_path / "alone").code == 0
    launch = ("-m", "accelerate.commands.launch", "--num_processes", 1, "-m", "a3cli", *command)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, *map(str, launch), "--work", str(tmp_path / "launched")]
    subprocess.run(arguments, env=environment, check=True, timeout=120)
    assert calibration_files(tmp_path / "launched") == calibration_files(tmp_path / "alone")
    many = torch.cuda.device_count() + 1
    ended = a3(*command, "--work", tmp_path / "many", "--num-processes", many)
    refused(ended, f"{many} processes on this machine", "--device cpu")


def test_the_per_layer_shape(a3, calibrated, tmp_path):
    """Its bfloat16 outputs match float64 within rounding: with a cache, with a static one, and compiled."""
    work = calibrated("llama-gqa", num_hidden_layers=3)["cuda"]
    assert a3("solve", *SIZES, "--shape", "per-layer", "--work", work).code == 0
    assert a3("export", tmp_path / "out", "--work", work).code == 0

    def load(dtype: torch.dtype, device: str):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=dtype, device_map=device, trust_remote_code=True
        )
        return model.eval()

    tokens = torch.randint(250, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = load(torch.float64, "cpu")(tokens).logits
        half, single = load(torch.bfloat16, "cuda"), load(torch.float32, "cuda")
        on_gpu = tokens.cuda()
        for model, tolerance in ((single, 1e-5), (half, 5e-2)):
            found = model(on_gpu).logits.cpu().double()
            assert (found - exact).norm() < tolerance * exact.norm()
        settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
        expected = single.generate(on_gpu, use_cache=False, **settings)
        assert torch.equal(single.generate(on_gpu, **settings), expected)
        assert torch.equal(single.generate(on_gpu, cache_implementation="static", **settings), expected)
        cache = StaticCache(config=single.config, max_cache_len=64)
        compiled = torch.compile(single)
        found = compiled(on_gpu, past_key_values=cache).logits.cpu().double()
        assert (found - exact).norm() < 1e-5 * exact.norm()
