"""What people expect of a command line: `-h`, shell completion, and suggestions for what was mistyped."""

import pytest

from tests.conftest import refused
from tests.helpers.commands import COMMANDS


@pytest.mark.parametrize("words", [(), *(command.split() for command in COMMANDS), ("stats",)])
def test_h_is_help(a3, words):
    short, long = a3(*words, "-h"), a3(*words, "--help")
    assert short == long
    assert (long.code, long.stderr) == (0, "")
    assert "Usage: a3" in long.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("solve", "--budgett", 0.3), "No such option: --budgett. Did you mean --budget? (see a3 solve --help)"),
        (("eval", "out", "--agianst", "m"), "No such option: --agianst. Did you mean --against? (see a3 eval --help)"),
        (("--verzion",), "No such option: --verzion. Did you mean --version? (see a3 --help)"),
        (("calibrte", "m"), "No such command 'calibrte'. Did you mean 'calibrate'? (see a3 --help)"),
        (("stats", "mrge", "a"), "No such command 'mrge'. Did you mean 'merge'? (see a3 stats --help)"),
    ],
)
def test_what_was_mistyped_gets_a_suggestion(a3, words, message):
    outcome = a3(*words)
    refused(outcome)
    assert outcome.stderr == f"error: {message}\n"


def test_an_option_like_no_other_gets_none(a3):
    assert a3("solve", "--xyz").stderr == "error: No such option: --xyz (see a3 solve --help)\n"


@pytest.fixture
def complete(a3, monkeypatch):
    """Return a function that completes the last word of a command line, as bash does."""

    def completions(*words: str) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setenv("_A3_COMPLETE", "complete_bash")
            patch.setenv("COMP_WORDS", " ".join(("a3", *words)))
            patch.setenv("COMP_CWORD", str(len(words)))
            outcome = a3()
        assert (outcome.code, outcome.stderr) == (0, "")
        return outcome.stdout.split()

    return completions


def test_commands_options_and_choices_are_completed(complete):
    assert complete("cal") == ["calibrate"]
    assert complete("solve", "--budget-b") == ["--budget-bytes"]
    assert complete("solve", "--kv") == ["--kv-budget"]
    assert complete("solve", "--method", "p") == ["paper"]
    assert complete("export", "out", "--dtype", "f") == ["float32", "float16"]
    assert complete("stats", "m") == ["merge"]
    assert complete("solve", "--budget", "0.1", "--budget", "0.2", "--rope-") == [
        "--rope-form"
    ]  # refused only when run


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_shown_and_installed(a3, shell, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: (shell, shell))
    shown = a3("--show-completion")
    assert (shown.code, shown.stderr) == (0, "")
    assert f"_A3_COMPLETE=complete_{shell}" in shown.stdout
    installed = a3("--install-completion")
    assert installed.code == 0, installed
    written = "\n".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert f"_A3_COMPLETE=complete_{shell}" in written
