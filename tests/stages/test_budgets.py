"""Budgets of the KV cache and of the result's size hold, alone and together, or the message says which cannot."""

import itertools
from pathlib import Path

import pytest
from safetensors.torch import load_file

import a3cli
from tests.conftest import SHORT, but, refused

pytestmark = pytest.mark.usefixtures("hasty")

SOLVE = ("solve", "--method", "paper", "--overwrite", "--head-multiple", 2, "--mlp-multiple", 8)
PARTS = ("qk", "ov", "mlp")


def share_of_cache(solution) -> float:
    kv = solution["kv_bytes_per_token"]
    return 1 - kv["after"] / kv["before"]


@pytest.mark.parametrize("shape", ["stock", "per-layer"])
def test_a_budget_of_the_cache_leaves_the_mlp(shape, a3, work):
    command = (*SOLVE, "--kv-budget", 0.3, "--shape", shape, "--work", work)
    found = a3(*command, "--json").json
    assert {size["mlp"] for size in found["sizes"]} == {96}
    kept = sum(size["qk"] + size["ov"] for size in found["sizes"])
    assert kept == (4 * 10 if shape == "stock" else 44)  # 30 % of 64 dims are 19.2
    assert share_of_cache(found) == 1 - kept / 64
    assert found["budget_asked"] is None
    shown = " ".join(a3(*command).stdout.split())
    removed = f"removed {100 * (1 - kept / 64):.2f} % of the KV cache and "
    assert removed in shown
    assert "(asked: 30 % of the KV cache)" in shown


def combinations(solution):
    """Yield the sizes of the stock shape with their predicted loss, from the curves of the manifest."""
    curves = [layer["curves"] for layer in solution["per_layer"]]
    loss = {part: dict.fromkeys(curves[0][part]["size"], 0.0) for part in PARTS}
    for layer, part in itertools.product(curves, PARTS):
        for size, own in zip(layer[part]["size"], layer[part]["loss"], strict=True):
            loss[part][size] += own
    for head, width in itertools.product(loss["qk"], loss["mlp"]):
        yield head, width, loss["qk"][head] + loss["ov"][head] + loss["mlp"][width]


@pytest.mark.parametrize(("kv", "whole"), [(0.3, 0.25), (0.1, 0.55), (0.6, 0.1), (0.5, 0.5)])
def test_both_budgets_hold_at_the_least_loss(kv, whole, a3, work):
    found = a3(*SOLVE, "--kv-budget", kv, "--budget", whole, "--work", work, "--json").json
    head, width = found["head_dim"]["after"], found["intermediate_size"]["after"]
    weights = 2 * 48 * 16 * 12, 2 * 48 * 96 * 3  # of attention and of the MLP
    enough = {
        (head, width): loss
        for head, width, loss in combinations(found)
        if 1 - head / 16 >= kv and 1 - (weights[0] * head / 16 + weights[1] * width / 96) / sum(weights) >= whole
    }
    assert enough[head, width] == pytest.approx(min(enough.values()), rel=1e-5)
    assert share_of_cache(found) >= kv
    assert found["budget_reached"] >= whole
    assert len(enough) > 1


def test_both_budgets_hold_in_the_per_layer_shape(a3, work):
    """The second budget costs more than the first alone, and never less than either."""
    command = (*SOLVE, "--shape", "per-layer", "--work", work, "--json")
    loss = {}
    for budgets in (("--kv-budget", 0.5), ("--budget", 0.3), ("--kv-budget", 0.5, "--budget", 0.3)):
        found = a3(*command, *budgets).json
        loss[budgets] = sum(found["predicted_loss"].values())
    assert share_of_cache(found) >= 0.5
    assert found["budget_reached"] >= 0.3
    *alone, both = loss.values()
    assert both >= max(alone) - 1e-9


@pytest.mark.parametrize("shape", ["stock", "per-layer"])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-gqa-bias"])
def test_the_result_has_at_most_the_size_asked_for(name, shape, a3, checkpoint, text_file, tmp_path):
    """Everything is counted, embeddings, norms and biases too, in the file that is written."""
    source, place = checkpoint(name), ("--work", tmp_path / "work")
    before = sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    assert a3("calibrate", source, "--dataset", text_file, *SHORT, *place).code == 0
    for option, most in (("--budget-params", before - 9000), ("--budget-bytes", 4 * (before - 9000))):
        solved = a3(*SOLVE, option, most, "--shape", shape, *place, "--json").json
        a3("export", tmp_path / "out", "--overwrite", *place)
        tensors = load_file(tmp_path / "out" / "model.safetensors").values()
        parameters = sum(tensor.numel() for tensor in tensors)
        assert solved["parameters"]["after"] == parameters
        assert solved["bytes"]["after"] == 4 * parameters
        step = 2 * 8 * (3 * 48 + 2) if shape == "stock" else 8 * (3 * 48 + 2)  # the largest between two sizes
        assert before - 9000 - step <= parameters <= before - 9000


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        (("--budget", 0.2, "--budget-bytes", "100KB"), ("--budget and --budget-bytes", "give one of them")),
        (("--budget-params", "1K", "--budget-bytes", 9), ("--budget-bytes and --budget-params",)),
        (("--kv-budget", 0.2, "--attention-budget", 0.2), ("--kv-budget and --attention-budget", "give one of them")),
        (("--kv-budget", 0.2, "--mlp-budget", 0.2, "--budget", 0.2), ("--kv-budget and --mlp-budget", "two at most")),
        (("--kv-budget", 0.2, "--components", "mlp"), ("--kv-budget needs qk and ov",)),
        ((), ("no budget", "--kv-budget", "--budget-bytes")),
        (("--budget-bytes", "many"), ("--budget-bytes 'many'", "5GB, 500MB or 2GiB")),
        (("--budget-params", "6X"), ("--budget-params '6X'", "6B, 500M or 1.5e9")),
        (("--kv-budget", 1.0), ("--kv-budget 1", "below 1")),
        (("--kv-budget", 0.95), ("--kv-budget 0.95 cannot be reached", "at most 0.8750 of the KV cache", "--min-head")),
        (("--kv-budget", 0.95, "--budget", 0.97), ("--kv-budget 0.95", "budget 0.97 cannot be reached")),
        (("--budget-params", "1K"), ("--budget-params 1,000 cannot be reached", "leave at least 29,808 parameters")),
        (("--budget-bytes", "1KB"), ("--budget-bytes 1 kB cannot be reached", "leave at least 119 kB (119,232 bytes)")),
        (("--budget-params", "1B"), ("--budget-params 1,000,000,000", "already smaller")),
        (("--budget-bytes", "1GB"), ("--budget-bytes 1 GB", "already smaller")),
    ],
)
def test_what_cannot_be_is_said_before_any_work(budgets, words, a3, prepared, monkeypatch):
    monkeypatch.setattr("a3cli.stages.solve.analyse", lambda _: pytest.fail("analysed"))
    refused(a3(*SOLVE, *budgets, "--work", prepared / "work"), *words)


def test_one_impossible_budget_is_not_blamed_for_another(a3, prepared):
    outcome = a3(*SOLVE, "--kv-budget", 0.95, "--budget", 0.2, "--work", prepared / "work")
    assert "budget 0.2" not in outcome.stderr


def test_requests_without_the_new_budgets_are_as_before(a3, work):
    settings = a3(*SOLVE, "--budget", 0.2, "--work", work, "--json").json["request"]["settings"]
    assert not {"kv_budget", "budget_bytes", "budget_params"} & settings.keys()
    settings = a3(*SOLVE, "--kv-budget", 0.2, "--work", work, "--json").json["request"]["settings"]
    assert settings["kv_budget"] == 0.2
    other = a3(*[each for each in SOLVE if each != "--overwrite"], "--kv-budget", 0.3, "--work", work)
    refused(other, "other settings (differs in kv_budget)")


def about_rounding(outcome) -> list[str]:
    return [each for each in outcome.json["warnings"] if "were asked for" in each]


def test_an_overshot_cache_is_named_with_the_multiple_that_keeps_to_it(a3, work):
    command = (*but(SOLVE, "--head-multiple", 8), "--kv-budget", 0.12, "--work", work, "--json")
    (warning,) = about_rounding(a3(*command))
    assert warning.startswith("--kv-budget: 12 % were asked for, 50.0 % are removed")
    assert warning.endswith("; use --head-multiple 2 to come within a tenth of the budget")
    assert about_rounding(a3(*but(command, "--head-multiple", 2))) == []
    assert about_rounding(a3(*command, "--shape", "per-layer")) == []  # 8 of 64 dims


@pytest.mark.parametrize(("option", "item", "unit"), [("--budget-params", 1, " k"), ("--budget-bytes", 4, " kB")])
def test_an_overshot_size_is_named(option, item, unit, a3, work):
    before = a3(*SOLVE, "--budget", 0, "--work", work, "--json").json["parameters"]["before"]
    most = before - 2 * 16 * 3 * 48 + 8  # nearly what 16 channels of each layer are
    coarse = but(SOLVE, "--head-multiple", 16, "--mlp-multiple", 64)
    command = (*coarse, option, item * most, "--work", work, "--json")
    found = a3(*command)
    (warning,) = about_rounding(found)
    assert warning.startswith(f"{option}: at most {item * most / 1000:.3g}{unit} were asked for, ")
    assert warning.endswith("; use --mlp-multiple 16 to come within a tenth of the budget")
    again = a3(*but(command, "--mlp-multiple", 16))
    assert about_rounding(again) == []
    assert found.json["parameters"]["after"] < again.json["parameters"]["after"] <= most


def test_a_cache_that_another_budget_empties_is_no_excess(a3, work):
    """Heads get smaller than the cache alone needs, since that is cheaper than a smaller MLP."""
    found = a3(*SOLVE, "--kv-budget", 0.05, "--budget", 0.75, "--work", work, "--json")
    assert share_of_cache(found.json) > 0.05 + 2 / 16
    assert about_rounding(found) == []


def test_heads_that_are_too_small_for_a_long_text_name_the_budget_of_the_cache(a3, work):
    (warning,) = a3(*SOLVE, "--kv-budget", 0.6, "--work", work, "--json").json["warnings"]
    assert warning.startswith("QK: the predicted error of attention scores")
    assert warning.endswith("keep more of the heads (a smaller --kv-budget)")


def test_plan_takes_the_same_budgets(a3, checkpoint):
    command = ("plan", checkpoint("llama-gqa-bias"), "--head-multiple", 2, "--mlp-multiple", 8)
    found = a3(*command, "--kv-budget", 0.3, "--json").json
    assert (found["head_size"]["after"], found["mlp_width"]["after"]) == (10, 96)
    assert (found["asked"], found["budget_asked"]) == ("30 % of the KV cache", None)
    found = a3(*command, "--kv-budget", 0.5, "--budget", 0.2, "--json").json
    assert found["head_size"]["after"] <= 8
    assert found["budget_reached"] >= 0.2
    before = found["parameters"]["before"]
    for option, most in (("--budget-params", before - 9000), ("--budget-bytes", 4 * (before - 9000))):
        found = a3(*command, option, most, "--json").json
        assert before - 9000 - 2 * 8 * (3 * 48 + 2) - 3000 <= found["parameters"]["after"] <= before - 9000
    assert a3(*command, "--json").json["asked"] == "25 %"
    refused(a3(*command, "--kv-budget", 0.95), "--kv-budget 0.95 cannot be reached")
    refused(a3(*command, "--budget", 0.2, "--budget-params", "1K"), "--budget and --budget-params")
    (warning,) = a3(*but(command, "--head-multiple", 8), "--kv-budget", 0.12, "--json").json["warnings"]
    assert "--kv-budget: 12 % were asked for, 50.0 % are removed" in warning
    assert "use --head-multiple 2" in warning


def test_inspect_and_card_say_what_was_asked_for(a3, work, tmp_path):
    assert a3(*SOLVE, "--kv-budget", 0.4, "--budget", 0.2, "--name", "small", "--work", work).code == 0
    asked = "20 % of the weights and 40 % of the KV cache"
    found = a3("inspect", work, "--name", "small", "--json").json
    assert [each["asked"] for each in found["solutions"]] == ["25 %", asked]
    assert f"(asked: {asked})" in " ".join(a3("inspect", work, "--name", "small").stdout.split())
    assert a3("export", tmp_path / "out", "--name", "small", "--work", work).code == 0
    card = Path(tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"(asked: {asked})" in card
    assert "--budget 0.2 --kv-budget 0.4" in card


def test_another_budget_replaces_the_default_of_compress(checkpoint, text_file, tmp_path):
    text = {"dataset": str(text_file), "samples": 3, "seq_len": 32}
    sizes = {"method": "paper", "head_multiple": 2, "mlp_multiple": 8}
    made = a3cli.compress(checkpoint("llama-gqa"), tmp_path / "out", kv_budget=0.3, **text, **sizes)
    assert made.solution.request.settings.budget is None
    assert (made.solution.sizes[0].qk, made.solution.sizes[0].mlp) == (10, 96)
