"""A list of budgets in a recipe: one calibration, and a solution, an export and its checks for each."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from a3cli.settings.names import SOLUTION_NAME, name_of_budget
from a3cli.stages.recipe import read_recipe
from tests.conftest import refused, snapshot
from tests.helpers.commands import write_recipe

pytestmark = pytest.mark.usefixtures("hasty")
NAMES = ["q10", "q37.5"]


@pytest.fixture
def recipe(checkpoint, text_file, tmp_path) -> Path:
    solve = {"budget": [0.1, 0.375], "head_multiple": 2, "mlp_multiple": 8}
    return write_recipe(tmp_path / "recipe.yaml", checkpoint("llama-gqa"), text_file, solve=solve)


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_each_budget_has_its_solution_and_export(a3, recipe, tmp_path, monkeypatch):
    found = a3("run", recipe, "--json").json
    assert list(found) == ["calibrate", "solutions"]
    assert [each["name"] for each in found["solutions"]] == NAMES
    assert [each["out"] for each in found["solutions"]] == [str(tmp_path / "out" / name) for name in NAMES]
    assert [each["solve"]["budget_asked"] for each in found["solutions"]] == [0.1, 0.375]
    perplexities = [each["eval"]["perplexity"] for each in found["solutions"]]
    assert len({*perplexities}) == 2
    for each in found["solutions"]:
        assert each["eval"]["model"] == each["out"]
        assert json.loads((Path(each["out"]) / "a3_manifest.json").read_text()) == each["export"]
    assert {path.name for path in (tmp_path / "work" / "solutions").iterdir() if path.is_dir()} == set(NAMES)
    before = times(tmp_path)
    for stage in ("solve.analyse", "export.write_checkpoint", "run.evaluate", "calibrate.Calibration.run"):
        monkeypatch.setattr(f"a3cli.stages.{stage}", pytest.fail)
    assert a3("run", recipe, "--json").json == found
    assert "nothing was left to do" in a3("run", recipe).stdout
    assert times(tmp_path) == before


def test_the_same_bytes_as_one_budget_alone(a3, recipe, tmp_path):
    assert a3("run", recipe, "--set", "eval=null").code == 0
    alone = ("--set", "solve.budget=0.375", "--set", "eval=null", "--work", tmp_path / "w", "--out", tmp_path / "o")
    assert a3("run", recipe, *alone).code == 0
    assert snapshot(tmp_path / "out" / "q37.5") == snapshot(tmp_path / "o")


def test_a_table_compares_them(a3, recipe, tmp_path):
    outcome = a3("run", recipe)
    assert outcome.code == 0
    rows = {
        cells[0]: cells
        for line in outcome.stdout.splitlines()
        if "│" in line and (cells := [cell.strip() for cell in line.strip("│").split("│")])
    }
    assert {"source", *NAMES} <= rows.keys()
    manifest = json.loads((tmp_path / "out" / "q10" / "a3_manifest.json").read_text())["solution"]
    assert rows["source"][2] == "0.0 %"
    assert rows["q10"][2] == f"{100 * manifest['budget_reached']:.1f} %"
    assert rows["q10"][3:6] == [str(manifest["sizes"][0][key]) for key in ("qk", "ov", "mlp")]
    assert rows["q10"][7] == f"{manifest['kv_bytes_per_token']['after']:,}"
    evaluation = json.loads((tmp_path / "work" / "solutions" / ".q10.evaluation.json").read_text())["result"]
    assert rows["q10"][8:] == [f"{evaluation['perplexity']:,.2f}", f"{evaluation['kl']:.4f}"]
    assert rows["source"][8] == f"{evaluation['source_perplexity']:,.2f}"
    assert f"q37.5: {tmp_path / 'out' / 'q37.5'}" in outcome.stdout
    stages = ("calibrate", "solve", "export", "eval")
    lines = [line.split() for line in outcome.stderr.splitlines() if line.split()[0] in stages]
    expected = ["calibrate", *(f"{stage} {name}" for name in NAMES for stage in stages[1:])]
    assert [" ".join(line) for line in lines if len(line) < 3] == expected


def test_stopped_between_two_it_resumes_there(a3, recipe, tmp_path, monkeypatch):
    from a3cli.stages import run

    done = []

    def stop(recipe, *arguments, **options):
        if done:
            raise KeyboardInterrupt
        done.append(recipe)
        return exported(recipe, *arguments, **options)

    exported = run.exported
    with monkeypatch.context() as patch:
        patch.setattr(run, "exported", stop)
        assert a3("run", recipe).code == 3
    assert (tmp_path / "out" / "q10").is_dir()
    assert not (tmp_path / "out" / "q37.5").exists()
    before = times(tmp_path / "out" / "q10") | times(tmp_path / "work" / "calibration")
    assert a3("run", recipe).code == 0
    assert (times(tmp_path / "out" / "q10") | times(tmp_path / "work" / "calibration")) == before
    shutil.rmtree(tmp_path / "out" / "q37.5")
    assert a3("run", recipe).code == 0
    assert times(tmp_path / "out" / "q10") == {path: at for path, at in before.items() if "q10" in path.parts}


def test_all_run_and_the_last_line_names_those_that_failed(a3, recipe):
    figures = [each["eval"]["kl"] for each in a3("run", recipe, "--json").json["solutions"]]
    between = sum(figures) / 2
    assert figures[0] < between < figures[1]
    outcome = a3("run", recipe, "--set", f"eval.fail_if=[kl > {between}]")
    assert outcome.code == 1
    assert outcome.stderr.splitlines()[-1].startswith("error: 1 of 2 solutions failed: q37.5: 1 gate failed: kl > ")
    assert [line.split("│")[2].strip() for line in outcome.stdout.splitlines() if "│ q" in line] == ["passed", "FAILED"]
    outcome = a3("run", recipe, "--set", "eval.fail_if=[kl > -1]", "--json")
    assert outcome.code == 1
    assert len(outcome.json["solutions"]) == 2  # the first failure does not stop the second
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("error: 2 of 2 solutions failed: q10: ")
    assert "; q37.5: " in last


def test_a_failed_check_fails_the_run(a3, recipe, monkeypatch):
    def verify(out, *_, **__):
        outcome = "failed" if out.name == "q10" else "passed"
        checks = [{"name": "generate", "outcome": outcome, "detail": "other tokens"}]
        return {"model": str(out), "passed": outcome == "passed", "checks": checks, "versions": {}}

    monkeypatch.setattr("a3cli.stages.run.verify", verify)
    outcome = a3("run", recipe, "--set", "verify={}", "--json")
    assert outcome.code == 1
    assert ["eval" in each for each in outcome.json["solutions"]] == [False, True]
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("error: 1 of 2 solutions failed: q10: ")
    assert "generate (other tokens)" in last


def test_a_dry_run_shows_every_one(a3, recipe, tmp_path):
    assert a3("run", recipe, "--set", "solve.budget=[0.1]", "--set", "eval=null").code == 0
    before = snapshot(tmp_path)
    found = a3("run", recipe, "--dry-run", "--json").json
    assert found["stages"]["calibrate"]["state"] == "finished"
    assert [(each["name"], each["out"]) for each in found["solutions"]] == [
        (name, str(tmp_path / "out" / name)) for name in NAMES
    ]
    states = [{name: stage["state"] for name, stage in each["stages"].items()} for each in found["solutions"]]
    new = "not started"
    assert states == [
        {"solve": "finished", "export": "finished", "eval": new},
        {"solve": new, "export": new, "eval": new},
    ]
    assert found["solutions"][1]["stages"]["solve"]["settings"]["budget"] == 0.375
    outcome = a3("run", recipe, "--dry-run")
    assert "# solve q10: finished" in outcome.stdout.splitlines()
    assert "# solve q37.5: not started" in outcome.stdout.splitlines()
    assert outcome.stdout.count("# calibrate: finished") == 1
    assert yaml.safe_load(outcome.stdout)["solve"]["budget"] == [0.1, 0.375]
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(outcome.stdout)
    assert read_recipe(resolved) == read_recipe(recipe)
    resolved.unlink()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("solve.budget=[0.1, 2]", ("solve.budget.1 2", "must be below 1")),
        ("solve.budget=[]", ("solve.budget", "at least 1 entries")),
        ("solve.budget=[0.1, 0.1]", ("must not name a budget twice",)),
        ("solve.budget=[a]", ("solve.budget.0 'a'", "must be a number")),
        ("solve.budgett=[0.1]", ("solve has no 'budgett' (did you mean 'budget'?)",)),
        ("eval.model=elsewhere", ("eval.model: the export of each budget is evaluated",)),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(change, words, a3, recipe, tmp_path):
    refused(a3("run", recipe, "--set", change), *words)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_contradictions_are_found_before_any_work(options, a3, recipe, tmp_path):
    both = ("--set", "solve.attention_budget=0.1", "--set", "solve.mlp_budget=0.1")
    refused(a3("run", recipe, *both, *options), "contradict")
    assert not (tmp_path / "work").exists()


def test_an_export_is_not_written_over_by_those_of_several(a3, recipe, tmp_path):
    assert a3("run", recipe, "--set", "solve.budget=0.1", "--set", "eval=null").code == 0
    refused(a3("run", recipe), f"{tmp_path / 'out'} is an export", "choose another out")


def test_names(recipe):
    assert [name_of_budget(each) for each in (0, 0.1, 0.25, 0.125, 0.3, 1e-6)] == [
        "q0", "q10", "q25", "q12.5", "q30", "q0.0001",
    ]  # fmt: skip
    named = read_recipe(recipe, changes=["solve.name=paper", "export.push_to_hub=me/small"]).each()
    assert [each.solve.name for each in named] == [f"paper-{name}" for name in NAMES]
    assert [each.out.name for each in named] == [f"paper-{name}" for name in NAMES]
    assert [each.export.push_to_hub for each in named] == [f"me/small-{name}" for name in NAMES]


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_every_budget_has_a_name_of_its_own(one, other):
    assert (name_of_budget(one) == name_of_budget(other)) == (one == other)
    if one == 0 or one > 1e-60:
        assert SOLUTION_NAME.fullmatch(name_of_budget(one))
