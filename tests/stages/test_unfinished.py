"""What a stage says that needs a calibration which is not finished, and how warnings look."""

import pytest

from a3cli.cli import display
from a3cli.cli.console import set_up_logging
from a3cli.runtimes import NO, YES
from a3cli.work.folder import Work
from tests.conftest import SHORT, SOLVE, refused, snapshot


@pytest.fixture
def stopped(a3, source, text_file, tmp_path):
    """A calibration that has finished the first of two layers."""
    command = ("calibrate", source, "--dataset", text_file, *SHORT, "--work", tmp_path / "stopped")
    assert a3(*command, "--max-minutes", 0).code == 3
    return tmp_path / "stopped"


@pytest.mark.parametrize("command", [SOLVE, ("pareto",)], ids=["solve", "pareto"])
def test_a_stopped_calibration(command, a3, stopped):
    before = snapshot(stopped)
    said = f"the calibration in {stopped} is unfinished: layer 2 of 2; rerun the same a3 calibrate command"
    refused(a3(*command, "--work", stopped), said)
    assert snapshot(stopped) == before


def test_a_stopped_calibration_without_its_source(a3, stopped):
    (stopped / "source.json").unlink()
    refused(a3(*SOLVE, "--work", stopped), "is unfinished: layer 2; rerun")


def test_a_running_calibration(a3, stopped, tmp_path):
    with Work(stopped).locked():
        refused(a3(*SOLVE, "--work", stopped), f"in {stopped} is still running: layer 2 of 2; wait for it")
    with Work(tmp_path / "new").locked():
        refused(a3(*SOLVE, "--work", tmp_path / "new"), "has no finished calibration, and another a3 process works")
    refused(a3(*SOLVE, "--work", tmp_path / "new"), "has no finished calibration; run a3 calibrate first")
    assert not (tmp_path / "new").exists()


def test_runtimes_that_refuse_an_export_are_a_warning(capsys):
    set_up_logging()
    runtimes = [{"runtime": name, "loads": loads, "note": "note"} for name, loads in (("A", YES), ("B", NO), ("C", NO))]
    display._print_runtimes(runtimes)
    assert capsys.readouterr().err == "warning: not loaded by B, C: see the table's notes\n"
    display._print_runtimes(runtimes[:1])
    assert capsys.readouterr().err == ""


def test_export_warns_of_runtimes(a3, work, tmp_path):
    solve = (*SOLVE, "--shape", "per-layer", "--method", "paper", "--overwrite", "--work", work)
    assert a3(*solve).code == 0
    shown = a3("export", tmp_path / "out", "--work", work)
    (line,) = [line for line in shown.stderr.splitlines() if line.startswith("warning:")]
    assert "llama.cpp" in line
    assert "vLLM" not in line
