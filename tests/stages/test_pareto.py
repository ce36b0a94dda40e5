"""Many budgets from one calibration: `a3 solve`'s choices, `a3 eval`'s figures, and nothing left behind."""

import shutil

import pytest
from PIL import Image

from a3cli.settings import LOSSES

pytestmark = pytest.mark.usefixtures("hasty")


@pytest.fixture
def work(a3, checkpoint, text_file, tmp_path):
    source = checkpoint("llama-gqa")
    folder = tmp_path / "work"
    assert a3("calibrate", source, "--dataset", text_file, "--samples", 6, "--seq-len", 60, "--work", folder).code == 0
    return folder


ROUNDING = ("--head-multiple", 2, "--mlp-multiple", 8)


def test_points_are_what_solve_and_eval_give(a3, work, text_file, checkpoint, tmp_path, monkeypatch):
    text = ("--dataset", text_file, "--seq-len", 60, "--samples", 3)
    before = sorted(path.name for path in work.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("a3cli.stages.solve.measure_loss", pytest.fail)  # each point is measured once, on this text
        result = a3("pareto", "--budgets", "0.1:0.3:0.2", *ROUNDING, *text, "--work", work, "--json").json
    for kept in ("channels", "gradients", "kept"):  # for the next solution
        shutil.rmtree(work / kept)
    assert sorted(path.name for path in work.rglob("*")) == before
    assert [(point["variant"], point["budget_asked"]) for point in result["points"]] == [
        (variant, budget) for variant in ("paper", "best", "best, per-layer") for budget in (0.1, 0.3)
    ]
    point = result["points"][-1]
    solved = a3("solve", "--budget", 0.3, "--shape", "per-layer", *ROUNDING, "--work", work, "--json").json
    assert point["sizes"] == solved["sizes"]
    assert point["predicted_loss"] == pytest.approx(sum(solved["predicted_loss"].values()))
    assert a3("export", tmp_path / "out", "--work", work).code == 0
    evaluated = a3(
        "eval", tmp_path / "out", "--against", checkpoint("llama-gqa"), *text, "--trust-remote-code", "--json"
    ).json
    assert point["measured"] == {key: evaluated[key] for key in point["measured"]}


@pytest.mark.parametrize("sensitivity", LOSSES)
@pytest.mark.parametrize("measured", [{}, {"measured": {"kl": 0.1}}], ids=["one panel", "two panels"])
def test_labels_of_the_plot_lie_inside_of_it(sensitivity, measured):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from a3cli.stages.pareto import plot

    points = [{"variant": "best", "budget_reached": x, "predicted_loss": x, **measured} for x in (0.1, 0.2)]
    figure = plot({"points": points, "sensitivity": sensitivity})
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    assert len(figure.axes) == 1 + bool(measured)
    for axes in figure.axes:
        for label in (axes.xaxis.label, axes.yaxis.label):
            box = label.get_window_extent(renderer)
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, label.get_text()
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, label.get_text()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_plot_is_a_picture(a3, work, tmp_path, suffix):
    plot = tmp_path / f"plot{suffix}"
    outcome = a3("pareto", "--budgets", "0.1,0.2,0.3", *ROUNDING, "--plot", plot, "--work", work)
    assert outcome.code == 0, outcome.stderr
    assert "best, per-layer" in outcome.stdout
    if suffix == ".png":
        with Image.open(plot) as picture:
            assert picture.size[0] > 500
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    elif suffix == ".pdf":
        content = plot.read_bytes()
        assert content.startswith(b"%PDF-")
        assert content.rstrip().endswith(b"%%EOF")
        assert b"/MediaBox [ 0 0 432 324 ]" in content  # 6 by 4.5 inches, in points
        assert b"CreationDate" not in content  # the same points give the same bytes
    else:
        text = plot.read_text("utf-8")
        assert "<svg" in text
        assert text.count("<path") > 10


@pytest.mark.slow
def test_sequential_corrects_ours_and_leaves_the_paper_as_published(a3, work, text_file):
    text = ("--dataset", text_file, "--seq-len", 60, "--samples", 3)
    command = ("pareto", "--budgets", "0.3", *ROUNDING, *text, "--work", work, "--json")
    plain, corrected = (a3(*command, *options).json["points"] for options in ((), ("--sequential",)))
    names = ["paper", "best, sequential", "best, per-layer, sequential"]
    assert [point["variant"] for point in corrected] == names
    assert corrected[0] == plain[0]
    for before, after in zip(plain[1:], corrected[1:], strict=True):
        assert after["sizes"] == before["sizes"]
        assert after["measured"] != before["measured"]


def test_a_budget_out_of_reach_is_said_and_the_rest_is_shown(a3, work):
    outcome = a3("pareto", "--budgets", "0.2,0.95", "--head-multiple", 8, "--mlp-multiple", 64, "--work", work)
    assert outcome.code == 0, outcome.stderr
    assert "not reached" in outcome.stdout
    assert a3("pareto", "--budgets", "0.95,0.97", "--head-multiple", 8, "--mlp-multiple", 64, "--work", work).code == 2


@pytest.mark.parametrize("budgets", ["0.5:0.1:0.1", "0.1:0.5:0", "a,b", "0.1:0.2", "1.5", ""])
def test_bad_budgets_are_refused_in_one_line(a3, work, budgets):
    outcome = a3("pareto", "--budgets", budgets, "--work", work)
    assert outcome.code == 2
    assert "--budgets" in outcome.stderr


def test_bad_plots_are_refused_before_any_work(a3, work, tmp_path):
    for plot in (tmp_path / "plot.gif", tmp_path / "no" / "plot.png"):
        outcome = a3("pareto", "--plot", plot, "--work", work)
        assert outcome.code == 2
        assert "--plot" in outcome.stderr
