"""Several processes: the same statistics, one error for all, and nothing lost when one is killed."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from a3cli.errors import A3Error
from a3cli.work.interrupt import stopping
from a3cli.work.processes import (
    ELASTIC_HANDLES,
    ERROR_FOLDER,
    Processes,
    ahead,
    hand_over,
    launch,
    one_core_each,
    raise_first,
)
from tests.conftest import ROOT, but, refused
from tests.helpers import forks
from tests.helpers.statistics import assert_close, calibration_files

pytestmark = pytest.mark.usefixtures("hasty")

TEXT = ("--samples", 5, "--seq-len", 48, "--batch-size", 2, "--quiet")


@dataclass(frozen=True)
class Ended:
    codes: list[int]
    errors: list[str]


def command_line(rank: int, environment: dict[str, str], arguments: list[str], sabotage: Callable[[int], None]) -> None:
    """Run one of several processes, as a launcher starts it."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    from a3cli.cli.app import main

    sabotage(rank)
    sys.argv = ["a3", *arguments]
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        main()


def nothing(rank: int) -> None:
    """Cause no failure."""


def run(count: int, folder: Path, *arguments: object, sabotage: Callable[[int], None] = nothing) -> Ended:
    """Run the command in `count` processes; return exit codes, and each one's error, by rank."""
    errors = folder / f"errors-{time.monotonic_ns()}"
    errors.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost"}
    shared |= {"MASTER_PORT": str(port), ERROR_FOLDER: str(errors), "HF_HUB_OFFLINE": "1"}
    processes = []
    for rank in range(count):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        target = (rank, environment, [str(part) for part in arguments], sabotage)
        processes.append(forks.CONTEXT.Process(target=command_line, args=target))
        processes[-1].start()
    for process in processes:
        process.join(60)
        if process.exitcode is None:
            process.kill()
            process.join()
            pytest.fail("a process hangs")
    codes = [int(process.exitcode or 0) for process in processes]
    files = [errors / str(rank) for rank in range(count)]
    return Ended(codes, [file.read_text("utf-8") if file.exists() else "" for file in files])


@pytest.mark.parametrize(("samples", "counts"), [(5, (2, 3)), (2, (3,))])
def test_the_same_statistics_from_any_number_of_processes(samples, counts, a3, checkpoint, text_file, tmp_path):
    """Five blocks are not divisible by two or three; with two blocks, one of three processes has none."""
    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *but(TEXT, "--samples", samples), "--work")
    assert a3(*command, tmp_path / "1").code == 0
    for count in counts:
        assert run(count, tmp_path, *command, tmp_path / str(count)) == Ended([0] * count, [""] * count)
        assert not list((tmp_path / str(count)).rglob("hidden-*.bin"))
    assert_close([tmp_path / "1", *(tmp_path / str(count) for count in counts)])


def last_block(blocks: int, length: int) -> list[int]:
    return [blocks - 1]


def sampling_the_last_block(rank: int) -> None:
    from a3cli.solvers import samples

    samples.sampled_blocks = last_block


def test_samples_that_the_first_process_has_none_of(a3, checkpoint, text_file, tmp_path, monkeypatch):
    """This happens with long blocks, of which few are kept whole."""
    monkeypatch.setattr("a3cli.solvers.samples.sampled_blocks", last_block)
    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *TEXT, "--work")
    assert a3(*command, tmp_path / "1").code == 0
    assert run(2, tmp_path, *command, tmp_path / "2", sabotage=sampling_the_last_block) == Ended([0] * 2, [""] * 2)
    assert_close([tmp_path / "1", tmp_path / "2"])


def killed_in_the_second_layer(rank: int, victim: int = 1) -> None:
    """Kill a process by SIGKILL halfway through its share of layer 1: two blocks, one per batch."""
    from a3cli.stream import sweep

    plain, calls = sweep.run_layer, []

    def run_layer(*arguments):
        calls.append(None)
        if rank == victim and len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments)

    sweep.run_layer = run_layer


@pytest.mark.slow
def test_killed_in_a_layer_it_goes_on_there_with_any_number(a3, checkpoint, text_file, tmp_path):
    folder = checkpoint("llama-gqa")
    command = ("calibrate", folder, "--dataset", text_file, *but(TEXT, "--batch-size", 1), "--work")
    assert run(2, tmp_path, *command, tmp_path / "whole").codes == [0, 0]
    assert a3(*command, tmp_path / "alone").code == 0
    for count, victim in ((2, 0), (2, 1), (1, 1), (3, 1)):  # process 0 writes the files
        work = tmp_path / f"cut-{count}-{victim}"
        ended = run(2, tmp_path, *command, work, sabotage=partial(killed_in_the_second_layer, victim=victim))
        assert ended.codes[victim] == -signal.SIGKILL
        assert ended.codes[1 - victim] == 3
        assert "rerun the same command to resume" in ended.errors[1 - victim]
        kept = (work / "calibration" / "layer-000.safetensors").stat().st_mtime_ns
        assert not (work / "calibration" / "manifest.json").exists()
        assert run(count, tmp_path, *command, work).codes == [0] * count
        assert (work / "calibration" / "layer-000.safetensors").stat().st_mtime_ns == kept
        if count == 2:
            assert calibration_files(work) == calibration_files(tmp_path / "whole")
        assert_close([tmp_path / "alone", work])


def test_a_time_limit_stops_all_of_them(checkpoint, text_file, tmp_path):
    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *TEXT, "--work")
    assert run(2, tmp_path, *command, tmp_path / "whole").codes == [0, 0]
    ended = run(2, tmp_path, *command, tmp_path / "cut", "--max-minutes", 0)
    assert ended.codes == [3, 3], ended
    assert ended.errors[0].startswith("stopped by --max-minutes 0 before layer 2 of 2")
    assert run(2, tmp_path, *command, tmp_path / "cut").codes == [0, 0]
    assert calibration_files(tmp_path / "cut") == calibration_files(tmp_path / "whole")


def full_disk(rank: int) -> None:
    """Make process 1 alone fail to write a file of the hidden states' size."""
    if rank == 1:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))


def test_an_error_in_one_is_an_error_in_all(checkpoint, text_file, tmp_path):
    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *TEXT, "--work", tmp_path / "work")
    ended = run(2, tmp_path, *command, sabotage=full_disk)
    assert ended.codes == [2, 2]
    assert "hidden-next.bin cannot be written" in ended.errors[0]
    assert ended.errors[0] == ended.errors[1]
    assert not (tmp_path / "work").exists()


def failing_in_the_second_process(rank: int) -> None:
    from a3cli.stream import sweep

    if rank == 1:
        sweep.run_layer = None


def test_a_bug_in_one_is_told_by_its_exit_code(checkpoint, text_file, tmp_path):
    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *TEXT, "--work", tmp_path / "work")
    ended = run(2, tmp_path, *command, sabotage=failing_in_the_second_process)
    assert ended.codes == [3, 70]
    assert "lost another process" in ended.errors[0]


def test_the_lock_counts_for_all_of_a_run(checkpoint, text_file, tmp_path):
    from a3cli.work.folder import Work

    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *TEXT, "--work", tmp_path / "work")
    with Work(tmp_path / "work").locked():
        ended = run(2, tmp_path, *command)
    assert ended.codes == [2, 2]
    assert "in use by another a3 process" in ended.errors[0]
    assert run(2, tmp_path, *command).codes == [0, 0]


def waiting_in_the_second_layer(rank: int, begun: Path) -> None:
    """Report that the process has reached layer 1, then wait there."""
    from a3cli.stream import sweep

    plain, calls = sweep.run_layer, []

    def run_layer(*arguments):
        calls.append(None)
        if len(calls) == 4:  # five blocks, two per batch
            begun.touch()
            time.sleep(600)
        return plain(*arguments)

    sweep.run_layer = run_layer


def test_refused_while_another_runs_and_taken_over_when_that_was_killed(a3, checkpoint, text_file, tmp_path):
    work, begun = tmp_path / "work", tmp_path / "begun"
    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *TEXT, "--work")
    assert a3(*command, tmp_path / "whole").code == 0
    arguments = [str(part) for part in (*command, work)]
    target = (0, {}, arguments, partial(waiting_in_the_second_layer, begun=begun))
    first = forks.CONTEXT.Process(target=command_line, args=target, daemon=True)
    first.start()
    try:
        wait_for(begun)
        refused(a3(*command, work), f"work folder {work} is in use by another a3 process")
        refused(a3(*command, work, "--overwrite"), f"work folder {work} is in use by another a3 process")
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    kept = (work / "calibration" / "layer-000.safetensors").stat().st_mtime_ns
    assert (work / ".lock").exists()
    assert a3(*command, work).code == 0
    assert (work / "calibration" / "layer-000.safetensors").stat().st_mtime_ns == kept
    assert calibration_files(work) == calibration_files(tmp_path / "whole")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.01)


def test_shares_are_even_and_cover_everything():
    for count in (1, 2, 3, 7):
        for items in (1, 2, 7, 128):
            shares = []
            for rank in range(count):
                process = Processes()
                process.rank, process.count = rank, count
                shares.append(process.share(items))
            assert [item for share in shares for item in share] == list(range(items))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            assert len(shares[0]) == max(map(len, shares))


def children(process: subprocess.Popen[str]) -> list[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in listed.stdout.split()]


@pytest.mark.slow
def test_num_processes_starts_them_and_says_what_became_of_them(checkpoint, text_file, tmp_path):
    """Use the real command: one of its processes is killed, and the same command resumes."""
    folder = checkpoint("llama-gqa", num_hidden_layers=20)
    arguments = ("calibrate", folder, "--dataset", text_file, "--samples", 64, "--seq-len", 128, "--quiet")
    command = [
        sys.executable,
        "-m",
        "a3cli",
        *map(str, arguments),
        "--num-processes",
        "2",
        "--work",
        str(tmp_path / "w"),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, **pipes)
    deadline = time.monotonic() + 120
    while not (tmp_path / "w/calibration/layer-001.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    survivor, killed = children(first)
    os.kill(survivor, signal.SIGSTOP)  # so that the launcher's SIGTERM is the first signal that it handles
    os.kill(killed, signal.SIGKILL)
    time.sleep(2)
    os.kill(survivor, signal.SIGCONT)
    printed, said = first.communicate(timeout=60)
    assert (first.returncode, printed) == (3, ""), said
    (line,) = said.splitlines()
    assert line.startswith("error: process 1 was killed (SIGKILL)")
    assert not (tmp_path / "w/calibration/manifest.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith("calibrated 20 layers on 8,192 tokens")


@pytest.mark.slow
def test_num_processes_ends_with_the_code_of_a_bug(checkpoint, text_file, tmp_path):
    """Use the real command, with a bug in one of the processes that it starts."""
    fault = (
        "import os\nif os.environ.get('RANK') == '1':\n    from a3cli.stream import sweep\n    sweep.run_layer = None\n"
    )
    (tmp_path / "sitecustomize.py").write_text(fault)
    path = f"{tmp_path}:{ROOT}"
    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *TEXT, "--work", tmp_path / "work")
    ended = subprocess.run(
        [sys.executable, "-m", "a3cli", *map(str, command), "--num-processes", "2"],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (70, "")
    assert "TypeError: 'NoneType' object is not callable" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: this is a bug in a3 (exit code 70)")


def accelerate_launch(*arguments: object) -> list[str]:
    """Return the output of the real launcher's processes."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


@pytest.mark.slow
def test_accelerate_launches_one_process_or_two_on_a_cpu(a3, checkpoint, text_file, tmp_path):
    """Without a GPU, several processes need --multi_gpu too."""
    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *TEXT, "--work")
    launched = {
        1: ("--cpu", "--num_processes", 1),
        2: ("--multi_gpu", "--num_processes", 2),
    }
    assert a3(*command, tmp_path / "plain").code == 0
    for count, options in launched.items():
        work = tmp_path / str(count)
        (line,) = accelerate_launch(*options, "--num_machines", 1, "-m", "a3cli", *command, work, "--device", "cpu")
        assert line.startswith("calibrated 2 layers on 240 tokens")
        manifest = json.loads((work / "calibration" / "manifest.json").read_text())
        assert [layer["processes"] for layer in manifest["made_with"]] == [count, count]
    assert calibration_files(tmp_path / "1") == calibration_files(tmp_path / "plain")
    assert_close([tmp_path / "plain", tmp_path / "2"])


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", ["best", "paper"])
def test_solve_and_export_give_the_same_bytes_from_any_number(method, a3, checkpoint, text_file, tmp_path):
    source, work = checkpoint("llama-gqa", num_hidden_layers=5, max_shard_size="40KB"), ("--work", tmp_path / "work")
    assert a3("calibrate", source, "--dataset", text_file, "--samples", 6, "--seq-len", 60, *work).code == 0
    options = ("--budget", 0.3, "--head-multiple", 2, "--mlp-multiple", 8, "--shape", "per-layer", "--method", method)
    made = []
    for count in (1, 3):
        out = tmp_path / f"out-{count}"
        assert a3("solve", *options, "--overwrite", "--num-processes", count, *work).code == 0
        exported = a3("export", out, "--num-processes", count, "--max-shard-size", "30KB", "--json", *work)
        assert exported.code == 0
        assert len([name for name in exported.json["files"] if name.endswith(".safetensors")]) > 5
        made.append((everything(tmp_path / "work" / "solution"), everything(out)))
    assert made[0] == made[1]
    assert a3("solve", *options, "--num-processes", 2, *work).code == 0  # the same request: nothing to do
    assert everything(tmp_path / "work" / "solution") == made[0][0]


@pytest.mark.parametrize(
    ("codes", "said", "expected"),
    [
        ({0: 2, 1: 2}, {0: "no text", 1: "no text"}, (2, "no text")),
        (
            {0: 3, 1: -9},
            {0: "lost another process"},
            (3, "process 1 was killed (SIGKILL); rerun the same command to resume"),
        ),
        ({0: -15, 1: -9}, {}, (3, "process 1 was killed (SIGKILL)")),
        ({0: 2, 1: -6}, {0: "no text"}, (2, "no text")),  # process 1 aborts after its peers have ended
        ({0: 3, 1: -15}, {0: "interrupted"}, (3, "interrupted")),
        ({0: 1, 1: 2}, {1: "no text"}, (2, "no text")),
        ({0: -9, 1: -9}, {}, (3, "process 0 was killed (SIGKILL) and process 1 was killed (SIGKILL);")),
        ({0: -15, 1: -15}, {}, (3, "all processes were terminated (SIGTERM)")),
    ],
)
def test_of_several_failures_the_cause_is_told(codes, said, expected, tmp_path):
    for rank, message in said.items():
        (tmp_path / str(rank)).write_text(message)
    with pytest.raises(A3Error, match=re.escape(expected[1])) as raised:
        raise_first(codes, tmp_path)
    assert raised.value.exit_code == expected[0]


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ({0: 3, 1: 70}, {}),
        ({0: 70, 1: 70}, {}),
        ({0: 3, 1: 1}, {}),  # before any message was written: Python itself failed
        ({0: 3, 1: 70}, {0: "lost another process"}),
        ({0: -15, 1: 70}, {0: "interrupted"}),
        ({0: -9, 1: 70}, {}),  # killed by the launcher, which does not wait for a long layer
    ],
)
def test_a_bug_keeps_its_exit_code(codes, said, tmp_path):
    """Code 3 would make a pipeline rerun the command forever, and code 1 would mean a failed gate."""
    for rank, message in said.items():
        (tmp_path / str(rank)).write_text(message)
    with pytest.raises(SystemExit) as stop:
        raise_first(codes, tmp_path)
    assert stop.value.code == 70


@pytest.mark.parametrize(("rank", "local", "speaks"), [(0, 0, True), (1, 1, False), (8, 0, True), (9, 1, False)])
def test_on_each_machine_one_process_speaks(rank, local, speaks, monkeypatch):
    """Simulate another launcher: two machines with eight processes each."""
    for name, value in {"WORLD_SIZE": 16, "RANK": rank, "LOCAL_RANK": local}.items():
        monkeypatch.setenv(name, str(value))
    assert hand_over("no text") != speaks


def test_launching_leaves_signals_as_they_were(monkeypatch):
    """Their handlers then belong to the next stage."""
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with stopping() as stop:
        before = [signal.getsignal(number) for number in ELASTIC_HANDLES]
        launch(2, [])
        assert [signal.getsignal(number) for number in ELASTIC_HANDLES] == before
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal is signal.SIGTERM


@pytest.mark.parametrize("victim", [0, 1])
def test_memory_that_one_of_them_lacks_makes_all_batches_smaller(victim, a3, checkpoint, text_file, tmp_path):
    auto = (*but(TEXT, "--batch-size", "auto"), "--work")
    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *auto)
    ended = run(2, tmp_path, *command, tmp_path / "2", sabotage=partial(short_of_memory, victim=victim))
    assert ended == Ended([0, 0], ["", ""])
    manifest = json.loads((tmp_path / "2" / "calibration" / "manifest.json").read_text())
    assert manifest["made_with"] == [{"processes": 2, "batch_size": 1}] * 2
    assert a3(*command, tmp_path / "1").code == 0
    assert_close([tmp_path / "1", tmp_path / "2"])


def short_of_memory(rank: int, victim: int) -> None:
    """Make one process alone run out of memory with two blocks."""
    from a3cli.stream import sweep

    plain = sweep.run_layer

    def run_layer(layer, batch, arguments):
        if rank == victim and len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return plain(layer, batch, arguments)

    sweep.run_layer = run_layer


@pytest.mark.parametrize("options", [("--device", "gpu"), ("--devices", "gpu,gpu")])
def test_a_device_that_is_none_is_told_by_each_process(options, checkpoint, text_file, tmp_path):
    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *TEXT, "--work", tmp_path / "work")
    ended = run(2, tmp_path, *command, *options)
    assert ended.codes == [2, 2]
    assert all(error.startswith(f"{options[0]} 'gpu' is not a device") for error in ended.errors)
    assert not (tmp_path / "work").exists()


def test_results_come_in_order_while_a_few_more_are_made():
    asked, fourth = [], threading.Event()

    def job(number):
        if number == 3:
            fourth.set()
        if number == 7:
            raise A3Error("the eighth")
        return number if number else fourth.wait(30)

    def jobs():
        for number in range(10):
            asked.append(number)
            yield partial(job, number)

    with one_core_each(2) as threads:
        results = ahead(threads, jobs(), 3)
        assert next(results) is True  # the fourth was computed while the first waited
        assert asked == [0, 1, 2, 3]
        assert [next(results) for _ in range(6)] == [1, 2, 3, 4, 5, 6]
        with pytest.raises(A3Error, match="the eighth"):
            next(results)
