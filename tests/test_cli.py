"""The command line itself: help that answers at once, every command documented, exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("calibrate", "solve", "pareto", "export", "eval")


def test_help_and_version_import_nothing_heavy():
    code = "import sys, a3cli.cli; print({'torch', 'transformers', 'datasets', 'pydantic'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command, a3):
    import typer

    from a3cli.cli import app

    group = typer.main.get_command(app)
    assert set(group.commands) == set(COMMANDS)
    for parameter in group.commands[command].params:
        if parameter.name != "help":
            assert parameter.help, f"{command}: {parameter.name}"
    assert a3(command, "--help").code == 0


def test_version(a3):
    import a3cli

    assert a3("--version").stdout.strip() == a3cli.__version__


def test_unknown_option_is_exit_code_two(a3):
    assert a3("solve", "--no-such-option").code == 2


def test_readme_uses_only_options_that_exist(a3):
    """Every `a3 …` line of README and docs parses: its command exists and knows its options."""
    import typer

    from a3cli.cli import app

    group = typer.main.get_command(app)
    text = "\n".join(path.read_text("utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    lines = re.findall(r"^\$? ?a3 (.+)$", text, re.M)
    assert {line.split()[0] for line in lines} == set(COMMANDS)
    for line in lines:
        command, *rest = line.split("#")[0].split()
        known = {option for parameter in group.commands[command].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, line


def test_readme_road(a3, checkpoint, text_file, tmp_path, monkeypatch):
    """The README's four commands in order, with a small model and local text in place of the hub's."""
    monkeypatch.chdir(tmp_path)
    source = checkpoint("llama-gqa", hidden_size=64, intermediate_size=256)
    assert a3("calibrate", source, "--dataset", text_file, "--samples", 4, "--seq-len", 64).code == 0
    assert a3("solve", "--budget", 0.25).code == 0
    outcome = a3("export", "out/")
    assert outcome.code == 0
    assert outcome.stdout.strip().endswith("out")
    assert a3("eval", "out/", "--against", source, "--dataset", text_file, "--samples", 2, "--seq-len", 64).code == 0


def test_work_folder_from_the_environment(a3, checkpoint, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("A3_WORK", str(tmp_path / "elsewhere"))
    assert a3("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, "--samples", 2, "--seq-len", 32).code == 0
    assert (tmp_path / "elsewhere" / "calibration" / "manifest.json").is_file()


def test_json_is_all_there_is_on_stdout(a3, checkpoint, text_file, tmp_path):
    work = ("--work", tmp_path / "work", "--json")
    text = ("--dataset", text_file, "--samples", 2, "--seq-len", 32)
    for command in (
        ("calibrate", checkpoint("llama-gqa"), *text, *work),
        ("solve", "--budget", 0.2, "--mlp-multiple", 8, *work),
        ("export", tmp_path / "out", *work),
        ("eval", tmp_path / "out", *text, "--json"),
    ):
        outcome = a3(*command)
        assert outcome.code == 0
        assert isinstance(json.loads(outcome.stdout), dict)


def test_quiet_says_nothing_on_the_way(a3, checkpoint, text_file, tmp_path):
    outcome = a3(
        "calibrate", checkpoint("llama-gqa"), "--dataset", text_file, "--samples", 2, "--seq-len", 32, "--quiet",
        "--work", tmp_path / "work",
    )  # fmt: skip
    assert outcome.stderr == ""
