"""Warnings of distances, and of kinds of text, that calibration did not cover, wherever a solution is shown."""

import json
import shutil

import pytest

from a3cli.report.long_range import LARGE_SCORE_ERROR, solution_warnings
from a3cli.settings import SolveSettings
from a3cli.work.manifests import ByDistance, Flops, Layer, Solution, SolutionRequest
from tests.conftest import CONTEXT, SHORT, SOLVE

pytestmark = pytest.mark.usefixtures("hasty")
DISTANCES = [0, 1, 2, 4, 8, 16, 32, 63]


def solution(*layers, length=16):
    """Return a manifest's entry for layers with these errors at DISTANCES; its mean is that of the first one."""
    errors = [ByDistance(distance=DISTANCES, relative=relative) for relative in layers]
    return Solution.model_construct(
        request=SolutionRequest.model_construct(settings=SolveSettings(budget=0.25)),
        prefill_flops_per_token=Flops(before=1, after=1, seq_len=length),
        predicted_score_error=errors[0],
        per_layer=[Layer.model_construct(score_error=error) for error in errors],
    )


def test_the_error_beyond_the_calibrated_length_is_judged():
    small, large = LARGE_SCORE_ERROR, LARGE_SCORE_ERROR + 0.01
    assert solution_warnings(solution([small] * 8)) == []
    assert solution_warnings(solution([large] * 5 + [small] * 3)) == []  # a large error within the length of a block
    assert solution_warnings(solution([small] * 5 + [large] + [small] * 2))
    assert solution_warnings(solution([0.9] + [1.0] * 7, length=64)) == []  # the blocks are as long as the context
    assert solution_warnings(solution([0.9] + [1.0] * 7, length=63))
    assert solution_warnings(solution([1.0] * 8, length=63)) == []  # the same at every distance, as without RoPE


def test_a_warning_names_distance_layer_and_remedy():
    mean = [0.01, 0.01, 0.01, 0.02, 0.03, 0.1, 0.52, 0.4]
    worst = [0.0] * 6 + [0.7, 0.9]
    (said,) = solution_warnings(solution(mean, worst, length=16))
    for words in ("52 % at distance 32 (70 % in layer 1)", "the 16 tokens", "at most 3 %", "--seq-len", "--context 16"):
        assert words in said, words


@pytest.mark.parametrize("options", [(), ("--context", 32)], ids=["whole context", "calibrated context"])
def test_solve_inspect_report_and_card_warn_alike(options, a3, work, tmp_path):
    cut = ("--attention-budget", 0.3, "--mlp-budget", 0.2, "--head-multiple", 2, "--mlp-multiple", 8)
    solve = ("solve", *cut, "--method", "paper", *options, "--overwrite", "--work", work)
    solved = a3(*solve, "--json").json
    warnings = solved.pop("warnings")
    said = [each for each in warnings if "distance" in each]  # the others are about rounding
    manifest = (work / "solution" / "manifest.json").read_bytes()
    assert json.loads(manifest) == solved  # the warning is not stored in it
    assert len(said) == (0 if options else 1)
    shown = a3(*solve)
    assert (work / "solution" / "manifest.json").read_bytes() == manifest
    assert [line for line in shown.stderr.splitlines() if "warning" in line] == [
        f"warning: {each}" for each in warnings
    ]
    assert a3("export", tmp_path / "out", "--work", work).code == 0
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert ("**Warning.** QK: the predicted error" in card) == bool(said)
    for folder in (work, tmp_path / "out"):
        about_range = [each for each in a3("inspect", folder, "--json").json["warnings"] if "distance" in each]
        assert about_range == said
        assert ("at distance" in a3("inspect", folder).stdout) == bool(said)
        reported = a3("report", folder, "--html", tmp_path / "page.html", "--json").json["warnings"]
        assert [each for each in reported if "distance" in each] == said
        assert ("the predicted error of attention scores is" in (tmp_path / "page.html").read_text()) == bool(said)
    if said:
        assert f"at distance {CONTEXT - 1}" in said[0] or "at distance 128" in said[0]


@pytest.mark.parametrize("other", [(), ("--dataset", "other.txt")], ids=["alone", "in a mixture"])
def test_wikitext_alone_is_text_of_one_kind(other, a3, source, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("wikitext.txt", "other.txt"):
        shutil.copy(text_file, name)
    assert a3("calibrate", source, "--dataset", "wikitext.txt", *other, *SHORT).code == 0
    assert a3(*SOLVE, "--method", "paper").code == 0
    assert a3("export", "out").code == 0
    for command in (("solve", *SOLVE[1:], "--method", "paper"), ("inspect", "a3-work"), ("inspect", "out")):
        said = [each for each in a3(*command, "--json").json["warnings"] if "kind" in each]
        assert len(said) == (0 if other else 1)
        assert all("wikitext.txt alone" in each and "--dataset c4" in each for each in said)
