"""The benchmarks at small scale: they run, their tables are complete, and their answers match the paper's formulas."""

import re
import runpy
from dataclasses import replace
from typing import Any

import pytest

from a3cli.solvers.linalg import JointDecomposition
from a3cli.solvers.qk import solve_qk
from tests.conftest import ROOT

BENCHMARK = ROOT / "benchmarks" / "solve_speed.py"
COMPONENTS = ("QK", "OV", "QK + OV", "QK with RoPE", "QK with RoPE + OV")


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Run the benchmark and return its exit code and output."""
    monkeypatch.setattr("sys.argv", [str(BENCHMARK), "--scale", "small", "--repeats", "3", *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(BENCHMARK), run_name="__main__")
    return int(stop.value.code or 0), capsys.readouterr().out


@pytest.mark.parametrize("factorise", ["svd", "gram"])
def test_solve_speed(factorise: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = run(monkeypatch, capsys, "--factorise", factorise)
    assert code == 0, printed
    assert printed.rstrip().endswith("all answers agree to 1e-08")
    assert "DIFFERS" not in printed
    assert printed.count(" agrees\n") == 2 * 3  # two shapes; RoPE scores, QK, OV
    for shape in ("Llama-3.1-8B", "Llama-2-7B"):
        assert f"{shape}, small: d 256" in printed
        assert f"{shape}, small: relative difference" in printed
    for component in COMPONENTS:
        assert len(re.findall(rf"^{re.escape(component)}  +\d", printed, re.MULTILINE)) == 2


def test_solve_speed_fails_if_answers_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def solve_wrongly(*arguments: Any, **options: Any) -> JointDecomposition:
        right = solve_qk(*arguments, **options)
        return replace(right, other_map=right.other_map.flip(-1))

    monkeypatch.setattr("a3cli.solvers.qk.solve_qk", solve_wrongly)
    code, printed = run(monkeypatch, capsys)
    assert code == 1
    assert printed.count("DIFFERS") == 2


def run_small(name: str, monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    monkeypatch.setattr("sys.argv", [name, *map(str, options)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(BENCHMARK.parent / name), run_name="__main__")
    return int(stop.value.code or 0)


def test_solve_layer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_small("solve_layer.py", monkeypatch, "--shape", "tiny") == 0
    printed = capsys.readouterr().out
    for line in ("QK + OV, paper", "MLP, paper", "MLP, best", "OV, best"):
        assert len(re.findall(rf"^{re.escape(line)} +\d+\.\d\d", printed, re.MULTILINE)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("chain_8b.py", ("--shape", "tiny", "--seq-len", 256), ("calibrate", "solve --method best", "export")),
        ("export_speed.py", ("--shape", "tiny", "--repeats", 1), ("export", "cp", "BLAKE3", "ratio")),
    ],
)
def test_chain_and_export_speed(
    name: str,
    options: tuple[object, ...],
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_small(name, monkeypatch, *options) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{word} ", printed, re.MULTILINE) for word in words), printed
