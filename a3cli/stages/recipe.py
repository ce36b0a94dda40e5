"""Recipes: one YAML file is one documented run. Its sections are the settings of the stages, under their own names.

    work: ../runs/small/work       the work folder
    out: ../runs/small/model       the export
    calibrate: {model: ../demo/model, text: {dataset: ../demo/text/calibration.txt}}
    solve: {budget: 0.25}          or a list of budgets, each exported to a folder of its own in `out`
    export: {}
    verify: {}                     runs unless this is `false`
    eval: {against: ../demo/model, text: {dataset: ../demo/text/evaluation.txt}}     optional; or `texts`, a list
    report: {html: report.html}    an HTML page of the export with its figures; optional

`calibrate` may have `texts`, a mixture: `[{dataset: ../a.txt, weight: 0.7}, {dataset: ../b.jsonl, weight: 0.3}]`, which
share what `text` says of blocks.

Paths are relative to the recipe's folder: `work`, `out` and the page always, models, datasets and other files if they
begin with `./` or `../`, since `owner/name` is a Hub id.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError

from a3cli.errors import A3Error, first_line, kind_of
from a3cli.settings import (
    CalibrateSettings,
    EvalSettings,
    ExportSettings,
    Settings,
    SolveSettings,
    VerifySettings,
)
from a3cli.settings.budgets import Fraction
from a3cli.settings.names import name_of_budget
from a3cli.settings.problems import Problem, find_problems
from a3cli.settings.report import ReportSettings
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


def once_each(budgets: tuple[float, ...]) -> tuple[float, ...]:
    if len({*budgets}) < len(budgets):
        raise ValueError("must not name a budget twice")
    return budgets


Budgets = Annotated[tuple[Fraction, ...], Field(min_length=1), AfterValidator(once_each)]


class RecipeSolve(SolveSettings):
    """The settings of solve, where a list of budgets makes a solution of each."""

    budget: Fraction | Budgets | None = None  # type: ignore[assignment]


class Recipe(Settings):
    """All stages of one run."""

    work: Path
    out: Path
    calibrate: CalibrateSettings
    solve: RecipeSolve
    export: ExportSettings = ExportSettings()
    verify: VerifySettings | Literal[False] = VerifySettings()
    evaluation: EvalSettings | None = Field(default=None, alias="eval")
    report: ReportSettings | None = None

    @property
    def several(self) -> bool:
        """Return whether the recipe has a list of budgets."""
        return isinstance(self.solve.budget, tuple)

    def each(self) -> "list[Recipe]":
        """Return a recipe for each budget of a list; they share the calibration. Otherwise return this one."""
        budgets: Any = self.solve.budget
        return [self._with_budget(budget) for budget in budgets] if self.several else [self]

    def _with_budget(self, budget: float) -> "Recipe":
        """Return the recipe of one budget, whose solution has a name, and whose export lies in a folder of `out`."""
        own = name_of_budget(budget)
        name = f"{self.solve.name}-{own}" if self.solve.name else own
        out, repository = self.out / name, self.export.push_to_hub
        page = self.report
        if page is not None:
            page = page.model_copy(update={"html": page.html.with_stem(f"{page.html.stem}-{name}")})
        chosen = {**self.solve.model_dump(exclude_unset=True), "budget": budget, "name": name}
        pushed = {"name": None, "push_to_hub": repository and f"{repository}-{own}"}
        return self.model_copy(
            update={
                "out": out,
                "solve": SolveSettings.model_validate(chosen),
                "export": self.export.model_copy(update=pushed),
                "evaluation": self.evaluation and self.evaluation.model_copy(update={"model": str(out)}),
                "report": page,
            }
        )


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
    if isinstance(page := content.get("report"), dict) and isinstance(page.get("html"), str):
        content["report"] = {**page, "html": str((path.parent / page["html"]).resolve())}
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
    if recipe.several and recipe.evaluation and recipe.evaluation.model != str(recipe.out):
        raise A3Error(f"recipe {path}: eval.model: the export of each budget is evaluated; remove this")
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
