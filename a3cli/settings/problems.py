"""Turn pydantic's errors into sentences: which key, its value, and what it must be."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

LONGEST_VALUE = 60  # characters of a value in a message
# By pydantic's type of an error; what is in braces comes from its context.
SENTENCES = {
    **dict.fromkeys(
        ("model_type", "model_attributes_type", "dict_type", "mapping_type"), "must be a mapping of keys to values"
    ),
    **dict.fromkeys(("string_type", "path_type"), "must be text"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type"), "must be a list"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "must be a whole number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    "finite_number": "must be a finite number",
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "string_pattern_mismatch": "must have the form {pattern}",
    "value_error": "{error}",
}
PLAIN = {"None": "null", "True": "true", "False": "false"}  # as JSON and YAML write them


@dataclass(frozen=True)
class Problem:
    """What is wrong with the value at `keys`; a `missing` one has no value to show."""

    keys: tuple[str | int, ...]
    value: str
    sentence: str
    missing: bool = False

    def describe(self, name: str | None = None) -> str:
        """Return the problem as `key value: sentence`; `name` replaces the key's own name, `section.key`."""
        name = name or ".".join(map(str, self.keys)) or "the whole"
        if self.missing:
            return f"{name} {self.sentence}"
        return f"{name}{self.value and f' {self.value}'}: {self.sentence}"


def find_problems(error: ValidationError, kind: type[BaseModel]) -> list[Problem]:
    """Return the problems of values for `kind`, sorted by key; one for all types that a value might have had."""
    found: dict[tuple[str | int, ...], Problem] = {}
    for item in error.errors():
        keys, models = locate(kind, item["loc"], named=item["type"] in ("missing", "extra_forbidden"))
        problem = make_problem(keys, item, models)
        other = found.get(keys)
        if other is None:
            found[keys] = problem
        elif problem.sentence not in other.sentence:
            either = f"{other.sentence} or {problem.sentence.removeprefix('must be ')}"
            found[keys] = Problem(keys, other.value, either)
    sections = {keys[:length] for keys in found for length in range(len(keys))}  # of a value that has problems inside
    return sorted((each for keys, each in found.items() if keys not in sections), key=lambda each: each.describe())


def make_problem(keys: tuple[str | int, ...], item: Any, models: list[type[BaseModel]]) -> Problem:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "missing":
        return Problem(keys, "", "is missing", missing=True)
    if kind == "extra_forbidden":
        return Problem(keys, "", unknown_key(str(keys[-1]), models))
    form = SENTENCES.get(kind)
    sentence = form.format_map({name: plain(value) for name, value in context.items()}) if form else item["msg"]
    return Problem(keys, show(item["input"]), sentence)


def unknown_key(key: str, models: list[type[BaseModel]]) -> str:
    known = [field.alias or name for model in models for name, field in model.model_fields.items()]
    near = get_close_matches(key, known, n=1)
    return f"unknown key; did you mean {near[0]}?" if near else f"unknown key; known are {', '.join(known)}"


def show(value: Any) -> str:
    """Return a single value for a message, shortened; nothing for one that holds others."""
    if not isinstance(value, str | int | float | None):
        return ""
    text = repr(value) if isinstance(value, str) else plain(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def plain(value: Any) -> str:
    """Return a value, or names to choose from, without Python's spelling; 0.0 as 0."""
    text = f"{value:g}" if isinstance(value, float) and value.is_integer() and abs(value) < 1e6 else str(value)
    return PLAIN.get(text, text)


def locate(
    kind: type[BaseModel], location: tuple[str | int, ...], *, named: bool
) -> tuple[tuple[str | int, ...], list[type[BaseModel]]]:
    """Return the keys of an error's location, and the models that have the last one.

    Without the names that pydantic inserts for the types of a union; with `named` the last part is a key in any case.
    """
    keys: list[str | int] = []
    here: list[Any] = [kind]
    models: list[Any] = here
    for number, part in enumerate(location, 1):
        inside = [found for each in here for found in entries(each, part)]
        models = here
        if inside or (named and number == len(location)):
            keys.append(part)
            here = inside
    return tuple(keys), [each for each in models if is_model(each)]


def entries(annotation: Any, part: str | int) -> Iterator[Any]:
    """Yield the types that an entry of a value may have, those of a union one by one."""
    if is_model(annotation):
        for name, field in annotation.model_fields.items():
            if part == (field.alias or name):
                yield from members(field.annotation)
        return
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(part, int) and origin in (list, tuple):
        of_place = arguments[part : part + 1] if origin is tuple and Ellipsis not in arguments else arguments[:1]
        yield from (each for inner in of_place for each in members(inner))
    elif isinstance(part, str) and origin is not None and origin in (dict, Mapping):
        yield from members(arguments[1])


def members(annotation: Any) -> Iterator[Any]:
    """Yield the types of a union; a type without its metadata."""
    if get_origin(annotation) is Annotated:
        yield from members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for each in get_args(annotation):
            yield from members(each)
    else:
        yield annotation


def is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
