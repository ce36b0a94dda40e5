"""Recipes: one YAML file is one documented run. Its sections are the settings of the stages, under their own names.

    work: ../runs/small/work       the work folder
    out: ../runs/small/model       the export
    calibrate: {model: ../demo/model, text: {dataset: ../demo/text/calibration.txt}}
    solve: {budget: 0.25}
    export: {}
    verify: {}                     runs unless this is `false`
    eval: {against: ../demo/model, text: {dataset: ../demo/text/evaluation.txt}}     optional; or `texts`, a list

`calibrate` may have `texts`, a mixture: `[{dataset: ../a.txt, weight: 0.7}, {dataset: ../b.jsonl, weight: 0.3}]`, which
share what `text` says of blocks.

Paths are relative to the recipe's folder: `work` and `out` always, models, datasets and other files if they begin with
`./` or `../`, since `owner/name` is a Hub id.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from a3cli.errors import A3Error, first_line, kind_of
from a3cli.settings import CalibrateSettings, EvalSettings, ExportSettings, Settings, SolveSettings, VerifySettings
from a3cli.settings.problems import Problem, find_problems
from a3cli.stages.recipe_changes import change

PLACES: dict[str | int, str] = {"work": "the work folder", "out": "the folder of the export"}
PATHS = (
    ("calibrate", "model"),
    ("calibrate", "text", "dataset"),
    ("export", "evaluations"),
    ("eval", "model"),
    ("eval", "against"),
    ("eval", "tasks_path"),
)


class Recipe(Settings):
    """All stages of one run."""

    work: Path
    out: Path
    calibrate: CalibrateSettings
    solve: SolveSettings
    export: ExportSettings = ExportSettings()
    verify: VerifySettings | Literal[False] = VerifySettings()
    evaluation: EvalSettings | None = Field(default=None, alias="eval")


def read_recipe(
    path: Path, *, work: Path | None = None, out: Path | None = None, changes: Iterable[str] = ()
) -> Recipe:
    """Read a recipe; `work` and `out` replace its own and are relative to the current folder.

    `changes`, like `solve.budget=0.3`, count as if the file said so. Raises A3Error naming all problems in one line.
    """
    content = read_yaml(path)
    change(content, Recipe, changes)
    for key, given in (("work", work), ("out", out)):
        if given is not None:
            content[key] = str(given.resolve())
        elif isinstance(content.get(key), str):
            content[key] = str((path.parent / content[key]).resolve())
    for place in PATHS:
        start_at(path.parent, content, place)
    start_texts(path.parent, content.get("calibrate"))
    if isinstance(content.get("eval"), dict):
        content["eval"] = as_evaluation(content["eval"], path.parent, content.get("out"))
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        problems = (each.describe() + hint(each) for each in find_problems(error, Recipe))
        raise A3Error(f"recipe {path}: {'; '.join(problems)}") from None
    if recipe.export.name not in (None, recipe.solve.name):
        raise A3Error(f"recipe {path}: export.name: a recipe exports its own solution; remove this, or set solve.name")
    return recipe


def hint(problem: Problem) -> str:
    """Return what a missing folder is for, and its option."""
    key = problem.keys[0] if len(problem.keys) == 1 else ""
    return f" ({PLACES[key]}; or give --{key})" if problem.missing and key in PLACES else ""


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where is not None else ""
        what = getattr(error, "problem", None) or first_line(error)
        raise A3Error(f"recipe {path} cannot be read as YAML{line}: {what}") from None
    if not isinstance(content, dict):
        raise A3Error(f"recipe {path} holds {kind_of(content)}, not the settings of the stages by name")
    return {str(key): value for key, value in content.items()}


def as_evaluation(section: dict[str, Any], folder: Path, out: Any) -> dict[str, Any]:
    """Return the settings of an evaluation on `text` or several `texts`; the default model is the export."""
    section = {"model": out if isinstance(out, str) else "", **section}  # without a valid `out`, that error is reported
    if "text" in section and "texts" not in section:
        section["texts"] = [section.pop("text")]
    start_texts(folder, section)
    return section


def start_texts(folder: Path, section: Any) -> None:
    """Resolve the path of each of a section's `texts`."""
    texts = section.get("texts") if isinstance(section, dict) else None
    for text in texts if isinstance(texts, list) else []:
        start_at(folder, {"text": text}, ("text", "dataset"))


def start_at(folder: Path, content: dict[str, Any], place: tuple[str, ...]) -> None:
    """Resolve the path at `place`, or each of a list, against `folder` if it is marked as relative."""
    *sections, key = place
    inside: Any = content
    for section in sections:
        inside = inside.get(section) if isinstance(inside, dict) else None
    if not isinstance(inside, dict):
        return
    value = inside.get(key)
    if isinstance(value, list):
        inside[key] = [started_at(folder, each) for each in value]
    elif key in inside:
        inside[key] = started_at(folder, value)


def started_at(folder: Path, value: Any) -> Any:
    relative = isinstance(value, str) and value.startswith(("./", "../"))
    return str((folder / value).resolve()) if relative else value
