"""An unreadable file is named, with a remedy; the file that was being written at the time is not blamed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from a3cli.stages import correction, export, merge
from a3cli.stream.hidden import StatesOnDisk
from a3cli.work.draft import Draft
from tests.conftest import SHORT, SOLVE, refused, snapshot

pytestmark = pytest.mark.usefixtures("hasty")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    path.unlink()


def tie_to_itself(path: Path) -> None:
    """Make opening the file raise an OSError."""
    path.unlink()
    path.symlink_to(path.name)


DAMAGES = [truncate, remove, tie_to_itself]


@pytest.fixture
def while_writing(monkeypatch):
    """Return a function that schedules an action for after all checks, when a folder begins to be written."""

    def arrange(happen: Callable[[], None]) -> None:
        plain = Draft.check_space

        def check_space(draft, needed, what):
            monkeypatch.setattr(Draft, "check_space", plain)
            plain(draft, needed, what)
            happen()

        monkeypatch.setattr(Draft, "check_space", check_space)

    return arrange


def read_error(outcome, path: Path, remedy: str) -> None:
    refused(outcome, str(path), remedy)
    assert "cannot be written" not in outcome.stderr


@pytest.mark.parametrize("damage", DAMAGES)
def test_statistics_while_a_solution_is_written(damage, a3, work, while_writing):
    command = (*SOLVE, "--overwrite", "--num-processes", 1, "--quiet", "--work", work)
    assert a3(*command).code == 0
    before = snapshot(work / "solution")
    statistics = work / "calibration" / "layer-001.safetensors"
    kept = statistics.read_bytes()
    while_writing(lambda: damage(statistics))
    read_error(a3(*command), statistics, "run a3 calibrate --overwrite")
    assert snapshot(work / "solution") == before
    assert (work / ".solution.a3-partial" / "layer-000.safetensors").is_file()  # a finished layer stays
    statistics.unlink(missing_ok=True)
    statistics.write_bytes(kept)
    assert a3(*command).code == 0
    assert snapshot(work / "solution") == before


@pytest.mark.parametrize("name", ["tokens", "one-shot", "streams"])
def test_what_the_sequential_correction_reads(name, a3, work, monkeypatch, tmp_path):
    files = {
        "tokens": work / "calibration" / "tokens.safetensors",
        "one-shot": work / ".solution.a3-partial" / "one-shot-001.safetensors",
        "streams": work / ".solution.a3-partial" / "streams",
    }
    plain = correction.refit_layers

    def refit_layers(*arguments):
        if name != "streams":
            truncate(files[name])
        return plain(*arguments)

    def report(**at):
        if name == "streams" and at.get("layer") == 0:
            for file in files[name].iterdir():
                truncate(file)

    monkeypatch.setattr(correction, "refit_layers", refit_layers)
    monkeypatch.setattr("a3cli.cli.progress.SweepProgress.__call__", lambda _, **at: report(**at))
    outcome = a3(*SOLVE, "--method", "paper", "--sequential", "--overwrite", "--quiet", "--work", work)
    read_error(outcome, files[name], "run a3 calibrate --overwrite" if name == "tokens" else "rerun the same command")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["work/solution/layer-001.safetensors", "source/model-00003-of-00007.safetensors"])
def test_weights_while_an_export_is_written(name, damage, a3, work, while_writing, tmp_path):
    command = ("export", tmp_path / "out", "--max-shard-size", "40KB", "--quiet", "--work", work)
    assert a3("export", tmp_path / "whole", *command[2:]).code == 0
    file = tmp_path / name
    kept = file.read_bytes()
    while_writing(lambda: damage(file))
    read_error(a3(*command), file, "run a3 solve --overwrite" if name.startswith("work") else "download it again")
    assert not (tmp_path / "out").exists()
    file.unlink(missing_ok=True)
    file.write_bytes(kept)
    assert a3(*command).code == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_files_that_an_export_carries_over(a3, work, monkeypatch, tmp_path):
    plain = export.carry_files

    def carry_files(source, folder):
        found = source.small_files()
        monkeypatch.setattr(source, "small_files", lambda: found)
        tie_to_itself(tmp_path / "source" / "tokenizer.json")
        plain(source, folder)

    monkeypatch.setattr(export, "carry_files", carry_files)
    outcome = a3("export", tmp_path / "out", "--quiet", "--work", work)
    read_error(outcome, tmp_path / "source" / "tokenizer.json", "restore the file")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["tokens.safetensors", "layer-001.safetensors"])
def test_statistics_while_they_are_merged(name, damage, a3, prepared, text_file, monkeypatch, tmp_path):
    command = ("calibrate", prepared / "source", "--dataset", text_file, *SHORT, "--seed", 7)
    assert a3(*command, "--work", tmp_path / "more").code == 0
    shutil.copytree(prepared / "work", tmp_path / "work")
    file = tmp_path / "more" / "calibration" / name
    plain = merge.check_hash

    def check_hash(path, expected, remedy):
        plain(path, expected, remedy)
        if path == file:
            damage(path)

    monkeypatch.setattr(merge, "check_hash", check_hash)
    outcome = a3("stats", "merge", tmp_path / "work", tmp_path / "more", "--into", tmp_path / "all")
    outcome = type(outcome)(outcome.code, outcome.stdout, outcome.stderr.splitlines()[-1])
    read_error(outcome, file, "run a3 calibrate --overwrite there")
    assert not (tmp_path / "all" / "calibration").exists()


def test_hidden_states_of_a_calibration(a3, prepared, text_file, monkeypatch, tmp_path):
    """The input of the second layer becomes unreadable between the two layers."""
    states = tmp_path / "work" / "calibration" / "hidden-001.bin"
    plain = StatesOnDisk.keep

    def keep(self, layer, checks):
        plain(self, layer, checks)
        if layer == 1:
            tie_to_itself(states)

    monkeypatch.setattr(StatesOnDisk, "keep", keep)
    command = ("calibrate", prepared / "source", "--dataset", text_file, *SHORT, "--quiet", "--work", tmp_path / "work")
    read_error(a3(*command), states, "rerun the same command")
