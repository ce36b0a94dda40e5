"""Options of the command line beyond the pydantic fields of settings, and settings as words of a command."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """Show a setting as an option in this panel of `--help`."""

    panel: str


PANELS = ("Text", "What to cut", "How", "Machine", "Output")  # in the order of `--help`
TEXT, CUT, HOW, MACHINE, OUTPUT = map(Option, PANELS)
# Options with another name than their setting's, which `eval` (taken) and `as` (a word of Python) could not have.
OTHER_NAMES = {"evaluations": "--eval", "as_type": "--as"}


@dataclass(frozen=True)
class TextOptions:
    """Show the settings of a nested TextSettings as options.

    `changed` holds a pydantic field for each setting with another default or help text; `omitted` have no option.
    With `parts`, several data sets are a mixture, whose texts are the setting of that name.
    """

    changed: Mapping[str, Any]
    omitted: tuple[str, ...] = ()
    parts: str | None = None


class Each(tuple[str, ...]):
    """Values of an option that is given once for each."""


def option_of(place: tuple[int | str, ...]) -> str:
    """Return the option of a setting, whether alone, in a tuple or in nested settings."""
    name = [part for part in place if isinstance(part, str)][-1]
    return OTHER_NAMES.get(name, "--" + name.replace("_", "-"))


def command_words(command: str, argument: str | None, values: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line with these settings; an argument never looks like an option."""
    if argument and argument.startswith("-"):
        argument = f"./{argument}"
    return [command, *([argument] if argument else []), *option_words(values)]


def option_words(values: Mapping[str, Any]) -> list[str]:
    """Return settings as options, those of nested settings too; None and False are left out."""
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            words += option_words(value)
        elif isinstance(value, Each):
            words += [word for each in value for word in (option_of((name,)), each)]
        elif value is True:
            words.append(option_of((name,)))
        elif value is not None and value is not False:
            words += [option_of((name,)), ",".join(value) if isinstance(value, list | tuple) else str(value)]
    return words
