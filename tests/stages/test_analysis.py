"""An analysis is immutable: it serves any number of budgets in any order, with the same bytes for each."""

from dataclasses import replace
from pathlib import Path

import pytest

from a3cli.settings import SolveSettings, make_settings
from a3cli.stages.context import open_run, read_calibration
from a3cli.stages.solve import analyse, write_solution
from a3cli.work.folder import Work
from a3cli.work.interrupt import Stop
from tests.conftest import snapshot

pytestmark = pytest.mark.usefixtures("hasty")


@pytest.mark.parametrize("variant", [{}, {"shape": "per-layer"}, {"method": "paper"}, {"rope_form": "theta"}], ids=str)
def test_one_analysis_serves_every_budget(variant, prepared, tmp_path):
    calibrated, results = Work(prepared / "work"), {}

    def settings(budget: float) -> SolveSettings:
        return make_settings(SolveSettings, budget=budget, mlp_multiple=8, head_multiple=2, **variant)

    first = settings(0.4)
    run = open_run(first, calibrated, read_calibration(calibrated), lambda **at: None, Stop())
    run = replace(run, work=calibrated.borrowed_by(tmp_path / "once"))
    run.work.channels = tmp_path / "channels"
    analysed = analyse(run)

    def solved(budget: float, folder: Path, *, again: bool) -> dict[str, bytes | None]:
        own = replace(run, settings=settings(budget), work=run.work.borrowed_by(folder))
        write_solution(own, analyse(own) if again else analysed)
        return snapshot(own.work.solution)

    for place, budget in enumerate((0.3, 0.15, 0.3, 0.4)):
        results[place] = solved(budget, tmp_path / f"{place}", again=False)
        assert results[place] == solved(budget, tmp_path / f"{place}-alone", again=True)
    assert results[0] == results[2] != results[1]
