"""Options come from the settings: short help, choices and panels, and the defaults that `--help` shows."""

import re
from contextlib import suppress
from typing import Literal, get_args, get_origin

import pytest

from a3cli.settings import (
    CalibrateSettings,
    EvalSettings,
    ExportSettings,
    ParetoSettings,
    PlanSettings,
    SolveSettings,
    VerifySettings,
)
from a3cli.settings.generation import GenerateSettings
from a3cli.settings.options import PANELS, option_of
from tests.helpers.commands import COMMANDS, commands_of

LONGEST_HELP = 60  # characters
# Each command with its required arguments only, and the expected settings.
DEFAULTS = {
    "calibrate": (("model",), CalibrateSettings(model="model", texts=[{"dataset": "wikitext2"}, {"dataset": "c4"}])),
    "solve": ((), SolveSettings()),
    "pareto": ((), ParetoSettings()),
    "export": (("out",), ExportSettings()),
    "eval": (("model",), EvalSettings(model="model", texts=[{"dataset": "wikitext2", "samples": None}])),
    "verify": (("out",), VerifySettings()),
    "plan": (("model",), PlanSettings(model="model")),
    "generate": (("model",), GenerateSettings(model="model")),
}


@pytest.fixture
def settings_of(command_line, monkeypatch):
    """Return the settings that a command gets from its arguments, without running it."""

    class Parsed(Exception):
        pass

    def parse(command, *arguments):
        made = []

        def make_settings(kind, **values):
            made.append(kind(**values))
            raise Parsed

        with monkeypatch.context() as patch, suppress(Parsed):
            patch.setattr("a3cli.cli.options.make_settings", make_settings)
            command_line.commands[command].main(list(arguments), standalone_mode=False)
        return made[0]

    return parse


@pytest.fixture
def help_of(a3, monkeypatch):
    """Return the row of every option in a command's `--help`, by the option's name."""
    monkeypatch.setenv("COLUMNS", "200")

    def rows(command):
        return {row.split()[0]: row for row in re.findall(r"^│ +(--.*?) *│$", a3(command, "--help").stdout, re.M)}

    return rows


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_option_is_short(command, command_line):
    for parameter in commands_of(command_line)[command].params:
        assert len(parameter.help) <= LONGEST_HELP, parameter.help
        assert parameter.param_type_name == "argument" or parameter.name == "help" or parameter.rich_help_panel


@pytest.mark.parametrize("command", DEFAULTS)
def test_defaults_in_help_are_those_of_the_settings(command, settings_of, help_of):
    """Passing the displayed defaults explicitly changes nothing, and every default that is a value is displayed."""
    arguments, expected = DEFAULTS[command]
    shown = {
        name: found[1] for name, row in help_of(command).items() if (found := re.search(r"\[default: (.+)\]", row))
    }
    shown.pop("--work", None)
    assert settings_of(command, *arguments) == expected
    assert settings_of(command, *arguments, *(word for pair in shown.items() for word in pair)) == expected
    fields = type(expected).model_fields.items()
    with_default = {option_of((name,)) for name, field in fields if not field.is_required() and field.default}
    texts = {"--dataset", "--samples", "--seq-len", "--seed"}
    assert with_default <= shown.keys() <= {option_of((name,)) for name, _ in fields} | texts


@pytest.mark.parametrize("command", DEFAULTS)
def test_choices_are_shown_in_help(command, help_of):
    rows = help_of(command)
    for name, field in type(DEFAULTS[command][1]).model_fields.items():
        if get_origin(field.annotation) is Literal:
            assert f"[{'|'.join(get_args(field.annotation))}]" in rows[option_of((name,))]


@pytest.mark.parametrize("command", COMMANDS)
def test_panels_come_in_one_order(command, a3):
    titles = re.findall(r"^╭─ (.+?) ─", a3(*command.split(), "--help").stdout, re.M)
    panels = [title for title in titles if title not in ("Arguments", "Options")]
    assert panels == [panel for panel in PANELS if panel in panels]
    assert panels


def test_a_list_of_names_is_one_option_and_other_lists_are_repeated(settings_of):
    found = settings_of("eval", "m", "--tasks", " a, b,", "--fail-if", "kl > 1", "--fail-if", "ppl_increase > 5%")
    assert found.tasks == ("a", "b")
    assert [gate.text for gate in found.fail_if] == ["kl > 1", "ppl_increase > 5%"]
    assert found.texts == ()  # with tasks, the default data set is not measured


def test_each_text_of_an_evaluation_has_its_own_names_and_shares_the_rest(settings_of):
    names = ("--dataset", "a", "--dataset", "b", "--text-field", "x", "--split", "s", "--split", "t")
    first, second = settings_of("eval", "m", *names, "--samples", "3", "--chat").texts
    assert (first.dataset, first.text_field, first.split, first.samples, first.chat) == ("a", "x", "s", 3, True)
    assert second == first.model_copy(update={"dataset": "b", "split": "t"})
