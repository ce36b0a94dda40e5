"""Stopping: after a time limit or a signal the current step finishes, and the same command resumes.

A step that takes long after a signal is given up.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from a3cli.cli.progress import SweepProgress
from a3cli.errors import Interrupted
from a3cli.methods import analysis
from a3cli.methods.best import Best
from a3cli.methods.inputs import LayerInputs
from a3cli.solvers.least_squares import LeastSquares
from a3cli.stages.sizes import choose_sizes
from a3cli.stream import sequential, sweep
from a3cli.work import interrupt, processes
from a3cli.work.interrupt import Stop, stopping
from a3cli.work.machine import Machine
from a3cli.work.sealed import versions
from a3cli.work.writer import HashingWriter
from tests.conftest import refused
from tests.helpers import forks

pytestmark = pytest.mark.usefixtures("hasty")

SIGINT, SIGTERM = interrupt.SIGNALS
TEXT = ("--samples", 4, "--seq-len", 40)
SIZES = ("--head-multiple", 2, "--mlp-multiple", 8)


@pytest.fixture
def long_source(checkpoint) -> Path:
    return checkpoint("llama-gqa", num_hidden_layers=3)


def interrupted(outcome, *words: str) -> None:
    """Check for exit code 3 and a last line on stderr that contains the words, with nothing on stdout."""
    assert outcome.code == 3, outcome
    line = outcome.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line
    assert outcome.stdout == ""


def contents(folder: Path, but: str = ".lock") -> dict[str, bytes]:
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(but)}


@pytest.fixture
def signal_in_layer(monkeypatch):
    """Send this process signals while a sweep is in a layer."""

    def arrange(layer: int, *signals: signal.Signals) -> None:
        pending = list(signals)
        plain = SweepProgress.__call__

        def interrupting(self, **at):
            while at.get("layer") == layer and pending:
                os.kill(os.getpid(), pending.pop(0))
            plain(self, **at)

        monkeypatch.setattr(SweepProgress, "__call__", interrupting)

    return arrange


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_layer_and_the_command_goes_on(number, a3, long_source, text_file, tmp_path, signal_in_layer):
    command = ("calibrate", long_source, "--dataset", text_file, *TEXT, "--work")
    assert a3(*command, tmp_path / "whole").code == 0
    before = signal.getsignal(number)
    signal_in_layer(1, number)
    interrupted(a3(*command, tmp_path / "cut"), number.name, "layer 3 of 3", "rerun the same command to resume")
    assert signal.getsignal(number) == before
    assert (tmp_path / "cut" / "calibration" / "layer-001.safetensors").is_file()
    assert not (tmp_path / "cut" / "calibration" / "layer-002.safetensors").exists()
    for leftover in (".layer-002.safetensors.partial", ".tmpgFi74E"):  # our temporary file, and safetensors'
        (tmp_path / "cut" / "calibration" / leftover).write_bytes(b"half")
    assert a3(*command, tmp_path / "cut").code == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(number, a3, long_source, text_file, tmp_path, signal_in_layer):
    signal_in_layer(1, number, number)
    outcome = a3("calibrate", long_source, "--dataset", text_file, *TEXT, "--work", tmp_path / "work")
    interrupted(outcome, "interrupted", "rerun the same command")
    assert (tmp_path / "work" / "calibration" / "layer-000.safetensors").is_file()
    assert not (tmp_path / "work" / "calibration" / "layer-001.safetensors").exists()


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_time_limit_stops_after_each_layer_until_all_is_done(overwrite, a3, long_source, text_file, tmp_path):
    command = ("calibrate", long_source, "--dataset", text_file, *TEXT, *overwrite, "--work")
    assert a3(*command, tmp_path / "whole").code == 0
    for layer in (2, 3):
        interrupted(a3(*command, tmp_path / "cut", "--max-minutes", 0), "--max-minutes 0", f"layer {layer} of 3")
    assert a3(*command, tmp_path / "cut", "--max-minutes", 0).code == 0  # nothing follows the last layer
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_another_version_does_not_go_on(a3, long_source, text_file, tmp_path, monkeypatch):
    command = ("calibrate", long_source, "--dataset", text_file, *TEXT, "--work", tmp_path / "work")
    assert a3(*command, "--max-minutes", 0).code == 3
    monkeypatch.setattr("a3cli.stages.calibrate.versions", lambda: {**versions(), "torch": "2.0"})
    refused(a3(*command), "other versions (torch)", "--overwrite")
    assert a3(*command, "--overwrite").code == 0


def test_text_that_has_changed_is_other_text(a3, long_source, tmp_path):
    text, work = tmp_path / "text.txt", tmp_path / "work"
    command = ("calibrate", long_source, "--dataset", text, *TEXT, "--work", work)
    text.write_text("one two three " * 99)
    assert a3(*command).code == 0
    text.write_text("one two four " * 99)
    refused(a3(*command), "differs in text_files (text.txt)", "--overwrite")


@pytest.fixture
def calibrated(a3, checkpoint, text_file, tmp_path) -> Path:
    source = checkpoint("llama-gqa", max_shard_size="40KB")
    assert a3("calibrate", source, "--dataset", text_file, *TEXT, "--work", tmp_path / "work").code == 0
    return tmp_path / "work"


def test_overwriting_begins_anew_where_what_is_there_is_damaged(a3, long_source, text_file, tmp_path):
    command = ("calibrate", long_source, "--dataset", text_file, *TEXT, "--work", tmp_path / "work")
    assert a3(*command, "--max-minutes", 0).code == 3
    layer = tmp_path / "work" / "calibration" / "layer-000.safetensors"
    layer.write_bytes(layer.read_bytes()[:-1])
    assert a3(*command).code == 2
    outcome = a3(*command, "--overwrite")
    assert outcome.code == 0
    assert "layer-000.safetensors" in outcome.stderr
    assert "starting again" in outcome.stderr


def test_nothing_is_left_of_what_did_nothing(a3, calibrated):
    before = contents(calibrated)
    interrupted(a3("solve", "--budget", 0.2, *SIZES, "--work", calibrated, "--max-minutes", 0), "pass forward 0")
    assert contents(calibrated) == before


@pytest.mark.parametrize("rounds", [0, 1])
def test_solve_goes_on_at_every_step(rounds, a3, calibrated, monkeypatch):
    """Analysis, projections and the sequential sweep are each interrupted; the bytes equal those of one run."""
    solve = ("solve", "--budget", 0.2, *SIZES, "--sequential", "--refit-rounds", rounds, "--batch-size", 2)
    solve += ("--num-processes", 1, "--work", calibrated)
    assert a3(*solve).code == 0
    whole = contents(calibrated)
    shutil.rmtree(calibrated / "channels")
    steps = {
        "analysing layer 2": "channels/layer-000-directed.json",
        "projecting layer 2": "one-shot-000",
        "correcting": "refit-000",
    }
    monkeypatch.setattr(analysis, "find_order", only_once(analysis.find_order))
    monkeypatch.setattr(Best, "project", only_once(Best.project))
    for step, made in steps.items():
        cut_short(a3, monkeypatch, (*solve, "--overwrite"), step)
        assert any(made in name for name in contents(calibrated)), step
    assert a3(*solve, "--overwrite").code == 0
    assert contents(calibrated) == whole


def test_the_order_of_channels_is_found_once(a3, calibrated, monkeypatch):
    """Another budget and shape reuse the order as it is; a damaged file is computed again."""
    solve = ("solve", *SIZES, "--work", calibrated, "--overwrite", "--budget")
    assert a3(*solve, 0.2).code == 0
    whole = contents(calibrated)
    with monkeypatch.context() as patch:
        patch.setattr(analysis, "find_order", lambda *_: pytest.fail("found again"))
        assert a3(*solve, 0.3, "--shape", "per-layer").code == 0
    file = calibrated / "channels" / "layer-001-directed.json"
    file.write_text(file.read_text().replace("1", "2", 1))
    outcome = a3(*solve, 0.2)
    assert outcome.code == 0
    assert f"{file} has changed since it was written; it is computed again" in outcome.stderr
    assert contents(calibrated, but="kept/") == {name: whole[name] for name in whole if not name.startswith("kept/")}


def only_once(step):
    """Fail if a layer is computed twice."""
    done = set()

    def guarded(*args):
        layer = next(each.layer for each in args if isinstance(each, LayerInputs))
        assert layer not in done
        done.add(layer)
        return step(*args)

    return guarded


@pytest.mark.parametrize("damaged", ["streams/smaller-1.bin", "refit-000.safetensors", "one-shot-001.safetensors"])
def test_damaged_drafts_are_made_again(damaged, a3, calibrated, monkeypatch):
    solve = ("solve", "--budget", 0.2, *SIZES, "--sequential", "--batch-size", 2, "--work", calibrated)
    assert a3(*solve).code == 0
    whole = contents(calibrated)
    cut_short(a3, monkeypatch, (*solve, "--overwrite"), "correcting layer 2 of 2")
    file = calibrated / ".solution.a3-partial" / damaged
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    outcome = a3(*solve, "--overwrite")
    assert outcome.code == 0
    assert ("resuming at layer 2 of 2" in outcome.stderr) == (damaged == "one-shot-001.safetensors")
    assert f"{file.name} has changed since it was written" in outcome.stderr
    assert contents(calibrated) == whole


def test_another_request_begins_anew(a3, calibrated, monkeypatch):
    solve = ("solve", *SIZES, "--work", calibrated, "--overwrite", "--budget")
    assert a3(*solve, 0.3).code == 0
    whole = contents(calibrated)
    cut_short(a3, monkeypatch, (*solve, 0.1, "--num-processes", 1), "projecting layer 2 of 2")
    assert a3(*solve, 0.3).code == 0
    assert contents(calibrated) == whole


@pytest.mark.slow
def test_other_sizes_or_another_type_begin_anew(a3, calibrated, monkeypatch):
    """This may happen on another machine, where curves differ slightly or `auto` chooses another dtype."""
    solve = ("solve", "--budget", 0.2, *SIZES, "--sequential", "--batch-size", 2, "--overwrite")
    solve += ("--num-processes", 1, "--work", calibrated)

    def wider(*args):
        return [replace(size, mlp=size.mlp + 8) for size in choose_sizes(*args)]

    def in_float64(*_args):
        return Machine(torch.device("cpu"), torch.float64)

    for name, there in (("solve.choose_sizes", wider), ("context.choose_machine", in_float64)):
        with monkeypatch.context() as patch:
            patch.setattr(f"a3cli.stages.{name}", there)
            assert a3(*solve).code == 0
            whole = contents(calibrated)
        cut_short(a3, monkeypatch, solve, "correcting layer 2 of 2")
        with monkeypatch.context() as patch:
            patch.setattr(f"a3cli.stages.{name}", there)
            assert a3(*solve).code == 0
            assert contents(calibrated) == whole


def test_memory_that_runs_out_keeps_what_is_finished(a3, calibrated, monkeypatch):
    solve = ("solve", "--budget", 0.2, *SIZES, "--num-processes", 1, "--work", calibrated)
    assert a3(*solve).code == 0
    whole, plain = contents(calibrated), Best.project

    def running_out(self, inputs, *rest):
        if inputs.layer == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more lines")
        return plain(self, inputs, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Best, "project", running_out)
        refused(a3(*solve, "--overwrite"), "no memory left", "9 GiB", "--device cpu")
    assert (calibrated / ".solution.a3-partial" / "layer-000.safetensors").is_file()
    monkeypatch.setattr(Best, "project", only_once(plain))
    assert a3(*solve, "--overwrite").code == 0
    assert contents(calibrated) == whole


def test_export_goes_on_at_the_weight_file(a3, calibrated, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert a3("solve", "--budget", 0.2, *SIZES, "--method", "paper", "--work", calibrated).code == 0
    assert a3("export", whole, "--work", calibrated, "--max-shard-size", "40KB").code == 0
    export = ("export", out, "--work", calibrated, "--max-shard-size", "40KB", "--num-processes", 1)
    cut_short(a3, monkeypatch, export, "writing model-00003")
    assert not out.exists()
    asked = []
    monkeypatch.setattr(Stop, "before", lambda _self, step, _then: asked.append(step))
    assert a3(*export).code == 0
    assert asked[0].startswith("writing model-00003")
    assert contents(out) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole", "work"]


def test_a_full_disk_keeps_what_is_finished(a3, calibrated, tmp_path, monkeypatch):
    """In the middle of solve and export, one line reports it; with free space again, the bytes are the same."""
    solve = ("solve", "--budget", 0.2, *SIZES, "--num-processes", 1, "--work", calibrated)
    export = ("export", tmp_path / "out", "--work", calibrated, "--max-shard-size", "40KB", "--num-processes", 1)
    assert a3(*solve).code == 0
    assert a3("export", tmp_path / "whole", *export[2:]).code == 0
    solved, exported = contents(calibrated / "solution"), contents(tmp_path / "whole")
    save, write = safetensors.torch.save_file, HashingWriter.write

    def full_for_solve(tensors, path, *rest):
        if "layer-001" in str(path):
            no_space()
        save(tensors, path, *rest)

    def no_space():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_for_export(writer, data):
        if "model-00003" in writer._file.name:
            no_space()
        write(writer, data)

    stages = (
        ((*solve, "--overwrite"), calibrated / ".solution.a3-partial", "layer-000.safetensors"),
        (export, tmp_path / ".out.a3-partial", "model-00002-of-00007.safetensors"),
    )
    for command, draft, finished in stages:
        with monkeypatch.context() as patch:
            patch.setattr(safetensors.torch, "save_file", full_for_solve)
            patch.setattr(HashingWriter, "write", full_for_export)
            outcome = a3(*command)
        assert outcome.code == 2
        assert "cannot be written" in outcome.stderr
        assert "No space left" in outcome.stderr
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 1))
            outcome = a3(*command)  # the check fails before resuming, and the finished files stay
        assert outcome.code == 2
        assert "no disk space" in outcome.stderr
        assert (draft / finished).is_file()
        assert a3(*command).code == 0
        assert not draft.exists()
    assert contents(calibrated / "solution") == solved
    assert contents(tmp_path / "out") == exported


@pytest.mark.slow
def test_pareto_goes_on_at_the_point(a3, calibrated, text_file, monkeypatch):
    command = ("pareto", "--budgets", "0.2,0.3", *SIZES, "--dataset", text_file, *TEXT, "--work", calibrated, "--json")
    whole = json.loads(a3(*command).stdout)
    before = contents(calibrated)
    cut_short(a3, monkeypatch, command, "paper at 0.3")
    asked = []
    monkeypatch.setattr(Stop, "before", lambda _self, step, _then: asked.append(step))
    assert json.loads(a3(*command).stdout) == whole
    assert "paper at 0.2" not in asked
    assert "paper at 0.3" in asked
    assert contents(calibrated) == before


def cut_short(a3, monkeypatch, command: tuple[object, ...], step: str) -> None:
    """Run the command until before a step, as a signal would stop it."""
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "before", stop_at(step))
        interrupted(a3(*command), f"before {step}", "rerun the same command to resume")


def stop_at(step: str):
    """Return a `Stop.before` that receives a signal during the step before this one."""
    plain = Stop.before

    def before(self, name, then):
        if name.startswith(step):
            self.signal = signal.SIGTERM  # like its handler, but from any thread
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


def slow(step, *, of: int, seconds: float):
    """Send SIGTERM to this process in call number `of` of a step, which then takes so long."""
    calls = iter(range(of))

    def slowed(*args, **options):
        if next(calls, None) == of - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(seconds)
        return step(*args, **options)

    return slowed


def test_a_layer_of_the_sequential_correction_is_given_up(a3, calibrated, monkeypatch):
    """A signal in a batch of the second layer, which takes a minute; the same command resumes at that layer."""
    solve = ("solve", "--budget", 0.2, *SIZES, "--sequential", "--batch-size", 2, "--num-processes", 1)
    solve += ("--work", calibrated)
    assert a3(*solve).code == 0
    whole = contents(calibrated)
    monkeypatch.setattr(interrupt, "PATIENCE", 0.5)
    add, refit = LeastSquares.add, sequential._Layer.refit
    with monkeypatch.context() as patch:
        layers = iter((add, slow(add, of=2, seconds=60)))

        def slow_in_the_second(*args):
            patch.setattr(LeastSquares, "add", next(layers))
            return refit(*args)

        patch.setattr(sequential._Layer, "refit", slow_in_the_second)
        began = time.monotonic()
        outcome = a3(*solve, "--overwrite")
    assert time.monotonic() - began < 30
    interrupted(outcome, "interrupted", "rerun the same command")
    said = "SIGTERM: finishing the current step (correcting layer 2 of 2) if that takes at most 0.5 s; a second signal"
    assert said in outcome.stderr
    assert (calibrated / ".solution.a3-partial" / "refit-000.safetensors").is_file()
    outcome = a3(*solve, "--overwrite")
    assert outcome.code == 0
    assert "resuming at layer 2 of 2" in outcome.stderr
    assert contents(calibrated) == whole


def test_a_layer_of_the_calibration_is_given_up(a3, long_source, text_file, tmp_path, monkeypatch):
    command = ("calibrate", long_source, "--dataset", text_file, *TEXT, "--batch-size", 2, "--work")
    assert a3(*command, tmp_path / "whole").code == 0
    monkeypatch.setattr(interrupt, "PATIENCE", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "run_layer", slow(sweep.run_layer, of=4, seconds=60))  # two batches in each layer
        outcome = a3(*command, tmp_path / "cut")
    interrupted(outcome, "interrupted", "rerun the same command")
    assert not (tmp_path / "cut" / "calibration" / "layer-001.safetensors").exists()
    assert "resuming at layer 2 of 3" in a3(*command, tmp_path / "cut").stderr
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_step_that_ends_in_time_is_not_disturbed_later(number, monkeypatch):
    monkeypatch.setattr(interrupt, "PATIENCE", 0.2)
    with stopping() as stop:
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=f"stopped by {number.name} before the next"):
            stop.before("the next", "")
    time.sleep(0.4)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_step_has_less_than_ten_seconds_after_a_signal():
    """The rest is for threads, which get a moment to end, and for the operation in which the time is over."""
    assert interrupt.PATIENCE + processes.GRACE < 9


def solve_slowly(arguments: list[str], folder: str, alone: bool, patience: float, begun) -> None:
    """Run `a3 solve` in this process, with layers that take a minute each, as those of a large model do."""
    from a3cli.methods.paper import Paper
    from a3cli.models import costs

    def analyse(*_):
        Path(folder, "analysing").touch()
        time.sleep(60)

    Paper.analyse = analyse
    costs.side_by_side = lambda _: not alone
    interrupt.PATIENCE = patience
    forks._run(arguments, folder, None, begun)


@pytest.mark.parametrize(
    ("alone", "again", "number"),
    [(False, False, SIGTERM), (True, False, SIGINT), (False, True, SIGINT), (True, True, SIGTERM)],
)
def test_a_signal_is_obeyed_in_time(alone, again, number, calibrated, tmp_path):
    """Layers in threads, and one at a time: one line says what is being finished, and for how long; the process ends
    after that time, or at the second signal."""
    arguments = ["solve", "--budget", "0.2", "--method", "paper", "--work", str(calibrated)]
    ready, begun = forks.CONTEXT.Pipe(duplex=False)
    options = (arguments, str(tmp_path), alone, 30.0 if again else 0.5, begun)
    process = forks.CONTEXT.Process(target=solve_slowly, args=options, daemon=True)
    process.start()
    ready.recv()
    assert wait_for((tmp_path / "analysing").exists, seconds=60)
    os.kill(process.pid, number)
    said = r"finishing the current step \(analysing layer . of 2\) if that takes at most [0-9.]+ s"
    how = "press Ctrl-C again to stop now" if number is SIGINT else "a second signal stops at once"
    line = rf"^warning: {number.name}: {said}; {how}$"
    assert wait_for(lambda: re.search(line, (tmp_path / ".stderr").read_text(), re.M), seconds=2)
    if again:
        assert process.is_alive()
        os.kill(process.pid, number)
    process.join(2.5)
    code = process.exitcode
    process.kill()
    assert code == 3
    assert "error: interrupted; rerun the same command" in (tmp_path / ".stderr").read_text()


def wait_for(condition, *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


@pytest.mark.slow
def test_a_terminated_process_ends_its_layer_with_exit_code_three(checkpoint, text_file, tmp_path):
    """Send a real SIGTERM to a real process at any moment."""
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
