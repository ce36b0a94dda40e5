"""Stopping between steps: a time limit or a signal ends the step in progress, and the same command goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from a3cli import display
from a3cli.errors import Interrupted
from a3cli.interrupt import Stop, stopping

TEXT = ("--samples", 4, "--seq-len", 40)
SIZES = ("--head-multiple", 2, "--mlp-multiple", 8)


@pytest.fixture
def long_source(checkpoint) -> Path:
    return checkpoint("llama-gqa", num_hidden_layers=3)


def interrupted(outcome, *words: str) -> None:
    """Exit code 3, and a last line on stderr that has the words; nothing on stdout."""
    assert outcome.code == 3, outcome
    line = outcome.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line
    assert outcome.stdout == ""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture
def signal_in_layer(monkeypatch):
    """Send this process signals while a sweep is in a layer."""

    def arrange(layer: int, *signals: signal.Signals) -> None:
        pending = list(signals)
        plain = display.SweepProgress.__call__

        def interrupting(self, **at):
            while at["layer"] == layer and pending:
                os.kill(os.getpid(), pending.pop(0))
            plain(self, **at)

        monkeypatch.setattr(display.SweepProgress, "__call__", interrupting)

    return arrange


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_layer_and_the_command_goes_on(number, a3, long_source, text_file, tmp_path, signal_in_layer):
    command = ("calibrate", long_source, "--dataset", text_file, *TEXT, "--work")
    assert a3(*command, tmp_path / "whole").code == 0
    before = signal.getsignal(number)
    signal_in_layer(1, number)
    interrupted(a3(*command, tmp_path / "cut"), number.name, "layer 3 of 3", "goes on")
    assert signal.getsignal(number) == before
    assert (tmp_path / "cut" / "calibration" / "layer-001.safetensors").is_file()
    assert not (tmp_path / "cut" / "calibration" / "layer-002.safetensors").exists()
    assert a3(*command, tmp_path / "cut").code == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(number, a3, long_source, text_file, tmp_path, signal_in_layer):
    signal_in_layer(1, number, number)
    outcome = a3("calibrate", long_source, "--dataset", text_file, *TEXT, "--work", tmp_path / "work")
    interrupted(outcome, "interrupted", "again")
    assert (tmp_path / "work" / "calibration" / "layer-000.safetensors").is_file()
    assert not (tmp_path / "work" / "calibration" / "layer-001.safetensors").exists()


def test_a_time_limit_stops_after_each_layer_until_all_is_done(a3, long_source, text_file, tmp_path):
    command = ("calibrate", long_source, "--dataset", text_file, *TEXT, "--work")
    assert a3(*command, tmp_path / "whole").code == 0
    for layer in (2, 3):
        interrupted(a3(*command, tmp_path / "cut", "--max-minutes", 0), "--max-minutes 0", f"layer {layer} of 3")
    assert a3(*command, tmp_path / "cut", "--max-minutes", 0).code == 0  # nothing comes after the last layer
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_solve_export_and_pareto_leave_what_was_there(a3, checkpoint, text_file, tmp_path, monkeypatch):
    source, work, out = checkpoint("llama-gqa", max_shard_size="40KB"), tmp_path / "work", tmp_path / "out"
    solve = ("solve", "--budget", 0.2, *SIZES, "--work", work)
    assert a3("calibrate", source, "--dataset", text_file, *TEXT, "--work", work).code == 0
    before = contents(work)
    interrupted(a3(*solve, "--max-minutes", 0), "layer 1 of 2", "begins anew")
    assert contents(work) == before
    assert a3(*solve, "--method", "paper", "--max-minutes", 5).code == 0
    before = contents(work)

    monkeypatch.setattr(Stop, "before", stop_at("writing model-00002"))
    interrupted(a3("export", out, "--work", work, "--max-shard-size", "40KB"), "before writing model-", "anew")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work"]
    monkeypatch.setattr(Stop, "before", stop_at("paper at 0.3"))
    measured = ("--dataset", text_file, *TEXT)
    interrupted(a3("pareto", "--budgets", "0.2,0.3", *SIZES, *measured, "--work", work), "paper at 0.3", "begins anew")
    monkeypatch.setattr(Stop, "before", stop_at("correcting layer 2"))
    interrupted(a3(*solve, "--method", "paper", "--sequential", "--overwrite"), "correcting layer 2 of 2")
    assert contents(work) == before


def stop_at(step: str):
    """A signal that comes while the step before this one is at work."""
    plain = Stop.before

    def before(self, name, then):
        if name.startswith(step):
            signal.raise_signal(signal.SIGTERM)
        plain(self, name, then)

    return before


def test_without_a_reason_nothing_stops():
    Stop().before("anything", "")
    Stop(5).before("anything", "")
    with pytest.raises(Interrupted, match="stopped by --max-minutes 0 before a step; do this"):
        Stop(0).before("a step", "do this")


def test_off_the_main_thread_only_time_stops():
    seen = []

    def work() -> None:
        with stopping(0) as stop, pytest.raises(Interrupted):
            stop.before("a step", "")
        seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_bad_time_limits_are_refused(a3, tmp_path):
    for minutes in ("-1", "soon"):
        outcome = a3("solve", "--budget", 0.1, "--max-minutes", minutes, "--work", tmp_path)
        assert outcome.code == 2
        assert "--max-minutes" in outcome.stderr
        assert len(outcome.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_terminated_process_ends_its_layer_with_exit_code_three(checkpoint, text_file, tmp_path):
    """A real process and a real SIGTERM, wherever it is."""
    source = checkpoint("llama-gqa", num_hidden_layers=12)
    arguments = ["calibrate", str(source), "--dataset", str(text_file), "--samples", "24", "--seq-len", "160"]
    process = subprocess.Popen(
        [sys.executable, "-m", "a3cli", *arguments, "--work", str(tmp_path / "cut")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut" / "calibration" / "layer-000.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 3, stderr
    assert stdout == b""
    assert b"stopped by SIGTERM before layer" in stderr
    assert not (tmp_path / "cut" / "calibration" / "manifest.json").exists()
