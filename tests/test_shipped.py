"""The shipped model and its text: disjoint lists, a model that knows Python, and the demo's steps."""

import importlib.util
import json

import pytest

from tests.conftest import ROOT

MODEL = ROOT / "demo" / "model"


@pytest.fixture(scope="module")
def demo_text():
    spec = importlib.util.spec_from_file_location("demo_text", ROOT / "scripts" / "demo_text.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_text_lists_are_disjoint_and_complete(demo_text):
    assert not set(demo_text.CALIBRATION) & set(demo_text.EVALUATION)
    trained_on = set(demo_text.training_modules())
    assert not trained_on & {demo_text.stdlib() / name for name in demo_text.EVALUATION}
    assert len(demo_text.read_modules(demo_text.CALIBRATION)) > 500_000
    assert len(demo_text.read_modules(demo_text.EVALUATION)) > 200_000


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_a_quarter_less_still_knows_python(a3, demo_text, tmp_path):
    """Measure the tiny recipe's result on the recipe's own text and on blocks of modules excluded from training."""
    figures = json.loads((MODEL / "training.json").read_text())
    demo_text.main(tmp_path)
    where = ("--work", tmp_path / "work", "--out", tmp_path / "out", "--json")
    measured = a3("run", ROOT / "configs" / "tiny.yaml", *where).json["eval"]
    assert measured["perplexity"] < 1.3 * measured["source_perplexity"]
    held_out = ("--dataset", tmp_path / "evaluation.txt", "--samples", 40, "--seq-len", 512, "--batch-size", 8)
    result = a3("eval", tmp_path / "out", "--against", MODEL, *held_out, "--json").json
    assert result["source_perplexity"] < figures["unigram_perplexity"] / 20
    assert result["source_perplexity"] < result["perplexity"] < 1.4 * result["source_perplexity"]


def test_figures_are_those_of_this_model(demo_text):
    from a3cli.models.checkpoint import Checkpoint

    figures = json.loads((MODEL / "training.json").read_text())
    assert Checkpoint(MODEL).parameters() == figures["parameters"]
    assert 1e6 < figures["parameters"] < 3e6
    card = (MODEL / "README.md").read_text()
    for key in ("held_out_perplexity", "unigram_perplexity"):
        assert f"{figures[key]:.1f}" in card
