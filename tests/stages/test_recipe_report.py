"""The stage `report` of a recipe: a page of the export with the figures that the run measured."""

import json
from pathlib import Path

import pytest

from a3cli.stages.recipe import read_recipe
from tests.conftest import refused, snapshot
from tests.helpers.commands import write_recipe

pytestmark = pytest.mark.usefixtures("hasty")


@pytest.fixture
def recipe(checkpoint, text_file, tmp_path) -> Path:
    path, report = tmp_path / "recipes" / "recipe.yaml", {"html": "pages/report.html"}
    return write_recipe(path, checkpoint("llama-gqa"), text_file, report=report)


def states(a3, recipe, *options) -> dict[str, str]:
    found = a3("run", recipe, "--dry-run", *options, "--json").json
    return {name: stage["state"] for name, stage in found["stages"].items()}


def test_the_page_is_written_once_with_the_figures(a3, recipe, tmp_path, monkeypatch):
    assert states(a3, recipe)["report"] == "not started"
    first = a3("run", recipe, "--json").json
    assert list(first) == ["calibrate", "solve", "export", "eval", "report"]
    page = recipe.parent / "pages" / "report.html"  # relative to the recipe's folder, as `out` is
    assert first["report"]["html"] == str(page)
    assert [each["perplexity"] for each in first["report"]["measured"]] == [first["eval"]["perplexity"]]
    assert f"{first['eval']['perplexity']:.2f}" in page.read_text("utf-8")
    figures = tmp_path / "eval.json"
    figures.write_text(json.dumps(first["eval"]))
    by_hand = tmp_path / "by-hand.html"
    assert a3("report", recipe.parent / "out", "--html", by_hand, "--eval", figures).code == 0
    assert by_hand.read_bytes() == page.read_bytes()
    before = page.stat().st_mtime_ns
    assert states(a3, recipe)["report"] == "finished"
    again = a3("run", recipe)
    assert "nothing was left to do" in again.stdout
    assert str(page) in again.stdout.splitlines()
    assert page.stat().st_mtime_ns == before


def test_a_page_that_is_missing_or_old_is_written_again(a3, recipe, monkeypatch):
    assert a3("run", recipe).code == 0
    page = recipe.parent / "pages" / "report.html"
    wanted = page.read_bytes()
    for damage in (page.unlink, lambda: page.write_text("old")):
        damage()
        assert states(a3, recipe)["report"] == "not started"
        outcome = a3("run", recipe)
        assert "nothing was left to do" not in outcome.stdout
        assert page.read_bytes() == wanted
    measured = ("--set", "eval.text.samples=1")
    assert states(a3, recipe, *measured)["report"] == "not started"
    assert a3("run", recipe, *measured).code == 0
    assert page.read_bytes() != wanted


def test_without_an_evaluation_the_page_has_no_figures(a3, recipe):
    assert a3("run", recipe, "--set", "eval=null", "--json").json["report"]["measured"] == []
    assert states(a3, recipe, "--set", "eval=null")["report"] == "finished"
    assert states(a3, recipe)["report"] == "not started"


def test_a_failed_gate_leaves_a_page_that_says_so(a3, recipe):
    outcome = a3("run", recipe, "--set", "eval.fail_if=[kl > -1]", "--json")
    assert outcome.code == 1
    assert outcome.json["report"]["measured"][0]["gates"] == [{"gate": "kl > -1", "failed": True}]


def test_several_budgets_have_a_page_each(a3, recipe):
    found = a3("run", recipe, "--set", "solve.budget=[0.1, 0.3]", "--json").json["solutions"]
    pages = [recipe.parent / "pages" / f"report-{name}.html" for name in ("q10", "q30")]
    assert [each["report"]["html"] for each in found] == [str(page) for page in pages]
    assert len({page.read_bytes() for page in pages}) == 2
    for page, each in zip(pages, found, strict=True):
        assert f"{each['eval']['perplexity']:.2f}" in page.read_text("utf-8")


def test_off_by_default_and_refused_before_any_work(a3, recipe, tmp_path):
    assert read_recipe(recipe, changes=["report=null"]).report is None
    assert "report" not in states(a3, recipe, "--set", "report=null")
    (recipe.parent / "pages" / "report.html").mkdir(parents=True)
    before = snapshot(tmp_path)
    refused(a3("run", recipe), "report.html", "it is a folder")
    refused(a3("run", recipe, "--set", "report.htm=x"), "report has no 'htm' (did you mean 'html'?)")
    refused(a3("run", recipe, "--set", "report={}"), "report.html is missing")
    assert snapshot(tmp_path) == before
