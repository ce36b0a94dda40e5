"""The last line of a stage is the command that comes next, which works as it stands; a finished run says so."""

import shlex
import shutil

import pytest

from tests.conftest import SHORT, SOLVE
from tests.helpers.commands import RECIPE

pytestmark = pytest.mark.usefixtures("hasty")

TEXT = ("--dataset", "text.txt", "--samples", 2, "--seq-len", 32)


@pytest.fixture
def here(checkpoint, text_file, tmp_path, monkeypatch):
    """A current folder with a model and a text, in names that a shell would split."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint("llama-gqa"), "a model")
    shutil.copyfile(text_file, "text.txt")
    return tmp_path


def next_of(outcome) -> str:
    assert outcome.code == 0, outcome
    line = outcome.stdout.splitlines()[-1]
    assert line.startswith("next: a3 "), outcome.stdout
    return line.removeprefix("next: a3 ")


@pytest.mark.parametrize("place", [(), ("--work", "my work")])
def test_each_command_leads_to_the_next(place, a3, here):
    """With the sizes of a small model added, each line runs as printed, up to the report."""
    line = next_of(a3("calibrate", "a model", "--dataset", "text.txt", *SHORT, *place))
    assert line == "solve --budget 0.25" + (" --work 'my work'" if place else "")
    line = next_of(a3(*shlex.split(line), *SOLVE[3:]))
    assert line == "export OUT" + (" --work 'my work'" if place else "")
    line = next_of(a3(*shlex.split(line)))
    assert line == "verify OUT" + (" --work 'my work'" if place else "")
    line = next_of(a3(*shlex.split(line)))
    assert line == "eval OUT --against 'a model'"
    line = next_of(a3(*shlex.split(line), *TEXT))
    assert line == "report OUT --html report.html"
    assert a3(*shlex.split(line)).code == 0
    assert (here / "report.html").is_file()


def test_names_and_shapes_are_part_of_it(a3, here):
    assert a3("calibrate", "a model", "--dataset", "text.txt", *SHORT).code == 0
    line = next_of(a3(*SOLVE, "--shape", "per-layer", "--name", "q25"))
    assert line == "export OUT-q25 --name q25"
    line = next_of(a3(*shlex.split(line)))
    assert line == "verify OUT-q25 --trust-remote-code"
    line = next_of(a3(*shlex.split(line)))
    assert line == "eval OUT-q25 --against 'a model' --trust-remote-code"
    next_of(a3(*shlex.split(line), *TEXT))


def test_solve_ends_with_what_was_removed(a3, here):
    assert a3("calibrate", "a model", "--dataset", "text.txt", *SHORT).code == 0
    outcome = a3(*SOLVE)
    manifest = a3(*SOLVE, "--json").json
    line = outcome.stdout.splitlines()[-3]
    assert line.startswith(f"removed {100 * manifest['budget_reached']:.2f} % of the decoder's linear weights")
    after = manifest["parameters"]["after"]
    assert f"parameters become {after / 1000:.3g} k," in line


@pytest.mark.parametrize("silent", ["--json", "--quiet"])
def test_programs_do_not_see_it(silent, a3, here):
    commands = (
        ("calibrate", "a model", "--dataset", "text.txt", *SHORT),
        SOLVE,
        ("export", "OUT"),
        ("verify", "OUT"),
        ("eval", "OUT", "--against", "a model", *TEXT),
    )
    for command in commands:
        outcome = a3(*command, silent)
        assert (outcome.code, "next:" in outcome.stdout + outcome.stderr) == (0, False), command


def test_there_is_nothing_next_after_a_failed_gate_or_another_model(a3, here):
    outcome = a3("eval", "a model", "--against", "a model", *TEXT)
    assert (outcome.code, "next:" in outcome.stdout) == (0, False)
    outcome = a3("eval", "a model", "--against", "a model", *TEXT, "--fail-if", "kl < 1")
    assert (outcome.code, "next:" in outcome.stdout) == (1, False)


def test_a_finished_run_says_that_it_is_done(a3, here):
    (here / "recipe.yaml").write_text(RECIPE.format(folder=".", source="'./a model'", text="./text.txt"))
    done = "nothing was left to do"
    assert done not in a3("run", "recipe.yaml").stdout
    again = a3("run", "recipe.yaml")
    assert again.stdout.splitlines()[-1] == (f"{done}: this run had finished; the export is in {here / 'recipe-out'}")
    for silent in ("--json", "--quiet"):
        assert done not in a3("run", "recipe.yaml", silent).stdout
    shutil.rmtree(here / "recipe-out")
    assert done not in a3("run", "recipe.yaml").stdout
    assert done not in a3("run", "recipe.yaml", "--overwrite").stdout
