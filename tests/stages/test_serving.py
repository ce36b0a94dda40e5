"""The KV cache that is predicted is the one that transformers holds; and how many sequences fit beside the weights."""

import itertools
import re

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from a3cli.models.checkpoint import resolve_model
from a3cli.models.model import describe
from a3cli.work.files import read_json
from a3cli.work.folder import Work
from a3cli.work.sealed import write_manifest
from tests.conftest import CONTEXT, SHORT
from tests.helpers.commands import RECIPE

pytestmark = pytest.mark.usefixtures("hasty")

SOLVE = ("solve", "--method", "paper", "--overwrite", "--head-multiple", 2, "--mlp-multiple", 8)


@torch.inference_mode()
def measured_cache(folder, length: int) -> int:
    """Return the bytes of the cache after a forward pass of two sequences, per sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = torch.randint(1, 250, (2, length), generator=torch.Generator().manual_seed(0))
    cache = model(tokens, use_cache=True).past_key_values
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values)) // 2


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *itertools.product(["llama-gqa", "nemotron-mha-bias", "mistral-gqa", "qwen2-window"], ["stock", "per-layer"]),
        *itertools.product(["qwen3-window", "smollm3-window"], ["per-layer"]),  # values alone get smaller
    ],
)
def test_the_cache_has_the_bytes_that_were_predicted(name, shape, a3, checkpoint, text_file, tmp_path):
    """Also in layers with a sliding window of 24 tokens; for 40 % of the cache, at the full context."""
    source, place = checkpoint(name), ("--work", tmp_path / "work")
    assert a3("calibrate", source, "--dataset", text_file, *SHORT, *place).code == 0
    solved = a3(*SOLVE, "--kv-budget", 0.4, "--shape", shape, *place, "--json").json
    assert a3("export", tmp_path / "out", *place).code == 0
    kv, cache = solved["kv_bytes_per_token"], solved["kv_cache"]
    assert kv["after"] <= 0.6 * kv["before"]
    assert cache["tokens"] == CONTEXT
    assert cache["before"] == measured_cache(source, CONTEXT)
    assert cache["after"] == measured_cache(tmp_path / "out", CONTEXT)
    assert kv["after"] * 16 == measured_cache(tmp_path / "out", 16)  # shorter than any window
    if name == "llama-gqa":
        assert cache["after"] == CONTEXT * kv["after"]


def rows_of(shown: str) -> dict[str, list[str]]:
    found = re.findall(r"│ (KV cache at the full.*?|sequences that fit.*?) +│ +(.*?) │ +(.*?) │", shown)
    return {label: figures for label, *figures in found}


@pytest.mark.parametrize("shape", ["stock", "per-layer"])
def test_solve_and_report_say_what_fits(shape, a3, work, tmp_path):
    command = (*SOLVE, "--kv-budget", 0.5, "--shape", shape, "--work", work)
    plain = a3(*command, "--json").json
    assert "sequences" not in plain
    before, after = plain["bytes"]["before"], plain["bytes"]["after"]
    memory = before + 3 * plain["kv_cache"]["before"] + 1
    found = a3(*command, "--memory", memory, "--json").json
    fit = (memory - after) // plain["kv_cache"]["after"]
    assert found["sequences"] == {"memory": memory, "before": 3, "after": fit}
    assert fit >= 6
    assert found["sha256"] == plain["sha256"]
    rows = rows_of(a3(*command, "--memory", memory).stdout)
    assert rows["KV cache at the full context (256 tokens)"] == ["131 kB", "65.5 kB"]
    assert rows[f"sequences that fit {memory / 1000:.3g} kB beside the weights"] == ["3", f"{fit}"]
    page = tmp_path / "report.html"
    assert a3("report", work, "--html", page, "--memory", memory, "--json").json["sequences"] == found["sequences"]
    text = re.sub(r"<[^>]*>", " ", page.read_text("utf-8"))
    assert re.search(r"KV cache at the full context \(256 tokens\)\s+131 kB\s+65.5 kB", text)
    assert re.search(rf"beside the weights\s+3\s+{fit}\s", text)


def test_a_solution_of_an_earlier_version_does_not_know(a3, work, tmp_path):
    command = (*(each for each in SOLVE if each != "--overwrite"), "--kv-budget", 0.5, "--name", "old", "--work", work)
    assert a3(*command).code == 0
    path = Work(work).named("old").solution_manifest
    manifest = {key: value for key, value in read_json(path).items() if key not in ("kv_cache", "sha256")}
    write_manifest(path, manifest)
    outcome = a3(*command, "--memory", "1MB", "--json")
    assert "sequences" not in outcome.json
    assert outcome.json["warnings"][-1].startswith("--memory: an earlier version of a3")
    assert "KV cache at the full context" not in a3(*command).stdout
    page = ("--html", tmp_path / "report.html", "--name", "old", "--memory", "1MB", "--json")
    assert a3("report", work, *page).json["warnings"][-1].startswith("--memory: ")


def test_the_context_that_is_served_counts(a3, work):
    found = a3(*SOLVE, "--kv-budget", 0.5, "--context", 64, "--work", work, "--json").json
    assert found["kv_cache"] == {"tokens": 64, "before": 64 * 512, "after": 64 * 256}


def test_weights_may_leave_no_room(a3, work):
    found = a3(*SOLVE, "--kv-budget", 0.5, "--memory", "250KB", "--work", work)
    assert rows_of(found.stdout)["sequences that fit 250 kB beside the weights"][0] == "0"


def test_plan_says_what_fits(a3, checkpoint):
    command = ("plan", checkpoint("qwen2-window"), "--kv-budget", 0.5, "--head-multiple", 2, "--memory", "1MB")
    found = a3(*command, "--json").json
    assert found["kv_cache"] == {"tokens": 256, "before": (256 + 23) * 256, "after": (256 + 23) * 128}
    free = [10**6 - found["bytes"][when] for when in ("before", "after")]
    expected = [room // cache for room, cache in zip(free, ((256 + 23) * 256, (256 + 23) * 128), strict=True)]
    assert found["sequences"] == {"memory": 10**6, "before": expected[0], "after": expected[1]}
    assert rows_of(a3(*command).stdout)["sequences that fit 1 MB beside the weights"] == [f"{n}" for n in expected]


def test_a_recipe_says_it_too_and_stays_finished(a3, checkpoint, text_file, tmp_path):
    content = yaml.safe_load(RECIPE.format(folder=tmp_path, source=checkpoint("llama-gqa"), text=text_file))
    content |= {"verify": False, "solve": {"kv_budget": 0.5, "method": "paper", "head_multiple": 2}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    assert "sequences" not in a3("run", recipe, "--json").json["solve"]
    found = a3("run", recipe, "--set", "solve.memory=1MB", "--json").json
    assert found["solve"]["sequences"]["after"] > found["solve"]["sequences"]["before"] > 0
    assert "# solve: finished" in a3("run", recipe, "--set", "solve.memory=1MB", "--dry-run").stdout
    other = a3("run", recipe, "--set", "solve.kv_budget=0.3", "--dry-run").stdout
    assert "# solve: other settings; differs in kv_budget" in other


def test_an_export_in_a_wider_dtype_may_exceed_its_bytes(a3, checkpoint, text_file, tmp_path):
    source, place = checkpoint("llama-gqa", dtype=torch.bfloat16), ("--work", tmp_path / "work")
    assert a3("calibrate", source, "--dataset", text_file, *SHORT, *place).code == 0
    solved = a3(*SOLVE, "--budget-bytes", "120KB", *place, "--json").json
    assert solved["bytes"]["after"] <= 120_000
    assert "--budget-bytes" not in a3("export", tmp_path / "out", *place).stderr
    wide = a3("export", tmp_path / "wide", "--dtype", "float32", *place)
    assert wide.code == 0
    assert "of weights in float32, more than --budget-bytes 120 kB" in wide.stderr
    served = {}
    for out in ("out", "wide"):
        options = ("--html", tmp_path / "report.html", "--memory", "1MB", "--json")
        served[out] = a3("report", tmp_path / out, *options).json["sequences"]
    assert served["wide"]["before"] == served["out"]["before"]
    assert served["wide"]["after"] < served["out"]["after"]


def test_no_window_is_no_window(checkpoint):
    windows = {
        name: describe(resolve_model(str(checkpoint(name)))).shape.windows
        for name in ("llama-gqa", "qwen2-gqa", "qwen2-window", "mistral-gqa", "starcoder2-window", "starcoder2-gqa")
    }
    assert windows == {
        "llama-gqa": (),
        "qwen2-gqa": (),
        "qwen2-window": (None, 24),
        "mistral-gqa": (24, 24),
        "starcoder2-window": (24, 24),
        "starcoder2-gqa": (),
    }
