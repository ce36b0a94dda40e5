"""Read the output of `a3 eval --json`: figures for a report or a model card."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ConfigDict, Field, ValidationError

from a3cli.errors import A3Error
from a3cli.settings.problems import find_problems
from a3cli.work.files import Json, read_json
from a3cli.work.schema import Part


class Gate(Part):
    model_config = ConfigDict(extra="ignore")

    gate: str
    failed: bool


class Measured(Part):
    """The figures of one data set; with `--against` also those of the source."""

    model_config = ConfigDict(extra="ignore")

    dataset: str
    seq_len: int = Field(ge=1)
    tokens: int = Field(ge=1)
    perplexity: float = Field(gt=0, allow_inf_nan=False)
    source_perplexity: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    kl: float | None = Field(default=None, allow_inf_nan=False)
    top1_agreement: float | None = Field(default=None, ge=0, le=1)
    gates: list[Gate] = Field(default=[])


def as_recorded(measured: Sequence[Measured]) -> list[Json]:
    """Return figures as manifests and cards hold them."""
    return [each.model_dump() for each in measured]


def figures_of(evaluation: Json | None) -> list[Measured]:
    """Return one entry per data set of an evaluation's result; none without a result, or if a figure is not finite."""
    try:
        return [Measured.model_validate(each) for each in (evaluation or {"datasets": []})["datasets"]]
    except ValidationError:
        return []


def read_evaluation(path: Path) -> list[Measured]:
    """Return one entry per data set. Raises A3Error naming a file that has other content."""
    found = read_json(path)
    sets = found.get("datasets")
    try:
        return [Measured.model_validate(each) for each in (sets if isinstance(sets, list) else [found])]
    except ValidationError as error:
        first = find_problems(error, Measured)[0].describe()
        raise A3Error(f"{path} is not the output of a3 eval --json ({first})") from None
