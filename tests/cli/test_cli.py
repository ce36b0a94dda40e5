"""The command line: fast help, documentation of every command, and exit codes."""

import errno
import importlib.metadata
import os
import platform
import pty
import re
import subprocess
import sys
from contextlib import suppress
from itertools import count
from types import SimpleNamespace

import pytest

import a3cli
from tests.conftest import ROOT, but
from tests.helpers.commands import COMMANDS, RECIPE, chain, commands_of

pytestmark = pytest.mark.usefixtures("hasty")


def test_help_and_version_import_nothing_heavy():
    code = "import sys, a3cli.cli.app; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command, a3, command_line):
    commands = commands_of(command_line)
    assert set(commands) == set(COMMANDS)
    for parameter in commands[command].params:
        if parameter.name != "help":
            assert parameter.help, f"{command}: {parameter.name}"
    assert a3(*command.split(), "--help").code == 0


def test_version(a3):
    assert a3("--version").stdout.strip() == a3cli.__version__


def test_unknown_option_is_exit_code_two(a3):
    assert a3("solve", "--no-such-option").code == 2


def test_readme_uses_only_options_that_exist(command_line):
    """Every `a3 …` line of the README and the docs parses: its command and its options exist."""
    commands = commands_of(command_line)
    text = "\n".join(path.read_text("utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    lines = re.findall(r"^\$? ?a3 (.+)$", text, re.M)
    used = {line: next((c for c in COMMANDS if f"{line} ".startswith(f"{c} ")), None) for line in lines}
    assert set(used.values()) == set(COMMANDS), used
    for line, command in used.items():
        known = {option for parameter in commands[command].params for option in parameter.opts}
        assert {word for word in line.split("#")[0].split() if word.startswith("--")} <= known, line


def test_readme_road(a3, checkpoint, text_file, tmp_path, monkeypatch):
    """Run the README's five commands in order, with a small model and local text instead of those from the Hub."""
    monkeypatch.chdir(tmp_path)
    source = checkpoint("llama-gqa", hidden_size=64, intermediate_size=256)
    assert a3("calibrate", source, "--dataset", text_file, "--samples", 4, "--seq-len", 64).code == 0
    assert a3("solve", "--budget", 0.25).code == 0
    outcome = a3("export", "out/")
    assert outcome.code == 0
    assert outcome.stdout.splitlines()[-2:] == ["out", "next: a3 verify out"]
    outcome = a3("verify", "out/")
    assert (outcome.code, outcome.stdout.splitlines()[-1]) == (0, f"next: a3 eval out --against {source}")
    assert a3("eval", "out/", "--against", source, "--dataset", text_file, "--samples", 2, "--seq-len", 64).code == 0


def test_work_folder_from_the_environment(a3, checkpoint, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("A3_WORK", str(tmp_path / "elsewhere"))
    assert a3("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, "--samples", 2, "--seq-len", 32).code == 0
    assert (tmp_path / "elsewhere" / "calibration" / "manifest.json").is_file()


@pytest.mark.usefixtures("hasty")
def test_results_go_to_stdout_and_all_else_to_stderr(a3, checkpoint, text_file, tmp_path):
    """With --json --quiet, stderr is empty; otherwise, off a terminal, neither stream has colours or bars."""
    source = checkpoint("llama-gqa")
    commands = chain(source, text_file, tmp_path)
    assert set(commands) == set(COMMANDS)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, source=source, text=text_file))
    assert a3("calibrate", *but(commands["calibrate"], "--seed", 1, "--work", tmp_path / "more")).code == 0
    for command, arguments in commands.items():
        outcome = a3(*command.split(), *arguments, "--json", "--quiet")
        assert outcome.code == 0, outcome
        assert outcome.stderr == "", command
        assert isinstance(outcome.json, dict)
        shown = a3(*command.split(), *arguments, *(("--overwrite",) if command == "export" else ()))
        assert shown.code == 0, shown
        assert shown.stdout.strip()
        assert not [mark for mark in ("\x1b", "\r", "%|") if mark in shown.stdout + shown.stderr], command


STAGE_OF = {
    "stats merge": "a3cli.stages.merge.merge",
    "run": "a3cli.stages.run.run_recipe",
    "export": "a3cli.stages.publish.export_and_push",
    "eval": "a3cli.stages.evaluate.evaluate",
}
STAGE_OF |= {"inspect": "a3cli.report.inspection.describe", "report": "a3cli.report.inspection.describe"}


@pytest.mark.parametrize("bug", [ZeroDivisionError("of ours"), EOFError(), OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bug_has_an_exit_code_of_its_own(command, bug, a3, tmp_path, monkeypatch):
    """The code differs from 1, which means a failed gate, and 3, after which a pipeline reruns the command."""

    def failing(*arguments, **options):
        raise bug

    monkeypatch.setattr(STAGE_OF.get(command, f"a3cli.stages.{command}.{command}"), failing)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, source="x", text="x"))
    outcome = a3(*command.split(), *(str(word) for word in chain("source", "text.txt", tmp_path)[command]))
    assert (outcome.code, outcome.stdout) == (70, "")
    first, *_, raised, last = outcome.stderr.splitlines()
    assert first == "Traceback (most recent call last):"
    assert raised.startswith(type(bug).__name__)
    assert last.startswith("error: this is a bug in a3 (exit code 70); please report it")
    for name, version in (("a3", a3cli.__version__), ("python", platform.python_version())):
        assert f"{name} {version}" in last
    for package in ("torch", "transformers"):
        assert f"{package} {importlib.metadata.version(package)}" in last


def test_a_bug_before_any_command_has_that_exit_code(a3, monkeypatch):
    monkeypatch.setattr("a3cli.cli.app.app", lambda: 1 / 0)
    outcome = a3("--help")
    assert outcome.code == 70
    assert "ZeroDivisionError" in outcome.stderr


@pytest.fixture
def a_minute_a_step(monkeypatch):
    """Install a clock that advances by one minute whenever a stage asks whether its next step may start."""
    minutes = count()
    monkeypatch.setattr("a3cli.work.interrupt.time", SimpleNamespace(monotonic=lambda: 60.0 * next(minutes)))


@pytest.mark.usefixtures("a_minute_a_step")
@pytest.mark.parametrize(("command", "minutes"), [("pareto", 6.5), ("export", 4.5)])
def test_a_time_limit_stops_between_steps_and_the_same_command_goes_on(command, minutes, a3, work, tmp_path):
    commands = {
        "pareto": ("--budgets", "0.2,0.3", "--head-multiple", 2, "--mlp-multiple", 8, "--json"),
        "export": (tmp_path / "out", "--max-shard-size", "40KB", "--json"),
    }
    arguments = (command, *commands[command], "--work", work)
    slices = [a3(*arguments, "--max-minutes", minutes)]
    while slices[-1].code == 3 and len(slices) < 10:
        assert slices[-1].stdout == ""
        assert f"stopped by --max-minutes {minutes} before" in slices[-1].stderr.splitlines()[-1]
        slices.append(a3(*arguments, "--max-minutes", minutes))
    assert 1 < len(slices) < 10
    assert slices[-1].code == 0, slices[-1]
    at_once = (command, tmp_path / "whole", *arguments[2:]) if command == "export" else arguments
    assert a3(*at_once).json == slices[-1].json


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"calibrate"}))
def test_only_calibrate_is_started_in_several_processes(command, a3, tmp_path, monkeypatch):
    """With `accelerate launch`, every other command fails in all processes and prints the error in the first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        outcome = a3(*command.split(), "x")
        assert (outcome.code, outcome.stdout) == (2, "")
        assert len(outcome.stderr.splitlines()) == 1 - rank
        assert rank or f"a3 {command.split()[0]} works in one process" in outcome.stderr
    assert not list(tmp_path.iterdir())


def on_terminal(*arguments: str, **environment: str) -> str:
    """Return what a command prints on a terminal."""
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", **environment}
    process = subprocess.Popen([sys.executable, "-m", "a3cli", *arguments], stdout=slave, stderr=slave, env=env)
    os.close(slave)
    shown = b""
    with suppress(OSError):  # raised at the terminal's end on Linux
        while part := os.read(master, 1 << 16):
            shown += part
    os.close(master)
    process.wait()
    return shown.decode()


def test_colours_only_where_they_are_wanted():
    red = re.compile(r"\x1b\[[0-9;]*3\dm")
    assert red.search(on_terminal("solve", "--no-such-option"))
    assert not red.search(on_terminal("solve", "--no-such-option", NO_COLOR="1"))
    assert "\x1b" not in on_terminal("solve", "--no-such-option", TERM="dumb")
