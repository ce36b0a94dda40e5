"""Several solutions of one calibration, each with a name, in one work folder."""

import json
import shutil
from contextlib import contextmanager

import pytest

from a3cli.stages import solve
from tests.conftest import SHORT, SOLVE, but, refused, snapshot

pytestmark = pytest.mark.usefixtures("hasty")


def files(folder):
    """Return the files of a folder, of a work folder without what is kept for further solutions."""
    found, further = snapshot(folder).items(), ("kept/", "gradients/", "channels/")
    return {name: data for name, data in found if data is not None and not name.startswith(further)}


def test_a_second_budget_needs_neither_overwrite_nor_a_calibration(a3, work, tmp_path):
    """The solution without a name stays as it is, and each export keeps its reference."""
    before = files(work)
    other = but(SOLVE, "--budget", 0.4)
    refused(a3(*other, "--work", work), "other settings", "--overwrite", "--name", "--work")
    assert a3(*other, "--work", work, "--name", "q40").code == 0
    after = files(work)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("solutions/q40/") for name in after.keys() - before.keys())
    assert a3("export", tmp_path / "plain", "--work", work).code == 0
    assert a3("export", tmp_path / "q40", "--work", work, "--name", "q40").code == 0
    assert a3(*but(SOLVE, "--budget", 0.1), "--work", work, "--overwrite").code == 0
    checks = {name: a3("verify", tmp_path / name, "--work", work, "--json").json["checks"] for name in ("plain", "q40")}
    (reference,) = (each for each in checks["q40"] if each["name"] == "reference")
    assert reference["outcome"] == "passed"
    (reference,) = (each for each in checks["plain"] if each["name"] == "reference")
    assert (reference["outcome"], "holds another solution" in reference["detail"]) == ("skipped", True)


def test_a_name_changes_no_byte(a3, work, tmp_path):
    """The same settings give the same solution and the same export under every name, and without one."""
    assert a3(*SOLVE, "--work", work, "--overwrite").code == 0
    for name in ("a", "b"):
        assert a3(*SOLVE, "--work", work, "--name", name).code == 0
        assert a3("export", tmp_path / name, "--work", work, "--name", name).code == 0
    assert a3("export", tmp_path / "plain", "--work", work).code == 0
    assert files(work / "solutions" / "a") == files(work / "solutions" / "b") == files(work / "solution")
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "plain")


def test_a_damaged_solution_is_not_taken_for_another(a3, work, tmp_path):
    """A damaged manifest matters only if no other solution is the one of the export; the remedy has the name."""
    assert a3(*but(SOLVE, "--budget", 0.4), "--work", work, "--name", "q40").code == 0
    assert a3("export", tmp_path / "out", "--work", work, "--name", "q40").code == 0
    (work / "solution" / "manifest.json").write_text("{}")
    assert a3("verify", tmp_path / "out", "--work", work, "--require-reference").code == 0
    (work / "solutions" / "q40" / "manifest.json").write_text("{}")
    shutil.rmtree(work / "solution")
    found = a3("verify", tmp_path / "out", "--work", work)
    assert (found.code, "run a3 solve --overwrite --name q40" in found.stderr) == (1, True)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "a b", "ä", "-a", "a\n", "x" * 101])
def test_names_that_are_no_folders_are_refused(name, a3, work):
    before = snapshot(work)
    for command in (SOLVE, ("export", work.parent / "out")):
        refused(a3(*command, "--work", work, f"--name={name}"), "--name", "letters, digits")
    assert a3("inspect", work, f"--name={name}").code == 2
    assert snapshot(work) == before


def test_what_is_missing_is_named(a3, work):
    assert a3(*SOLVE, "--work", work, "--name", "q25").code == 0
    out = ("export", work.parent / "out", "--work", work)
    refused(a3(*out, "--name", "other"), "no finished solution named other", "--name q25", "leave out --name")
    shutil.rmtree(work / "solution")
    refused(a3(*out), "without a name", "--name q25")
    refused(a3("inspect", work, "--name", "other"), "no solution named other", "q25")
    assert a3(*out, "--name", "q25").code == 0
    refused(a3("inspect", work.parent / "out", "--name", "q25"), "is an export", "leave out --name")


def test_inspect_lists_all_and_shows_one(a3, work, tmp_path):
    for budget in (0.1, 0.4):
        assert a3(*but(SOLVE, "--budget", budget), "--work", work, "--name", f"q{budget}").code == 0
    found = a3("inspect", work, "--json").json
    assert [(each["name"], each["budget_asked"]) for each in found["solutions"]] == [
        (None, 0.25),
        ("q0.1", 0.1),
        ("q0.4", 0.4),
    ]
    one = a3("inspect", work, "--name", "q0.4", "--json").json
    manifest = json.loads((work / "solutions" / "q0.4" / "manifest.json").read_text())
    assert (one["name"], one["stage"], one["solution"]["sha256"]) == ("q0.4", "solved", manifest["sha256"])
    assert one["solutions"][2]["sizes"] == manifest["sizes"]
    assert one["solutions"][2]["predicted_loss"] == manifest["predicted_loss"]
    assert [each["mlp"]["size"] for each in one["layers"]] == [each["mlp"] for each in manifest["sizes"]]
    shown = a3("inspect", work).stdout
    for word in ("without a name", "q0.1", "q0.4", "10 %", "40 %"):
        assert word in shown
    assert "solved as q0.4" in a3("inspect", work, "--name", "q0.4").stdout
    page = tmp_path / "page.html"
    assert a3("report", work, "--name", "q0.4", "--html", page).code == 0
    assert "--budget 0.4" in page.read_text()


def test_a_new_calibration_leaves_no_solution(a3, work, source, text_file, monkeypatch):
    """Finished or not, with a name or without; files that are not a3's stay."""
    assert a3(*SOLVE, "--work", work, "--name", "q25").code == 0
    with stopped_after_one_layer(monkeypatch):
        assert a3(*but(SOLVE, "--budget", 0.4), "--work", work, "--name", "q40", "--num-processes", 1).code == 3
    assert (work / "solutions" / ".q40.a3-progress.json").is_file()
    assert (work / "solutions" / ".q40.a3-partial").is_dir()
    again = ("calibrate", source, "--dataset", text_file, *SHORT, "--work", work, "--overwrite")
    assert a3(*again).code == 0
    assert {path.name for path in work.iterdir()} & {"solution", "solutions"} == set()
    assert a3(*SOLVE, "--work", work, "--name", "q25").code == 0
    (work / "solutions" / "mine.txt").write_text("mine")
    assert a3(*again).code == 0
    assert [path.name for path in (work / "solutions").iterdir()] == ["mine.txt"]


@contextmanager
def stopped_after_one_layer(monkeypatch):
    plain, written = solve.write_layer, []

    def one_layer(*arguments):
        if written:
            raise KeyboardInterrupt
        written.append(plain(*arguments))
        return written[0]

    with monkeypatch.context() as patch:
        patch.setattr("a3cli.stages.solve.write_layer", one_layer)
        yield


def test_each_name_resumes_its_own_draft(a3, work, monkeypatch):
    with stopped_after_one_layer(monkeypatch):
        assert a3(*SOLVE, "--work", work, "--name", "q25", "--num-processes", 1).code == 3
    assert a3(*but(SOLVE, "--budget", 0.4), "--work", work, "--name", "q40").code == 0
    resumed = a3(*SOLVE, "--work", work, "--name", "q25")
    assert (resumed.code, "resuming with 1 finished files" in resumed.stderr) == (0, True)


def test_a_merge_removes_the_solutions_of_what_it_replaces(a3, work, source, text_file, tmp_path):
    assert a3(*SOLVE, "--work", work, "--name", "q25").code == 0
    parts = [tmp_path / "one", tmp_path / "two"]
    for seed, part in enumerate(parts, 5):
        assert a3("calibrate", source, "--dataset", text_file, *SHORT, "--seed", seed, "--work", part).code == 0
    refused(a3("stats", "merge", *parts, "--into", work), "another calibration")
    assert (work / "solutions" / "q25" / "manifest.json").is_file()
    assert a3("stats", "merge", *parts, "--into", work, "--overwrite").code == 0
    assert {path.name for path in work.iterdir()} & {"solution", "solutions"} == set()


RECIPE = """
work: {folder}/work
out: {folder}/out-{name}
calibrate: {{model: {source}, text: {{dataset: {text}, samples: 3, seq_len: 32}}}}
solve: {{budget: {budget}, name: {name}, method: paper, head_multiple: 2, mlp_multiple: 8}}
eval: {{against: {source}, text: {{dataset: {text}, samples: 2, seq_len: 32}}}}
"""


def test_recipes_of_several_budgets_share_a_work_folder(a3, source, text_file, tmp_path):
    """Each finds its own solution, export, checks and figures finished when it is run again."""
    results = {}
    for name, budget in (("q10", 0.1), ("q40", 0.4)):
        recipe = RECIPE.format(folder=tmp_path, source=source, text=text_file, name=name, budget=budget)
        (tmp_path / f"{name}.yaml").write_text(recipe)
        outcome = a3("run", tmp_path / f"{name}.yaml", "--json")
        assert outcome.code == 0, outcome
        results[name] = outcome.json
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    for name, result in results.items():
        assert a3("run", tmp_path / f"{name}.yaml", "--json").json == result
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"} == before
    measured = a3("inspect", tmp_path / "work", "--name", "q40", "--json").json["measured"]
    assert measured[0]["perplexity"] == results["q40"]["eval"]["perplexity"]
    (tmp_path / "odd.yaml").write_text((tmp_path / "q10.yaml").read_text() + "export: {name: other}\n")
    refused(a3("run", tmp_path / "odd.yaml"), "export.name", "solve.name")
