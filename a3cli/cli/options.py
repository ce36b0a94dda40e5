"""Make the options of the commands: from the fields of a settings class, and those that are not settings."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from a3cli.errors import A3Error
from a3cli.settings import DEFAULT_CALIBRATION, DEFAULT_DATASET, ExportSettings, Settings, TextSettings, make_settings
from a3cli.settings.options import HOW, MACHINE, OUTPUT, PANELS, Option, TextOptions, option_of
from a3cli.settings.texts import nest_texts, read_datasets

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", Option, TextOptions)
# The parser's errors: typer has its own copy of click in newer versions, and gives this class no name.
UsageError: Any = typer.BadParameter.__base__

# How to use several data sets with commands that take one.
ONE_DATASET = {
    "pareto": "a3 pareto measures on one data set; run it once for each",
}
EACH = ("text_field", "split")  # settings of a text that may differ between data sets


class OnceCommand(TyperCommand):
    """A command that refuses a second value for an option that takes one; the parser would ignore the first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        if ctx.resilient_parsing:  # shell completion: nothing is refused
            return super().parse_args(ctx, args)
        for option in dict.fromkeys(given):
            once = option.param_type_name == "option" and not (option.multiple or getattr(option, "is_flag", False))
            if once and (count := given.count(option)) > 1:
                hint = ONE_DATASET.get(str(ctx.info_name), "") if option.name == "dataset" else ""
                raise UsageError(f"{option.opts[0]} was given {count} times; {hint or 'give it once'}", ctx=ctx)
        return super().parse_args(ctx, args)


class OnceTyper(typer.Typer):
    """Commands that are each an `OnceCommand`."""

    def command(self, *arguments: Any, **options: Any) -> Callable[[F], F]:
        return super().command(*arguments, **{"cls": OnceCommand, **options})


def option(*names: str, panel: Option, **details: Any) -> Any:
    """Declare an option that is not a setting."""
    return typer.Option(*names, rich_help_panel=panel.panel, **details)


WorkOption = Annotated[
    Path, option("--work", panel=OUTPUT, envvar="A3_WORK", help="Work folder, shared by the stages.")
]
SourceOption = Annotated[
    str | None, option("--source", panel=HOW, help="Where the calibrated source is now, if it was moved.")
]
Overwrite = Annotated[bool, option("--overwrite", panel=OUTPUT, help="Replace the result of other settings.")]
AsJson = Annotated[bool, option("--json", panel=OUTPUT, help="Print the full result as JSON on stdout.")]
Quiet = Annotated[bool, option("--quiet", panel=OUTPUT, help="Print results, warnings and errors only.")]
Name = Annotated[str | None, option("--name", panel=OUTPUT, help="Name of the solution to show.")]
Junit = Annotated[Path | None, option("--junit", panel=OUTPUT, help="Write the outcome to this JUnit file.")]
Output = Annotated[Path | None, option("--output", panel=OUTPUT, help="Write the full result as JSON to this file.")]
MaxMinutes = Annotated[
    float | None,
    option("--max-minutes", panel=MACHINE, min=0, help="Stop after this many minutes, between steps; exit code 3."),
]
Evaluations = Annotated[
    list[Path] | None,
    option("--eval", panel=OUTPUT, help=ExportSettings.model_fields["evaluations"].description),
]


def check_output(option: str, path: Path | None, *, suffixes: tuple[str, ...] = ()) -> None:
    """Check that the file of an option can be written, before any work starts. Raises A3Error."""
    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        raise A3Error(f"{option} {path}: the name must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if path.is_dir():
        raise A3Error(f"{option} {path}: it is a folder")
    if not path.resolve().parent.is_dir():
        raise A3Error(f"{option} {path}: there is no folder {path.parent}")


def with_settings(kind: type[Settings]) -> Callable[[F], F]:
    """Make every setting of a class an option of the command, which gets them in one argument, `settings`."""

    def decorate(command: F) -> F:
        own = dict(inspect.signature(command).parameters)
        del own["settings"]

        @wraps(command)
        def parsed(**values: Any) -> None:
            rest = {name: values.pop(name) for name in own}
            command(settings=make_settings(kind, **read_settings(kind, values)), **rest)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [*parameters_of(kind), *(parameter.replace(kind=keyword) for parameter in own.values())]
        parameters.sort(key=panel_place)
        parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        parsed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return parsed  # type: ignore[return-value]

    return decorate


def panel_place(parameter: inspect.Parameter) -> int:
    """Return the place of a parameter's panel in `--help`; arguments have none and come first."""
    panel = parameter.annotation.__metadata__[0].rich_help_panel
    return PANELS.index(panel) if panel else -1


def parameters_of(kind: type[Settings]) -> Iterator[inspect.Parameter]:
    """Yield a parameter of the command line for each setting, with nested text settings in their place."""
    for name, field in settings_shown(kind):
        if nested := marker(field, TextOptions):
            yield from text_parameters(nested, several=form_of(field) == "many" or nested.parts is not None)
        else:
            yield make_parameter(name, field, field, repeatable=form_of(field) == "many")


def settings_shown(kind: type[Settings]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the settings but for the texts of a mixture, for which the options of a text are repeated."""
    mixtures = [nested.parts for field in kind.model_fields.values() if (nested := marker(field, TextOptions))]
    yield from ((name, field) for name, field in kind.model_fields.items() if name not in mixtures)


def text_parameters(nested: TextOptions, *, several: bool) -> Iterator[inspect.Parameter]:
    """Yield the parameters of a nested TextSettings; of several texts, each has names of its own and shares numbers."""
    for name in text_names(nested):
        field = TextSettings.model_fields[name]
        repeatable = several and value_type(field) is str
        yield make_parameter(name, field, nested.changed.get(name, field), repeatable=repeatable)


def make_parameter(name: str, field: FieldInfo, shown: FieldInfo, *, repeatable: bool) -> inspect.Parameter:
    """Return a setting as a parameter: `field` has its type, `shown` its default and help text."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    description = shown.description or field.description
    shown_as: Any = {"help": description}
    if names := choices(field):
        shown_as |= {"metavar": f"[{'|'.join(names)}]", "autocompletion": lambda: list(names)}
    place = marker(field, Option)
    if place is None:
        return inspect.Parameter(name, keyword, annotation=Annotated[value_type(field), typer.Argument(**shown_as)])
    declared = typer.Option(option_of((name,)), rich_help_panel=place.panel, **shown_as)
    kind = list[value_type(field)] if repeatable else value_type(field)  # type: ignore[misc]
    default = None if repeatable else default_text(shown)
    return inspect.Parameter(name, keyword, annotation=Annotated[kind | None, declared], default=default)


def default_text(field: FieldInfo) -> Any:
    """Return a default as it is typed: names of a comma list in one string."""
    return (",".join(field.default) or None) if isinstance(field.default, tuple) else field.default


def marker(field: FieldInfo, kind: type[M]) -> M | None:
    return next((each for each in field.metadata if isinstance(each, kind)), None)


def is_parsed(metadata: Any) -> bool:
    """Return whether a setting has a parser of its own for text."""
    return any(isinstance(each, BeforeValidator) for each in metadata)


def form_of(field: FieldInfo) -> Literal["one", "names", "many"]:
    """Return how a setting is typed: `one` value, `names` with commas, or `many` times the option."""
    annotation = without_none(field.annotation)
    if get_origin(annotation) is not tuple or is_parsed(field.metadata):
        return "one"
    item = get_args(annotation)[0]
    return "names" if item is str or get_origin(item) is Literal else "many"


def item_type(annotation: Any) -> Any:
    """Return the type in which the parser takes one value: text if it is one of some names or has its own parser."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return str
    if origin is Annotated:
        return str if is_parsed(arguments) else item_type(arguments[0])
    if origin is tuple:
        return item_type(arguments[0])
    if origin in (Union, UnionType):
        return item_type(without_none(annotation))
    return annotation


def without_none(annotation: Any) -> Any:
    """Return the type of an optional value; any other type itself."""
    if get_origin(annotation) not in (Union, UnionType):
        return annotation
    return next(each for each in get_args(annotation) if each is not NoneType)


def value_type(field: FieldInfo) -> Any:
    return str if is_parsed(field.metadata) else item_type(field.annotation)


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the names that a setting may have; none if it has no such list."""
    annotation: Any = without_none(field.annotation)
    if form_of(field) == "names":
        annotation = get_args(annotation)[0]
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def read_settings(kind: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings from the command line's values: lists as tuples, text settings nested."""
    read = {name: read_setting(name, field, values) for name, field in settings_shown(kind)}
    for name, field in kind.model_fields.items():
        if (nested := marker(field, TextOptions)) and nested.parts:
            read |= read_mixture(name, nested.parts, read[name])
    return read


def read_mixture(name: str, parts: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """Return a text, or what the texts of a mixture share and these texts."""
    found = read_datasets(text["dataset"] or DEFAULT_CALIBRATION)
    names = [each["dataset"] for each in found]
    fields, splits = (for_each(option_of((part,)), text[part], names) for part in EACH)
    texts = [
        {**each, "text_field": field, "split": split} for each, field, split in zip(found, fields, splits, strict=True)
    ]
    return nest_texts(name, parts, text, texts)


def read_setting(name: str, field: FieldInfo, values: Mapping[str, Any]) -> Any:
    form = form_of(field)
    if nested := marker(field, TextOptions):
        text = {part: values[part] for part in text_names(nested)}
        if nested.parts:
            return text
        if form == "many":
            return texts_of(text, values)
        return None if text["dataset"] is None else text
    if form == "names":
        return field.default if values[name] is None else comma_list(values[name])
    return tuple(values[name] or ()) if form == "many" else values[name]


def text_names(nested: TextOptions) -> list[str]:
    return [name for name in TextSettings.model_fields if name not in nested.omitted]


def comma_list(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def texts_of(text: Mapping[str, Any], values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of each data set; without one it is the default, unless tasks are measured instead."""
    datasets = text["dataset"] or ([] if comma_list(values["tasks"]) else [DEFAULT_DATASET])
    fields, splits = (for_each(option_of((part,)), text[part], datasets) for part in EACH)
    return [
        {**text, "dataset": dataset, "text_field": field, "split": split}
        for dataset, field, split in zip(datasets, fields, splits, strict=True)
    ]


def for_each(option: str, values: list[str] | None, datasets: list[str]) -> list[str] | list[None]:
    """Return a value for each data set. Raises A3Error unless there is one for all, or as many as data sets."""
    if not values:
        return [None] * len(datasets)
    if len(values) == 1:
        return values * len(datasets)
    if len(values) != len(datasets):
        raise A3Error(
            f"{option} was given {len(values)} times for {len(datasets)} data sets; give it once, or once for each"
        )
    return values
