"""Settings from keyword arguments, as the Python interface takes them: those of a text stand beside the others."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from a3cli.errors import A3Error
from a3cli.settings import DEFAULT_CALIBRATION, DEFAULT_DATASET, Settings, TextSettings, make_settings
from a3cli.settings.options import TextOptions
from a3cli.settings.texts import nest_texts, read_datasets

S = TypeVar("S", bound=Settings)


def settings_from(kind: type[S], function: str, values: Mapping[str, Any]) -> S:
    """Return settings from keywords: the fields of `kind`, and those of its text (`dataset`, `seq_len`, …).

    Raises A3Error naming each unknown keyword with the nearest known one, or all bad values.
    """
    refuse_unknown(function, values, keywords_of(kind))
    nested = text_field(kind)
    if nested is None:
        return make_settings(kind, **values)
    name, options = nested
    text = {key: value for key, value in values.items() if key in text_keywords(options)}
    rest = {key: value for key, value in values.items() if key not in text}
    mixed = options.parts in rest
    clashing = sorted(text) if name in rest else ["dataset"] if mixed and "dataset" in text else []
    if clashing:
        several = options.parts if mixed and name not in rest else name
        raise A3Error(f"{function}(): give either {several} or {', '.join(clashing)}, which describe a text as well")
    if mixed:
        rest.setdefault(name, text)
    elif options.parts and name not in rest:
        rest |= nest_mixture(name, options.parts, text)
    elif name not in rest:
        rest[name] = nest_text(name, options, text, tasks=bool(rest.get("tasks")))
    return make_settings(kind, **rest)


def keywords_of(kind: type[Settings]) -> set[str]:
    """Return the keywords from which `settings_from` makes such settings."""
    nested = text_field(kind)
    return {*kind.model_fields, *(text_keywords(nested[1]) if nested else ())}


def text_field(kind: type[Settings]) -> tuple[str, TextOptions] | None:
    """Return the name of the field that holds the text or texts, and how their settings are shown."""
    for name, field in kind.model_fields.items():
        for marker in field.metadata:
            if isinstance(marker, TextOptions):
                return name, marker
    return None


def text_keywords(options: TextOptions) -> set[str]:
    return TextSettings.model_fields.keys() - set(options.omitted)


def nest_text(name: str, options: TextOptions, text: Mapping[str, Any], *, tasks: bool) -> Any:
    """Return the value of the field `name`: a text, or for `texts` one for each data set, none beside `tasks`."""
    defaults = {key: field.default for key, field in options.changed.items() if not field.is_required()}
    one = {**defaults, **text}
    if name != "texts":
        return one
    datasets = one.pop("dataset", () if tasks else DEFAULT_DATASET)
    datasets = [datasets] if isinstance(datasets, str) or not isinstance(datasets, Iterable) else datasets
    return [{**one, "dataset": dataset} for dataset in datasets]


def nest_mixture(name: str, parts: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """Return a text, or of a mixture of several data sets NAME[:WEIGHT] what its texts share, and these texts."""
    datasets = text.get("dataset", DEFAULT_CALIBRATION)
    if isinstance(datasets, str) or not isinstance(datasets, Iterable):
        return {name: {**text, "dataset": datasets}}
    return nest_texts(name, parts, text, read_datasets([str(each) for each in datasets]))


def refuse_unknown(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise A3Error if a keyword is not known, with the nearest that is."""
    unknown = [f"{name!r}{suggestion(name, known)}" for name in sorted(set(given) - set(known))]
    if unknown:
        raise A3Error(f"{function}() has no setting {', '.join(unknown)}; help(a3cli.{function}) says where they are")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean …?)` for a mistyped name, or nothing if none is near."""
    near = get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
