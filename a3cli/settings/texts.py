"""Settings of a text, and of a mixture of several."""

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from typing_extensions import Self

from a3cli.errors import A3Error
from a3cli.settings.base import Settings
from a3cli.settings.options import TEXT, Each
from a3cli.settings.seq_len import known_seq_len, resolved_seq_len
from a3cli.settings.shares import divide

WEIGHT = re.compile(r"\d+(\.\d*)?|\.\d+", re.ASCII)
SeqLen = Annotated[
    Annotated[int, Field(ge=2)] | None,
    TEXT,
    Field(description="Tokens per block (default: 2048, or the context if shorter)."),
]


class TextSettings(Settings):
    """Which text, and how many blocks of how many tokens are cut from it."""

    dataset: Annotated[str, TEXT, Field(description="Name (README.md), Hub id[:config], or text file or folder.")]
    text_field: Annotated[
        str | None, TEXT, Field(description="Field of a row that holds the text (default: text).")
    ] = None
    split: Annotated[str | None, TEXT, Field(description="Split of a Hub data set.")] = None
    chat: Annotated[bool, TEXT, Field(description="Render each row's messages or conversations as a chat.")] = False
    samples: Annotated[int | None, TEXT, Field(ge=1, description="Number of blocks.")] = 128
    seq_len: SeqLen = None
    seed: Annotated[int, TEXT, Field(ge=0, description="Seed of the blocks' places in the text.")] = 0

    @property
    def block_tokens(self) -> int:
        """Return the tokens per block of resolved settings."""
        return known_seq_len(self.seq_len)

    def for_context(self, context: Any) -> Self:
        """Return resolved settings, for a model of this context."""
        return self.model_copy(update={"seq_len": resolved_seq_len(self.seq_len, context)})


def or_none(text: str | None) -> str | None:
    return text or None


class MixedText(Settings):
    """One text of a mixture; what is null here, the mixture's `text` says."""

    dataset: Annotated[str, Field(description="Name, Hub id[:config], or text file or folder.")]
    weight: Annotated[
        Annotated[float, Field(gt=0, allow_inf_nan=False)] | None,
        Field(description="Its share of the blocks, relative to the other weights."),
    ] = None
    text_field: Annotated[str | None, AfterValidator(or_none), Field(description="Field that holds the text.")] = None
    split: Annotated[str | None, AfterValidator(or_none), Field(description="Split of a Hub data set.")] = None


def weigh_alike(texts: tuple[MixedText, ...]) -> tuple[MixedText, ...]:
    """Return the texts with weights, all 1 if none has one. Raises ValueError if some have one."""
    if problem := unevenly_weighted([(each.dataset, each.weight) for each in texts]):
        raise ValueError(problem)
    return tuple(each if each.weight else each.model_copy(update={"weight": 1.0}) for each in texts)


def unevenly_weighted(entries: Sequence[tuple[str, float | None]]) -> str | None:
    """Return what is wrong if some data sets have a weight and others have none."""
    without = [name for name, weight in entries if weight is None]
    if not without or len(without) == len(entries):
        return None
    return f"some data sets have a weight, but {', '.join(without)} has none; give each one a weight, or none"


def name_mixture(values: Any) -> Any:
    """Name the `text` of a mixture after its `texts`, for messages and manifests; its other settings are shared."""
    texts = values.get("texts") if isinstance(values, dict) else None
    if not texts:
        return values
    shared = values.get("text") or {}
    shared = shared.model_dump() if isinstance(shared, TextSettings) else shared
    if not isinstance(shared, dict):
        return values  # the field's type is reported
    name = joined_name(
        each.get("dataset") if isinstance(each, dict) else getattr(each, "dataset", "") for each in texts
    )
    if shared.get("dataset", name) != name:
        raise ValueError("give either the dataset of text, or texts, which are a mixture")
    return {**values, "text": {**shared, "dataset": name}}


def joined_name(datasets: Iterable[Any]) -> str:
    return " + ".join(map(str, datasets))


def shares_of(weights: Iterable[float | None]) -> list[Fraction]:
    """Return weights as fractions of their sum, exactly as their decimal digits say."""
    exact = [Fraction(repr(weight or 1.0)) for weight in weights]
    return [each / sum(exact) for each in exact]


def part_settings(text: TextSettings, texts: Sequence[MixedText]) -> tuple[TextSettings, ...]:
    """Return the settings of each text of a mixture, with its number of blocks: at least 1, by largest remainder.

    Raises A3Error if there are fewer blocks than texts.
    """
    assert text.samples is not None
    if text.samples < len(texts):
        raise A3Error(
            f"--samples {text.samples} is too small for a mixture of {len(texts)} data sets, each of which gives at "
            f"least one block; use --samples {len(texts)} or more, or fewer data sets"
        )
    blocks = divide(shares_of(each.weight for each in texts), text.samples, least=1)
    return tuple(
        text.model_copy(
            update={
                "dataset": each.dataset,
                "text_field": each.text_field or text.text_field,
                "split": each.split or text.split,
                "samples": count,
            }
        )
        for each, count in zip(texts, blocks, strict=True)
    )


def read_datasets(entries: Sequence[str]) -> list[dict[str, Any]]:
    """Return `dataset` and `weight` of each entry NAME[:WEIGHT]; a single data set has no weight.

    Raises A3Error for a weight of 0, and if some have a weight and others have none.
    """
    if len(entries) == 1:
        return [{"dataset": without_weight(entries[0])}]
    found = [split_weight(entry) for entry in entries]
    if problem := unevenly_weighted(found):
        raise A3Error(f"--dataset: {problem}")
    return [{"dataset": name, "weight": weight} for name, weight in found]


def nest_texts(name: str, parts: str, text: Mapping[str, Any], texts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the setting of one text or, of a mixture, what its texts share and these texts.

    `text` has all that was given, and each of `texts` what it says itself.
    """
    if len(texts) == 1:
        return {name: {**text, **texts[0]}}
    return {name: {part: value for part, value in text.items() if part not in texts[0]}, parts: texts}


def split_weight(entry: str) -> tuple[str, float | None]:
    name, _, number = entry.rpartition(":")
    if not name or not WEIGHT.fullmatch(number):
        return entry, None
    if not float(number):
        raise A3Error(f"--dataset {entry}: the weight is 0; give a weight above 0, or leave the data set out")
    return name, float(number)


def without_weight(entry: str) -> str:
    """Return a single data set without its weight; a number after `owner/name` is a configuration of the Hub."""
    name, weight = split_weight(entry)
    on_hub = "/" in name and ":" not in name and not Path(name).exists()
    return entry if weight is None or on_hub or Path(entry).exists() else name


def mixture_options(texts: Sequence[MixedText]) -> dict[str, Each]:
    """Return the values of repeated options that give these texts."""
    if not texts:
        return {}
    options = {"dataset": Each(f"{each.dataset}:{Decimal(repr(each.weight or 1.0)):f}" for each in texts)}
    for name in ("text_field", "split"):
        values = [getattr(each, name) for each in texts]
        if any(values):
            options[name] = Each(value or "" for value in values)
    return options
