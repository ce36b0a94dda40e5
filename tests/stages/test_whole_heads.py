"""Budgets of models whose query and key heads keep their size: what they hold, and what is refused with the reason."""

import itertools
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from a3cli import compress
from a3cli.errors import A3Error
from a3cli.models.checkpoint import resolve_model
from a3cli.models.model import describe
from a3cli.settings import CalibrateSettings, make_settings
from a3cli.stages.calibrate import calibrate
from a3cli.work.folder import Work
from a3cli.work.progress import silent
from tests.conftest import SHORT, but, refused

pytestmark = pytest.mark.usefixtures("hasty")

SOLVE = ("solve", "--method", "paper", "--overwrite", "--head-multiple", 2, "--mlp-multiple", 8)
PER_LAYER = ("--shape", "per-layer")
NORM = "a norm follows each query and key head, so these keep their size"
NO_ROPE = "some layers have no RoPE, so query and key heads keep their size"
STOCK = ", and the stock shape has one size for all heads"


@pytest.fixture(scope="module")
def calibrated(checkpoint, text_file, tmp_path_factory):
    """Return a calibrated work folder of a model of the table. Copy it to solve there."""
    folders: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "work"
            text = {"dataset": str(text_file), "samples": 3, "seq_len": 32}
            settings = make_settings(CalibrateSettings, model=str(checkpoint(name)), text=text)
            calibrate(settings, Work(folders[name]), overwrite=False, progress=silent)
        return folders[name]

    return find


@pytest.fixture
def work_of(calibrated, tmp_path):
    return lambda name: shutil.copytree(calibrated(name), tmp_path / "work")


def share_of_cache(solution) -> float:
    kv = solution["kv_bytes_per_token"]
    return 1 - kv["after"] / kv["before"]


def about_rounding(outcome) -> list[str]:
    return [each for each in outcome.json["warnings"] if "were asked for" in each]


@pytest.mark.parametrize("name", ["qwen3-gqa", "smollm3-window"])
def test_a_budget_of_the_cache_takes_values_alone(name, a3, work_of, tmp_path):
    command = (*SOLVE, *PER_LAYER, "--kv-budget", 0.3, "--work", work_of(name))
    found = a3(*command, "--json")
    assert {(size["qk"], size["mlp"]) for size in found.json["sizes"]} == {(16, 96)}
    assert sum(size["ov"] for size in found.json["sizes"]) == 12  # 30 % of all 64 dims are 19.2 of the 32 of values
    assert share_of_cache(found.json) == 20 / 64
    assert found.json["request"]["settings"]["components"] == ["ov", "mlp"]
    assert about_rounding(found) == []
    assert "removed 31.25 % of the KV cache and " in " ".join(a3(*command).stdout.split())
    assert a3("export", tmp_path / "out", "--work", tmp_path / "work").code == 0
    (solved,) = [
        line for line in (tmp_path / "out" / "README.md").read_text("utf-8").splitlines() if "a3 solve" in line
    ]
    assert "--kv-budget 0.3" in solved
    assert "--components ov,mlp" in solved


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "qwen3-gqa",
            ("--kv-budget", 0.3),
            (
                "--kv-budget 0.3: a3 cannot compress attention of model_type 'qwen3' with --shape stock: ",
                f"{NORM}{STOCK}; use --shape per-layer, or --budget or --mlp-budget alone",
            ),
        ),
        ("qwen3-gqa", ("--kv-budget", 0.3, "--budget", 0.2), ("--kv-budget 0.3: ", f"{NORM}{STOCK}")),
        ("smollm3-window", ("--kv-budget", 0.3, "--mlp-budget", 0.2), ("'smollm3'", f"{NO_ROPE}{STOCK}")),
        (
            "qwen3-gqa",
            ("--kv-budget", 0.45, *PER_LAYER),
            (
                "--kv-budget 0.45 cannot be reached: ov with head multiple 2 remove at most 0.4375 of the KV cache "
                f"({NORM}); lower --kv-budget or --head-multiple, or the least sizes (--min-head)",
            ),
        ),
        (
            "smollm3-window",
            ("--kv-budget", 0.45, "--budget", 0.9, *PER_LAYER),
            (
                "--kv-budget 0.45",
                "budget 0.9 cannot be reached: ov,mlp with head multiple 2 and MLP multiple 8",
                NO_ROPE,
            ),
        ),
        (
            "qwen3-gqa",
            ("--kv-budget", 0.2, "--components", "mlp", *PER_LAYER),
            ("--kv-budget needs ov among --components, since the MLP has no KV cache",),
        ),
        (
            "qwen3-gqa",
            ("--attention-budget", 0.2, "--components", "mlp", *PER_LAYER),
            ("--attention-budget needs ov among --components",),
        ),
        (
            "qwen3-gqa",
            ("--budget-params", "1K"),
            (
                "--budget-params 1,000 cannot be reached: mlp with MLP multiple 8 leave at least ",
                f" parameters ({NORM}{STOCK}); give more, or lower the multiples, or the least sizes (--min-mlp), "
                "or use --shape per-layer",
            ),
        ),
        (
            "smollm3-window",
            ("--budget-bytes", "1KB", *PER_LAYER),
            ("--budget-bytes 1 kB cannot be reached: ov,mlp with head multiple 2 and", " bytes) (some layers have no"),
        ),
    ],
)
def test_what_cannot_be_is_said_before_any_work(name, options, words, a3, work_of, monkeypatch):
    monkeypatch.setattr("a3cli.stages.solve.analyse", lambda _: pytest.fail("analysed"))
    refused(a3(*SOLVE, *options, "--work", work_of(name)), *words)


def losses(solution):
    """Yield value sizes, MLP widths and predicted loss of all choices, from the curves of the manifest."""
    curves = [layer["curves"] for layer in solution["per_layer"]]
    parts = [
        list(zip(curve[part]["size"], curve[part]["loss"], strict=True)) for part in ("ov", "mlp") for curve in curves
    ]
    for (v0, a), (v1, b), (m0, c), (m1, d) in itertools.product(*parts):
        yield (v0, v1), (m0, m1), a + b + c + d


@pytest.mark.parametrize(("kv", "whole"), [(0.3, 0.35), (0.1, 0.5)])
def test_both_budgets_hold_with_whole_query_and_key_heads(kv, whole, a3, work_of):
    command = (*SOLVE, *PER_LAYER, "--work", work_of("qwen3-gqa"), "--json")
    found = a3(*command, "--kv-budget", kv, "--budget", whole).json
    assert {size["qk"] for size in found["sizes"]} == {16}
    assert share_of_cache(found) >= kv
    assert found["budget_reached"] >= whole
    total = 2 * 48 * (12 * 16 + 3 * 96)
    enough = [
        loss
        for values, widths, loss in losses(found)
        if 32 - sum(values) >= kv * 64 and 48 * (6 * (32 - sum(values)) + 3 * (192 - sum(widths))) >= whole * total
    ]
    assert sum(found["predicted_loss"].values()) == pytest.approx(min(enough), rel=1e-5)
    assert len(enough) > 100


@pytest.mark.parametrize("shape", ["stock", "per-layer"])
@pytest.mark.parametrize("name", ["qwen3-bias", "smollm3-bias"])
def test_the_result_has_at_most_the_size_asked_for(name, shape, a3, checkpoint, work_of, tmp_path):
    """Norms of heads and biases are counted too, in the file that is written."""
    before = sum(tensor.numel() for tensor in load_file(checkpoint(name) / "model.safetensors").values())
    place = ("--work", work_of(name))
    for option, most in (("--budget-params", before - 9000), ("--budget-bytes", 4 * (before - 9000))):
        solved = a3(*SOLVE, option, most, "--shape", shape, *place, "--json").json
        assert a3("export", tmp_path / "out", "--overwrite", *place).code == 0
        parameters = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
        assert solved["parameters"] == {"before": before, "after": parameters}
        assert solved["bytes"]["after"] == 4 * parameters
        step = 8 * (3 * 48 + 2) * (2 if shape == "stock" else 1)  # the largest between two sizes
        assert before - 9000 - step <= parameters <= before - 9000
        assert {size["qk"] for size in solved["sizes"]} == {16}


def test_rounding_names_the_multiple_of_what_a_budget_cuts(a3, work_of):
    place = ("--work", work_of("qwen3-gqa"), "--json")
    coarse = but(SOLVE, "--head-multiple", 8, "--mlp-multiple", 64)
    (warning,) = about_rounding(a3(*coarse, *PER_LAYER, "--kv-budget", 0.13, *place))
    assert warning.startswith("--kv-budget: 13 % were asked for, 25.0 % are removed, since sizes are rounded to ")
    assert warning.endswith("to --head-multiple 8; no multiple down to 2 (heads) comes within a tenth of the budget")
    before = a3(*coarse, "--budget", 0, *place).json["parameters"]["before"]
    most = before - 2 * 16 * 3 * 48 + 8  # nearly what 16 channels of each layer are
    (warning,) = about_rounding(a3(*coarse, "--budget-params", most, *place))
    assert warning.startswith("--budget-params: at most ")
    assert warning.endswith("to --mlp-multiple 64; use --mlp-multiple 16 to come within a tenth of the budget")
    assert about_rounding(a3(*but(coarse, "--mlp-multiple", 16), "--budget-params", most, *place)) == []


PLAN = ("--head-multiple", 2, "--mlp-multiple", 8)


def planned(found) -> tuple[int, int, int]:
    return tuple(found[name]["after"] for name in ("head_size", "value_head_size", "mlp_width"))


def test_a_plan_takes_the_same_budgets(a3, checkpoint):
    command = ("plan", checkpoint("qwen3-gqa"), *PLAN)
    found = a3(*command, *PER_LAYER, "--kv-budget", 0.3, "--json").json
    assert planned(found) == (16, 6, 96)
    assert found["kv_bytes_per_token"]["after"] == 22 / 32 * found["kv_bytes_per_token"]["before"]
    shown = " ".join(a3(*command, *PER_LAYER, "--kv-budget", 0.3).stdout.split())
    assert f"(asked: 30 % of the KV cache), all of them from value heads: {NORM}; sizes are means" in shown
    found = a3(*command, *PER_LAYER, "--kv-budget", 0.2, "--budget", 0.3, "--json").json
    assert planned(found)[:2] <= (16, 9)
    assert found["budget_reached"] >= 0.3
    before = found["parameters"]["before"]
    for option, most in (("--budget-params", before - 9000), ("--budget-bytes", 4 * (before - 9000))):
        head, value, width = planned(a3(*command, option, most, "--json").json)
        assert (head, value, width) == (16, 16, 64)  # 2 · 32 · 3 · 48 parameters less, of which 31.25 would do
        head, value, width = planned(a3(*command, *PER_LAYER, option, most, "--json").json)
        assert head == 16
        assert value < 16
        assert 64 < width < 96


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kv-budget", 0.45, *PER_LAYER), ("ov with head multiple 2 remove at most 0.4375", NORM)),
        (
            ("--budget-params", "1K"),
            ("mlp with MLP multiple 8 leave at least", f"({NORM}{STOCK})", "--shape per-layer"),
        ),
        (("--budget-bytes", "1KB", *PER_LAYER), ("ov,mlp with head multiple 2 and MLP multiple 8", f"({NORM})")),
    ],
)
def test_a_plan_refuses_what_solve_does(options, words, a3, checkpoint):
    refused(a3("plan", checkpoint("qwen3-gqa"), *PLAN, *options), *words)


def test_a_plan_refuses_a_budget_of_the_cache_where_heads_stay_whole(a3, checkpoint):
    outcome = a3("plan", checkpoint("smollm3-bias"), *PLAN, "--kv-budget", 0.3)
    refused(
        outcome, "--kv-budget 0.3: a3 cannot compress", f"{NO_ROPE}{STOCK}; use --shape per-layer, or --budget alone"
    )


def test_a_plan_warns_of_the_multiple_of_what_is_cut(a3, checkpoint):
    command = ("plan", checkpoint("qwen3-gqa"), "--mlp-multiple", 64, "--budget", 0.05, "--json")
    (warning,) = a3(*command).json["warnings"]
    assert "are removed, since sizes are rounded to --mlp-multiple 64; use --mlp-multiple 8" in warning


@pytest.mark.parametrize("budgets", [{"kv_budget": 0.2}, {"budget": [0.1, 0.2], "kv_budget": 0.2}])
def test_a_recipe_of_the_stock_shape_fails_before_it_calibrates(budgets, a3, checkpoint, text_file, tmp_path):
    source, recipe = checkpoint("qwen3-gqa"), tmp_path / "recipe.yaml"
    text = {"dataset": str(text_file), "samples": 2, "seq_len": 32}
    calibrate, solve = {"model": str(source), "text": text}, {**budgets, "method": "paper"}
    recipe.write_text(yaml.safe_dump({"work": "work", "out": "out", "calibrate": calibrate, "solve": solve}))
    for options in ((), ("--dry-run",)):
        refused(a3("run", recipe, *options, "--quiet"), "--kv-budget 0.2", f"{NORM}{STOCK}")
    with pytest.raises(A3Error, match="a norm follows"):
        compress(source, tmp_path / "out", dataset=str(text_file), kv_budget=0.2, method="paper")
    assert not (tmp_path / "work").exists()


def test_a_finished_recipe_of_several_budgets_stays_finished(a3, checkpoint, text_file, tmp_path):
    """The components that the family allows are part of what is compared."""
    recipe, text = tmp_path / "recipe.yaml", {"dataset": str(text_file), "samples": 2, "seq_len": 32}
    content = {"work": "work", "out": "out", "calibrate": {"model": str(checkpoint("smollm3-bias")), "text": text}}
    content |= {"solve": {"budget": [0.1, 0.2], "method": "paper", "mlp_multiple": 8}, "verify": False}
    recipe.write_text(yaml.safe_dump(content))
    assert a3("run", recipe, "--quiet").code == 0
    shown = a3("run", recipe, "--dry-run").stdout
    assert [shown.count(f"# {stage}") for stage in ("solve", "export")] == [2, 2]
    assert "other settings" not in shown
    assert "not started" not in shown


def test_a_finished_solution_needs_no_source(a3, checkpoint, text_file, tmp_path):
    """What its model type allows is recorded with it."""
    source, place = shutil.copytree(checkpoint("qwen3-gqa"), tmp_path / "source"), ("--work", tmp_path / "work")
    assert a3("calibrate", source, "--dataset", text_file, *SHORT, *place).code == 0
    command = (*(each for each in SOLVE if each != "--overwrite"), "--kv-budget", 0.3, *place)
    found = a3(*command, *PER_LAYER, "--json").json
    shutil.move(source, tmp_path / "elsewhere")
    assert a3(*command, *PER_LAYER, "--json").json["sha256"] == found["sha256"]
    refused(a3(*command), "other settings", "shape")
    refused(a3(*command, *PER_LAYER, "--components", "qk,ov"), "differs in components")


def test_layers_may_have_a_window_and_no_rope(checkpoint):
    shape = describe(resolve_model(str(checkpoint("smollm3-window")))).shape
    assert shape.windows == (None, 24)
    assert shape.still_layers == (1,)
