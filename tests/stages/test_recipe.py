"""Recipes: all stages from one file, resumable; all problems of a file in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT, but, refused, snapshot
from tests.helpers.statistics import assert_close

pytestmark = pytest.mark.usefixtures("hasty")


@pytest.fixture
def recipe(checkpoint, text_file, tmp_path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    text = {"dataset": str(text_file), "samples": 4, "seq_len": 64}
    content = {
        "work": "../work",
        "out": "model",
        "calibrate": {"model": str(checkpoint("llama-gqa")), "text": text, "batch_size": 2},
        "solve": {"budget": 0.25, "head_multiple": 2, "mlp_multiple": 8},
        "verify": False,  # it runs in another process, which takes seconds
        "eval": {"against": str(checkpoint("llama-gqa")), "text": {**text, "samples": 2}},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def edit(recipe: Path, section: str, **changes) -> None:
    content = yaml.safe_load(recipe.read_text())
    content.setdefault(section, {}).update(changes)
    recipe.write_text(yaml.safe_dump(content))


def times(*folders: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for folder in folders for p in folder.rglob("*") if p.name != ".lock"}


def test_a_recipe_runs_all_stages_and_then_nothing(a3, recipe, tmp_path, monkeypatch):
    first = a3("run", recipe, "--json").json
    assert list(first) == ["calibrate", "solve", "export", "eval"]
    assert first["solve"]["budget_reached"] >= 0.25
    assert first["eval"]["perplexity"] > 1
    work, out = tmp_path / "work", tmp_path / "recipes" / "model"  # both relative to the recipe's folder
    manifest = json.loads((out / "a3_manifest.json").read_text())
    assert manifest["solution"]["sha256"] == first["solve"]["sha256"]
    before = times(work, out)
    monkeypatch.chdir(recipe.parent)
    assert a3("run", recipe.name, "--json").json == first
    assert times(work, out) == before
    assert a3("run", recipe.name).code == 0


def verifying(recipe: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    del content["verify"]
    recipe.write_text(yaml.safe_dump(content))


def test_a_run_verifies_its_export_once(a3, recipe, monkeypatch):
    verifying(recipe)
    edit(recipe, "solve", shape="per-layer")  # its code may run, since a3 ships it
    edit(recipe, "eval", trust_remote_code=True)
    first = a3("run", recipe, "--json").json
    assert list(first) == ["calibrate", "solve", "export", "verify", "eval"]
    assert {each["outcome"] for each in first["verify"]["checks"]} == {"passed"}
    monkeypatch.setattr("a3cli.stages.run.verify", pytest.fail)
    assert a3("run", recipe, "--json").json == first
    monkeypatch.setattr("a3cli.stages.run.versions", lambda: {"transformers": "6.0"})
    asked = []
    monkeypatch.setattr("a3cli.stages.run.verify", lambda out, *_, **__: asked.append(out) or first["verify"])
    assert a3("run", recipe, "--json").json == first
    assert asked == [recipe.parent / "model"]  # another version of transformers may load it differently
    without = a3("run", recipe, "--no-verify", "--json").json
    assert "verify" not in without


def test_an_export_that_fails_verify_fails_the_run_and_is_not_evaluated(a3, recipe, monkeypatch):
    verifying(recipe)
    failed = {"name": "generate", "outcome": "failed", "detail": "with a cache token 3 is 7, without one 9"}
    result = {"model": "model", "passed": False, "checks": [failed], "versions": {}}
    monkeypatch.setattr("a3cli.stages.run.verify", lambda *_, **__: result)
    for _ in range(2):  # a failure is not stored
        outcome = a3("run", recipe, "--json")
        assert outcome.code == 1
        assert "generate (with a cache token 3 is 7" in outcome.stderr.splitlines()[-1]
        assert list(outcome.json) == ["calibrate", "solve", "export", "verify"]


def test_relative_paths_start_at_the_recipe(recipe):
    from a3cli.stages.recipe import read_recipe

    edit(recipe, "export", evaluations=["./eval.json", "other.json"])
    edit(recipe, "eval", model="../smaller", against="owner/name", tasks_path="./tasks")
    found, folder = read_recipe(recipe), recipe.parent
    assert found.export.evaluations == (folder / "eval.json", Path("other.json"))
    assert (found.evaluation.model, found.evaluation.against) == (str(folder.parent / "smaller"), "owner/name")
    assert found.evaluation.tasks_path == folder / "tasks"


def test_a_recipe_without_its_folders_says_so(a3, recipe):
    content = yaml.safe_load(recipe.read_text())
    del content["out"]
    recipe.write_text(yaml.safe_dump(content))
    outcome = a3("run", recipe)
    refused(outcome, f"recipe {recipe}: out is missing (the folder of the export; or give --out)")
    assert "model" not in outcome.stderr.partition("small.yaml")[2]
    del content["work"]
    recipe.write_text(yaml.safe_dump(content))
    refused(a3("run", recipe), "out is missing", "work is missing (the work folder; or give --work)")


def test_the_same_as_the_commands(a3, recipe, checkpoint, text_file, tmp_path):
    assert a3("run", recipe).code == 0
    work = ("--work", tmp_path / "by-hand")
    text = ("--dataset", text_file, "--samples", 4, "--seq-len", 64, "--batch-size", 2)
    assert a3("calibrate", checkpoint("llama-gqa"), *text, *work).code == 0
    assert a3("solve", "--budget", 0.25, "--head-multiple", 2, "--mlp-multiple", 8, *work).code == 0
    assert a3("export", tmp_path / "out", *work).code == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "recipes" / "model")


def test_solve_and_export_in_as_many_processes_as_a_recipe_says(a3, recipe, tmp_path, monkeypatch):
    from a3cli.work import processes

    counts = []

    def spread(work, items, count):
        counts.append(count)
        return processes.spread(work, items, count)

    assert a3("run", recipe, "--work", tmp_path / "w", "--out", tmp_path / "o").code == 0
    for section, module in (("solve", "context"), ("export", "export")):
        edit(recipe, section, num_processes=3)
        monkeypatch.setattr(f"a3cli.stages.{module}.spread", spread)
    assert a3("run", recipe).code == 0
    assert set(counts) == {3}
    assert snapshot(tmp_path / "o") == snapshot(tmp_path / "recipes" / "model")


def test_a_recipe_tells_several_processes_all_that_it_says(a3, recipe, tmp_path, monkeypatch):
    """The processes get a command that requests exactly the calibration that was made here by one process."""
    launched = []
    monkeypatch.setattr("a3cli.stages.run.launch", lambda count, arguments: launched.append((count, arguments)))
    changes = {"num_processes": 3, "dtype": "bfloat16", "mlp_stats": "full", "full_check": True, "batch_size": 4}
    edit(recipe, "calibrate", **changes)
    assert a3("run", recipe, "--max-minutes", 5, "--quiet").code == 0
    ((count, arguments),) = launched
    assert count == 3
    assert "--quiet" in arguments
    before = times(tmp_path / "work" / "calibration")
    assert a3(*arguments).code == 0
    assert times(tmp_path / "work" / "calibration") == before
    refused(a3(*but(tuple(arguments), "--seed", 1)), "differs in seed")


@pytest.mark.slow
def test_calibrate_in_as_many_processes_as_a_recipe_says(a3, recipe, tmp_path):
    """stdout has only the result, and finished work is not repeated."""
    assert a3("run", recipe, "--work", tmp_path / "alone", "--out", tmp_path / "o").code == 0
    edit(recipe, "calibrate", num_processes=2)
    command = [sys.executable, "-m", "a3cli", "run", recipe, "--json", "--quiet"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert ended.stderr == ""
    first = json.loads(ended.stdout)
    assert first["calibrate"]["made_with"] == 2 * [{"processes": 2, "batch_size": 2}]
    assert_close([tmp_path / "alone", tmp_path / "work"])
    before = times(tmp_path / "work")
    assert a3("run", recipe, "--json").json == first
    assert times(tmp_path / "work") == before
    edit(recipe, "calibrate", text={"dataset": "none.txt", "samples": 4, "seq_len": 64})
    refused(a3("run", recipe, "--overwrite", "--quiet"), "none.txt")


@pytest.mark.parametrize("stage", ["solve", "export", "evaluate"])
def test_stopped_in_a_stage_it_goes_on_there(stage, a3, recipe, tmp_path, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"a3cli.stages.run.{stage}", stop)
        assert a3("run", recipe).code == 3
    done = times(tmp_path / "work" / "calibration")
    assert done
    with monkeypatch.context() as patch:
        patch.setattr("a3cli.stages.calibrate.Sweep", stop)  # not needed again
        assert a3("run", recipe).code == 0
    assert times(tmp_path / "work" / "calibration") == done


def test_other_settings_are_refused_or_done_anew(a3, recipe, tmp_path):
    assert a3("run", recipe).code == 0
    edit(recipe, "solve", budget=0.3)
    refused_line = a3("run", recipe)
    assert refused_line.code == 2
    assert "differs in budget" in refused_line.stderr
    assert a3("run", recipe, "--overwrite", "--json").json["solve"]["budget_asked"] == 0.3
    edit(recipe, "export", dtype="bfloat16")
    assert "not empty" in a3("run", recipe).stderr
    edit(recipe, "export", overwrite=True)
    assert a3("run", recipe, "--json").json["export"]["dtype"] == "bfloat16"
    (tmp_path / "recipes" / "model" / "model.safetensors").unlink()
    assert a3("run", recipe).code == 0
    assert (tmp_path / "recipes" / "model" / "model.safetensors").is_file()


def flipped(content: bytes) -> bytes:
    return content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", flipped),
        ("model.safetensors", None),
        ("config.json", flipped),
        ("a3_manifest.json", flipped),
        ("a3_manifest.json", lambda _: b"{}"),
        ("a3_manifest.json", lambda _: b""),
    ],
)
def test_a_damaged_export_is_made_again(name, damage, a3, recipe, tmp_path):
    """The new export has the same bytes, and a line names the damaged file."""
    first = a3("run", recipe, "--json").json
    out = tmp_path / "recipes" / "model"
    before = snapshot(out)
    (out / name).write_bytes(damage(before[name])) if damage else (out / name).unlink()
    outcome = a3("run", recipe, "--json")
    assert outcome.code == 0, outcome
    assert f"exporting {out} again: {out / name} " in " ".join(outcome.stderr.split())
    assert outcome.json == first
    assert snapshot(out) == before


def test_a_failed_gate_fails_the_run(a3, recipe):
    """The failed gate and the distance from its limit are reported by the run that measures and by later runs."""
    edit(recipe, "eval", fail_if=["kl > 0", "top1_agreement < 0"])
    for arguments in ((), ("--json",)):
        outcome = a3("run", recipe, *arguments)
        assert outcome.code == 1
        line = outcome.stderr.splitlines()[-1]
        assert line.startswith("error: 1 gate failed: kl > 0: ")
        assert "above the limit on " in line
        assert outcome.stdout
    edit(recipe, "eval", fail_if=["kl < 0"])
    assert a3("run", recipe).code == 0


def test_work_and_out_can_be_elsewhere(a3, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert a3("run", recipe, "--work", "w", "--out", "o").code == 0
    assert (tmp_path / "w" / "solution" / "manifest.json").is_file()
    assert (tmp_path / "o" / "config.json").is_file()
    assert not (tmp_path / "work").exists()


def test_all_problems_in_one_line(a3, recipe):
    edit(recipe, "solve", budget=1.5, methud="best")
    edit(recipe, "calibrate", batch_size=0)
    edit(recipe, "extra", key=1)
    refused(a3("run", recipe), str(recipe), "solve.budget", "solve.methud", "calibrate.batch_size", "extra")


def test_contradictions_are_found_before_any_work(a3, recipe, tmp_path):
    edit(recipe, "solve", attention_budget=0.1, mlp_budget=0.1)
    refused(a3("run", recipe), "contradict")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds nothing (null), not the settings of the stages by name"),
        ("[1, 2]", "list"),
        ("work: [", "line 1"),
        ("work: a\n  out: b\n", "line 2"),
        ("a: &a [*a]", "work is missing (the work folder; or give --work)"),
        ("!!python/object/apply:os.system ['true']", "YAML"),
        ("\x00", "YAML"),
    ],
)
def test_what_is_no_recipe(content, words, a3, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    refused(a3("run", path), str(path), words)
    path.write_bytes(b"\xff\xfe\xfa")
    refused(a3("run", path), str(path))
    refused(a3("run", tmp_path / "none.yaml"), "none.yaml")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["work", "out", "calibrate", "solve", "export", "eval", "text", "model", "budget", "samples"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(KEYS, values | st.dictionaries(KEYS, values, max_size=4), max_size=6))
def test_malformed_recipes_are_refused_in_one_line(content, a3, tmp_path):
    path = tmp_path / "random.yaml"
    path.write_text(yaml.safe_dump(content))
    refused(a3("run", path), "random.yaml")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text(max_size=60))
def test_random_text_is_refused_in_one_line(content, a3, tmp_path):
    path = tmp_path / "random.yaml"
    path.write_text(content, "utf-8", newline="")
    refused(a3("run", path), "random.yaml")


SHIPPED = {
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "tiny": str(ROOT / "demo" / "model"),
    "tiny-budgets": str(ROOT / "demo" / "model"),
}


def test_all_that_ship_are_known():
    assert {path.stem for path in (ROOT / "configs").iterdir()} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_recipes_that_ship(name):
    from a3cli.stages.context import check_settings
    from a3cli.stages.recipe import read_recipe

    path = ROOT / "configs" / f"{name}.yaml"
    recipe = read_recipe(path)
    check_settings(recipe.solve)
    assert recipe.work == ROOT / "runs" / path.stem / "work"
    assert recipe.evaluation.model == str(recipe.out)
    assert recipe.calibrate.model == recipe.evaluation.against == SHIPPED[name]
    assert recipe.calibrate.batch_size is None  # auto
    for line in path.read_text().splitlines():  # every given setting describes itself
        documented = "#" in line or line.endswith(":") or line.startswith(("work", "out")) or not line
        assert documented or line.split(":")[0].strip() in LATER, line


LATER = ("model", "method", "max_shard_size", "against", "seq_len", "samples")
