"""`a3 run --dry-run` and `--set`: what a recipe amounts to, told without doing anything."""

from pathlib import Path

import pytest
import yaml

from a3cli.stages.recipe import read_recipe
from tests.conftest import refused, snapshot
from tests.helpers.commands import write_recipe

pytestmark = pytest.mark.usefixtures("hasty")
STAGES = ["calibrate", "solve", "export", "verify", "eval"]


@pytest.fixture
def recipe(checkpoint, text_file, tmp_path) -> Path:
    source, whole = checkpoint("llama-gqa"), {"dataset": str(text_file), "samples": None, "seq_len": 32}
    evaluation = {"against": str(source), "text": whole, "fail_if": ["kl > 100"]}
    return write_recipe(tmp_path / "recipe.yaml", source, text_file, verify={}, eval=evaluation)


@pytest.fixture
def states(a3, recipe, tmp_path):
    """Return a function that gives the state of each stage, and checks that nothing was written."""

    def found(*options: object) -> dict[str, str]:
        before = snapshot(tmp_path)
        outcome = a3("run", recipe, "--dry-run", *options, "--json")
        assert (outcome.code, outcome.stderr) == (0, "")
        assert snapshot(tmp_path) == before
        return {name: stage["state"] for name, stage in outcome.json["stages"].items()}

    return found


def test_a_dry_run_says_which_stages_are_finished(a3, recipe, states, tmp_path, monkeypatch):
    new = "not started"
    assert states() == dict.fromkeys(STAGES, new)
    done = dict.fromkeys(STAGES, "finished")
    stages = {"solve": "solve", "export": "exported", "verify": "verified", "eval": "evaluated"}
    for count, (stage, function) in enumerate(stages.items(), 1):  # stopped before each stage in turn
        with monkeypatch.context() as patch:
            patch.setattr(f"a3cli.stages.run.{function}", lambda *_, **__: 1 / 0)
            assert a3("run", recipe).code == 70
        assert states() == {name: "finished" if i < count else new for i, name in enumerate(STAGES)}, stage
    assert a3("run", recipe).code == 0
    assert states() == done
    assert states("--no-verify") == {name: "finished" for name in STAGES if name != "verify"}
    assert states("--overwrite") == dict.fromkeys(STAGES, new)
    assert states("--set", "eval.bootstrap=10") == done | {"eval": new}
    assert states("--set", "solve.budget=0.3") == dict.fromkeys(STAGES, new) | {
        "calibrate": "finished",
        "solve": "other settings",
    }
    assert states("--set", "calibrate.text.seed=1") == dict.fromkeys(STAGES, new) | {"calibrate": "other settings"}
    other = dict.fromkeys(STAGES, new) | {"calibrate": "finished", "solve": "finished", "export": "other settings"}
    assert states("--set", "export.dtype=float16") == other
    assert states("--set", "export.dtype=float16", "--set", "export.overwrite=true") == other | {"export": new}


def test_a_dry_run_sees_unfinished_stages(a3, recipe, states):
    assert a3("run", recipe, "--max-minutes", 0).code == 3
    found = states()
    assert found == dict.fromkeys(STAGES, "not started") | {"calibrate": "unfinished"}


def test_a_dry_run_prints_a_recipe_with_every_setting(a3, recipe, tmp_path):
    outcome = a3("run", recipe, "--dry-run", "--set", "solve.budget=0.3")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "# calibrate: not started" in outcome.stdout.splitlines()
    resolved = tmp_path / "elsewhere" / "resolved.yaml"
    resolved.parent.mkdir()
    resolved.write_text(outcome.stdout)
    assert read_recipe(resolved) == read_recipe(recipe, changes=["solve.budget=0.3"])
    assert {"method", "rope_form", "ridge"} < yaml.safe_load(outcome.stdout)["solve"].keys()
    without = a3("run", recipe, "--dry-run", "--no-verify")
    assert yaml.safe_load(without.stdout)["verify"] is False


def test_a_dry_run_names_what_differs(a3, recipe):
    assert a3("run", recipe, "--max-minutes", 0).code == 3
    outcome = a3("run", recipe, "--dry-run", "--set", "calibrate.text.seed=1")
    assert "# calibrate: other settings; differs in seed; use --overwrite or another --work" in outcome.stdout


def test_a_dry_run_refuses_settings_that_contradict_each_other(a3, recipe):
    refused(a3("run", recipe, "--dry-run", "--set", "solve.budget=null"), "no budget")


def test_settings_are_changed(recipe):
    changes = [
        "solve.budget=0.3",
        "solve.components=[mlp]",
        "calibrate.text.samples=5",
        "eval.text.seq_len=16",
        "export.max_shard_size=1GB",
        "verify=false",
        "out=other",
    ]
    found = read_recipe(recipe, changes=changes)
    assert (found.solve.budget, found.solve.components) == (0.3, ("mlp",))
    assert (found.calibrate.text.samples, found.evaluation.texts[0].seq_len) == (5, 16)
    assert (found.export.max_shard_size, found.verify) == (10**9, False)
    assert found.out == recipe.parent / "other"  # as if the file said so
    assert read_recipe(recipe, changes=["solve.budget=0.3", "solve.budget=0.4"]).solve.budget == 0.4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("solve.budgett=0.3", ("--set solve.budgett: solve has no 'budgett' (did you mean 'budget'?)",)),
        ("slove.budget=0.3", ("a recipe has no 'slove' (did you mean 'solve'?)",)),
        ("eval.text.sampels=3", ("eval.text has no 'sampels' (did you mean 'samples'?)",)),
        ("zzz=1", ("a recipe has no 'zzz'; it has work, out, calibrate, solve, export, verify, eval",)),
        ("solve.budget.x=1", ("solve.budget is one value",)),
        ("eval.texts.dataset=a", ("eval.texts is one value, or a list",)),
        ("solve.budget", ("not of the form PATH=VALUE",)),
        ("solve.budget=[", ("cannot be read as YAML",)),
        ("solve.budget=2", ("solve.budget 2", "must be below 1")),
    ],
)
def test_a_change_that_does_not_fit_is_refused(a3, recipe, change, words):
    refused(a3("run", recipe, "--set", change), *words)


def test_a_section_that_is_switched_off_has_no_settings(a3, recipe):
    recipe.write_text(recipe.read_text() + "verify: false\n")
    refused(a3("run", recipe, "--set", "verify.device=cpu"), "the recipe has verify: False, not settings by name")
