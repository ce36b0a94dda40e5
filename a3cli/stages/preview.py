"""Tell what `a3 run` would do: the settings of every stage, and how far each stage is. Writes and downloads nothing."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from a3cli.errors import A3Error
from a3cli.models.checkpoint import resolve_model
from a3cli.report.manifest import MANIFEST, Manifest, read_export_manifest
from a3cli.settings import CalibrateSettings, Settings
from a3cli.stages.allowed import calibrated_family, known_family, resolve_settings
from a3cli.stages.calibrate import for_source
from a3cli.stages.calibration_folder import comparable, describe_request, known_text, recorded_calibration
from a3cli.stages.evaluate import for_models
from a3cli.stages.publish import kept_push
from a3cli.stages.recipe import Recipe
from a3cli.stages.run import check_outputs, is_asked_for, is_reported, kept_evaluation, kept_verification
from a3cli.stages.solve import describe_request as describe_solution
from a3cli.work.files import Json
from a3cli.work.folder import Work
from a3cli.work.machine import choose_machine
from a3cli.work.manifests import CalibrationManifest, SolutionManifest
from a3cli.work.sealed import differences, read_manifest

AGAIN = "use --overwrite"


@dataclass(frozen=True)
class State:
    """How far a stage is, and what `a3 run` does about it. With `other settings`, it refuses without --overwrite."""

    state: Literal["finished", "unfinished", "not started", "other settings"]
    detail: str = ""

    def describe(self) -> str:
        return f"{self.state}; {self.detail}" if self.detail else self.state


TO_DO = State("not started")


@dataclass(frozen=True)
class Preview:
    """A recipe, and for each of its solutions its own recipe with the state of each stage."""

    recipe: Recipe
    each: list[tuple[Recipe, dict[str, State]]]

    def plain(self) -> Json:
        """Return the recipe as JSON has it, with `state` and `detail` of each stage; several solutions in a list."""
        content = plain_recipe(self.recipe)
        folders = {name: content[name] for name in ("work", "out")}
        if not self.recipe.several:
            return {**folders, "stages": described(*self.each[0])}
        shared, listed = {}, []
        for recipe, states in self.each:
            stages = described(recipe, states)
            shared = {"calibrate": stages.pop("calibrate")}
            listed.append({"name": recipe.solve.name, "out": str(recipe.out), "stages": stages})
        return {**folders, "stages": shared, "solutions": listed}

    def sections(self) -> Iterator[tuple[str, list[str], Json]]:
        """Yield each stage's name, how far it is for each solution, and its settings in the recipe."""
        content = plain_recipe(self.recipe)
        for stage in self.each[0][1]:
            several = self.recipe.several and stage != "calibrate"
            found = [(f"{stage} {recipe.solve.name}", states[stage]) for recipe, states in self.each]
            shown = found if several else [(stage, found[0][1])]
            yield stage, [": ".join((name, state.describe())) for name, state in shown], content[stage]


def described(recipe: Recipe, states: Mapping[str, State]) -> Json:
    content = plain_recipe(recipe)
    return {
        name: {"state": state.state, "detail": state.detail, "settings": content[name]}
        for name, state in states.items()
    }


def preview(recipe: Recipe, *, overwrite: bool) -> Preview:
    """Return the state of each stage that the recipe has, of each solution. Files are not hashed again.

    Raises A3Error for settings that contradict each other, and for manifests that are damaged.
    """
    check_outputs(recipe)
    every = recipe.each()
    for each in every:
        resolve_settings(each.solve, known_family(recipe.calibrate.model, recipe.calibrate.revision))
    return Preview(recipe, [(each, states_of(each, overwrite=overwrite)) for each in every])


def states_of(recipe: Recipe, *, overwrite: bool) -> dict[str, State]:
    """Return the state of each stage of one solution, in their order."""
    asked = {"calibrate", "solve", "export", *(["verify"] if recipe.verify else [])}
    if recipe.evaluation is not None:
        asked.add("eval")
    if recipe.report is not None:
        asked.add("report")
    found = {} if overwrite else dict(find_states(recipe, Work(recipe.work, recipe.solve.name)))
    return {name: found.get(name, TO_DO) for name in plain_recipe(recipe) if name in asked}


def find_states(recipe: Recipe, work: Work) -> Iterator[tuple[str, State]]:
    """Yield the states of the stages in order, up to the first that is not finished: all later ones depend on it."""
    state = state_of_calibration(recipe.calibrate, work)
    yield "calibrate", state
    if state.state != "finished":
        return
    state, solution = state_of_solution(recipe, work)
    yield "solve", state
    if state.state != "finished" or solution is None:
        return
    state, manifest = state_of_export(recipe, solution)
    yield "export", with_upload(state, manifest, recipe, work)
    if state.state != "finished" or manifest is None:
        return
    if recipe.verify and kept_verification(recipe.verify, work, manifest):
        yield "verify", State("finished")
    asked = recipe.evaluation
    evaluation = kept_evaluation(for_models(asked), work, manifest) if asked else None
    if evaluation:
        yield "eval", State("finished")
    if recipe.report and (evaluation or not asked) and is_reported(recipe.report, recipe, evaluation):
        yield "report", State("finished")


def state_of_calibration(settings: CalibrateSettings, work: Work) -> State:
    path = recorded_calibration(work)
    if path is None:
        return TO_DO
    found = read_manifest(path, AGAIN)
    whole = path == work.calibration_manifest
    state = State("finished") if whole else State("unfinished", f"{max(0, len(found['finished']) - 1)} layers are done")
    wanted = wanted_calibration(settings, work)
    if wanted is None:
        return State(state.state, "not compared with the source, which is not on this machine")
    recorded = comparable(found["request"])
    return state if recorded == wanted else State("other settings", differs(recorded, wanted, "text"))


def wanted_calibration(settings: CalibrateSettings, work: Work) -> Json | None:
    """Return what a calibration with these settings would record; None if its source is not on this machine."""
    try:
        source = resolve_model(
            settings.model, settings.revision, follow_symlinks=settings.follow_symlinks, cached_only=True
        )
    except A3Error:
        if Path(settings.model).is_dir():
            raise
        return None
    machine = choose_machine(settings.device, settings.dtype, source.dtype, devices=settings.devices)
    return comparable(describe_request(for_source(settings, source), source, machine, known_text(work)))


def state_of_solution(recipe: Recipe, work: Work) -> tuple[State, SolutionManifest | None]:
    if not work.solution_manifest.is_file():
        begun = work.solution.with_name(f".{work.solution.name}.a3-progress.json").is_file()
        return (State("unfinished") if begun else TO_DO), None
    solution = SolutionManifest.read(work.solution_manifest, AGAIN)
    calibration = CalibrationManifest.read(work.calibration_manifest, AGAIN)
    settings = resolve_settings(recipe.solve, calibrated_family(work))
    recorded, wanted = solution.request.plain(), describe_solution(settings, calibration)
    if recorded != wanted:
        return State("other settings", differs(recorded, wanted, "settings")), None
    return State("finished"), solution


def state_of_export(recipe: Recipe, solution: SolutionManifest) -> tuple[State, Manifest | None]:
    found = None
    with suppress(A3Error):  # damaged, and so written again
        found = read_export_manifest(recipe.out / MANIFEST) if (recipe.out / MANIFEST).is_file() else None
    if found is not None and is_asked_for(found, recipe.export, solution):
        return State("finished"), found
    if recipe.out.is_dir() and any(recipe.out.iterdir()) and not recipe.export.overwrite:
        return State(
            "other settings", f"{recipe.out} holds something else; to replace an export, use --overwrite"
        ), None
    begun = recipe.out.with_name(f".{recipe.out.name}.a3-progress.json").is_file()
    return (State("unfinished") if begun else TO_DO), None


def with_upload(state: State, manifest: Manifest | None, recipe: Recipe, work: Work) -> State:
    """Return the state of an export with what is known of its upload, if the recipe asks for one."""
    repository = recipe.export.push_to_hub
    if repository is None or manifest is None:
        return state
    found = kept_push(manifest, recipe.export, work)
    return State(state.state, f"uploaded to {found.url}" if found else f"the upload to {repository} is left")


def differs(recorded: Json, wanted: Json, nested: str) -> str:
    return f"differs in {differences(recorded, wanted, nested)}; use --overwrite or another --work"


def plain_recipe(recipe: Recipe) -> Json:
    """Return a recipe with every setting, in the order of the stages, as its file could have it."""
    sections = {
        "work": str(recipe.work),
        "out": str(recipe.out),
        "calibrate": plain_settings(recipe.calibrate),
        "solve": plain_settings(recipe.solve),
        "export": plain_settings(recipe.export),
        "verify": plain_settings(recipe.verify) if recipe.verify else False,
    }
    optional = {"eval": recipe.evaluation, "report": recipe.report}
    return sections | {name: plain_settings(found) for name, found in optional.items() if found is not None}


def plain_settings(settings: Settings) -> Json:
    """Return settings as a recipe has them, with gates as text."""
    content: Json = settings.model_dump(mode="json")
    if isinstance(settings, CalibrateSettings) and settings.texts:
        del content["text"]["dataset"]  # the name of the mixture
    elif isinstance(settings, CalibrateSettings):
        del content["texts"]
    if "fail_if" in content:
        content["fail_if"] = [gate["text"] for gate in content["fail_if"]]
    return content
