"""Changes to a recipe from the command line, `--set solve.budget=0.3`: a dotted path into it, and a value in YAML."""

from collections.abc import Iterable
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml

from a3cli.errors import A3Error, first_line
from a3cli.settings import EvalSettings, Settings, TextSettings
from a3cli.settings.keywords import suggestion

# Names that recipes have in addition to the fields: `text` of an evaluation stands for one of its `texts`.
ALSO: dict[type[Settings], dict[str, Any]] = {EvalSettings: {"text": TextSettings}}


def change(content: dict[str, Any], kind: type[Settings], changes: Iterable[str]) -> None:
    """Put each `PATH=VALUE` into a recipe. Raises A3Error for an unknown path, with the nearest known name."""
    for text in changes:
        path, sign, value = text.partition("=")
        if not sign:
            raise A3Error(f"--set {text}: not of the form PATH=VALUE, like solve.budget=0.3")
        parts = path.strip().split(".")
        check_path(kind, parts)
        put(content, parts, read_value(text, value))


def check_path(kind: type[Settings], parts: list[str]) -> None:
    """Raise A3Error unless a recipe of this kind has the setting that `parts` lead to."""
    path = ".".join(parts)
    inside: type[Settings] | None = kind
    for place, name in enumerate(parts):
        above = ".".join(parts[:place])
        if inside is None:
            raise A3Error(f"--set {path}: {above} is one value, or a list, without settings of its own")
        known = names_in(inside)
        if name not in known:
            hint = suggestion(name, known) or f"; it has {', '.join(known)}"
            raise A3Error(f"--set {path}: {above or 'a recipe'} has no {name!r}{hint}")
        inside = section_of(known[name])


def names_in(kind: type[Settings]) -> dict[str, Any]:
    """Return the names that a section of a recipe may have, and the type of each."""
    fields = {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
    return fields | ALSO.get(kind, {})


def section_of(annotation: Any) -> type[Settings] | None:
    """Return the settings that a value of this type holds by name, or None."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    if get_origin(annotation) in (Union, UnionType):
        return next(filter(None, map(section_of, get_args(annotation))), None)
    return None


def read_value(text: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        what = getattr(error, "problem", None) or first_line(error)
        raise A3Error(f"--set {text}: the value cannot be read as YAML: {what}") from None


def put(content: dict[str, Any], parts: list[str], value: Any) -> None:
    """Set a value in a recipe, in new sections if need be. Raises A3Error if a section has another value."""
    inside = content
    for place, section in enumerate(parts[:-1], 1):
        if inside.get(section) is None:
            inside[section] = {}
        inside = inside[section]
        if not isinstance(inside, dict):
            above = ".".join(parts[:place])
            raise A3Error(f"--set {'.'.join(parts)}: the recipe has {above}: {inside}, not settings by name")
    inside[parts[-1]] = value
