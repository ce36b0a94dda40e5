"""`--output FILE`: the result as JSON, beside what is printed; the file is checked before any work starts."""

import json

import pytest

from tests.conftest import refused
from tests.helpers.commands import chain

pytestmark = pytest.mark.usefixtures("hasty")
COMMANDS = ("pareto", "eval", "verify", "plan", "inspect")


@pytest.fixture
def commands(a3, checkpoint, text_file, tmp_path):
    """Return the words of each command, with the work folder and the export that they need."""
    found = chain(checkpoint("llama-gqa"), text_file, tmp_path)
    for command in ("calibrate", "solve", "export"):
        assert a3(command, *found[command]).code == 0
    return found


def test_the_file_has_what_json_prints(a3, commands, tmp_path):
    for command in COMMANDS:
        file = tmp_path / f"{command}.json"
        words = (command, *commands[command], "--output", file)
        printed = a3(*words, "--json")
        assert printed.code == 0, printed
        assert file.read_text("utf-8") == printed.stdout
        file.write_text("of before")
        assert not a3(*words).stdout.startswith("{")
        assert json.loads(file.read_text("utf-8")).keys() == printed.json.keys()
    assert not list(tmp_path.glob(".*.partial"))


def test_a_failed_gate_leaves_the_file(a3, commands, tmp_path):
    outcome = a3("eval", *commands["eval"][:-1], "kl >= 0", "--output", tmp_path / "eval.json")
    assert outcome.code == 1
    assert json.loads((tmp_path / "eval.json").read_text())["datasets"][0]["gates"][0]["failed"]


STAGES = {
    "eval": "a3cli.stages.evaluate.evaluate",
    "inspect": "a3cli.report.inspection.describe",
} | {command: f"a3cli.stages.{command}.{command}" for command in ("pareto", "verify", "plan")}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_be_written_is_refused_before_work(a3, command, tmp_path, monkeypatch):
    monkeypatch.setattr(STAGES[command], lambda *_, **__: 1 / 0)
    words = (command, *chain("model", "text.txt", tmp_path)[command])
    refused(a3(*words, "--output", tmp_path / "none" / "a.json"), "--output", "there is no folder")
    refused(a3(*words, "--output", tmp_path), "--output", "it is a folder")
