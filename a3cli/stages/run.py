"""Run a recipe's stages: calibrate, solve, export, verify unless disabled, eval and report if it has these sections.

Each stage finds out from its files whether it is done, so a rerun resumes, and a finished recipe does nothing.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from a3cli.errors import A3Error
from a3cli.report.inspection import describe
from a3cli.report.manifest import MANIFEST, Manifest, read_export_manifest
from a3cli.report.measured import figures_of
from a3cli.report.page import Report, is_page, write_report
from a3cli.settings import CalibrateSettings, EvalSettings, ExportSettings, VerifySettings
from a3cli.settings.options import command_words
from a3cli.settings.report import ReportSettings
from a3cli.settings.texts import mixture_options
from a3cli.stages.allowed import known_family, resolve_settings
from a3cli.stages.as_llama import check_as_type
from a3cli.stages.calibrate import calibrate
from a3cli.stages.evaluate import evaluate, for_models
from a3cli.stages.export import export
from a3cli.stages.publish import Pushed, Repository, keep_push, kept_push, open_repository, push
from a3cli.stages.recipe import Recipe
from a3cli.stages.rounding import warnings_of
from a3cli.stages.run_results import RunResults, SolutionResults
from a3cli.stages.solve import solve
from a3cli.stages.verify import verify
from a3cli.text.identity import as_compared, describe_text, files_now
from a3cli.text.sources import check_texts
from a3cli.work.files import Json, check_hashes, hash_json, making
from a3cli.work.folder import Work
from a3cli.work.interrupt import Stop
from a3cli.work.manifests import CalibrationManifest, SolutionManifest
from a3cli.work.processes import launch, without_output
from a3cli.work.progress import Progress
from a3cli.work.sealed import read_if_request_matches, read_manifest, versions, write_manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Running:
    """How stages run: `overwrite` restarts all of them, `quiet` also applies to processes."""

    overwrite: bool
    progress: Callable[[], AbstractContextManager[Progress]]
    stop: Stop
    quiet: bool

    @contextmanager
    def stage(self, name: str, solution: str | None = None) -> Iterator[Progress]:
        """Log a stage's name, with that of the solution if there are several, and yield its progress."""
        log.info("%s", f"{name} {solution}" if solution else name)
        with self.progress() as report:
            yield report


def run_recipe(
    recipe: Recipe,
    *,
    overwrite: bool,
    progress: Callable[[], AbstractContextManager[Progress]],
    stop: Stop,
    quiet: bool = False,
) -> RunResults:
    """Run all stages and return their results; `overwrite` restarts all, `quiet` also applies to processes.

    With several budgets there is one calibration, and the other stages run for each of them. An export that fails a
    check of `verify` is not evaluated, and one that fails that or a gate is not uploaded.

    Raises A3Error if a stage does, and before the first one for settings that contradict each other; raises Interrupted
    at the end of the step in which `stop` was set off.
    """
    running, every = Running(overwrite, progress, stop, quiet), recipe.each()
    check_outputs(recipe)
    check_each(every)
    before = [when_written(each) for each in every]
    repositories = [None if pushed_before(each, running) else open_repository(each.export) for each in every]
    with running.stage("calibrate") as report:
        calibration = calibrated(
            recipe.calibrate, Work(recipe.work), overwrite=overwrite, progress=report, stop=stop, quiet=quiet
        )
    found = [
        run_solution(each, running, repository, label=each.solve.name if recipe.several else None)
        for each, repository in zip(every, repositories, strict=True)
    ]
    unchanged = before == [when_written(each) for each in every]
    return RunResults(calibration, found, recipe.several, finished_before=unchanged)


def check_each(every: list[Recipe]) -> None:
    """Check the solution's settings of each recipe. Raises A3Error if they contradict each other or the model's family.

    The family is known if the model's config.json is on this machine.
    """
    source = every[0].calibrate
    family = known_family(source.model, source.revision)
    for each in every:
        resolve_settings(each.solve, family)
        check_as_type(each.export, family, each.solve.shape)


def check_outputs(recipe: Recipe) -> None:
    """Raise A3Error if the page is a folder, or if the exports of several budgets would lie in that of another."""
    for html in (each.report.html for each in recipe.each() if each.report):
        if html.is_dir():
            raise A3Error(f"report.html {html}: it is a folder")
    if recipe.several and (recipe.out / MANIFEST).is_file():
        raise A3Error(
            f"{recipe.out} is an export, and those of several budgets are written to folders in it; choose another out"
        )


def run_solution(
    recipe: Recipe, running: Running, repository: Repository | None, *, label: str | None
) -> SolutionResults:
    """Run the stages after the calibration for one solution; `label` is its name in log lines."""
    work, overwrite = Work(recipe.work, recipe.solve.name), running.overwrite
    with running.stage("solve", label) as report:
        solution = solve(recipe.solve, work, overwrite=overwrite, progress=report, stop=running.stop)
    with running.stage("export", label) as report:
        manifest = exported(recipe, work, solution, overwrite=overwrite, progress=report, stop=running.stop)
    memory = recipe.solve.memory
    warnings = warnings_of(solution, work, memory)
    results = SolutionResults(work.name, recipe.out, solution, manifest, warnings, memory)
    if recipe.verify:
        with running.stage("verify", label) as report:
            results.verification = verified(recipe.verify, recipe, work, manifest, overwrite=overwrite, progress=report)
        if not results.passed:
            return results
    if recipe.evaluation is not None:
        with running.stage("eval", label) as report:
            results.evaluation = evaluated(recipe.evaluation, work, manifest, overwrite=overwrite, progress=report)
    if recipe.report is not None:
        with running.stage("report", label):
            results.report = reported(recipe.report, recipe, results.evaluation)
    if recipe.export.push_to_hub and results.passed:
        with running.stage("upload", label) as report:
            results.pushed = pushed(recipe, work, manifest, repository, overwrite=overwrite, progress=report)
    return results


def reported(settings: ReportSettings, recipe: Recipe, evaluation: Json | None) -> Report:
    """Write the page of the export with the figures of its evaluation, unless it is written already."""
    with making(settings.html.parent):
        return write_report(describe(recipe.out), figures_of(evaluation), settings.html, settings.memory)


def is_reported(settings: ReportSettings, recipe: Recipe, evaluation: Json | None) -> bool:
    """Return whether the page is written, with these figures."""
    return is_page(settings.html, describe(recipe.out), figures_of(evaluation), settings.memory)


def pushed_before(recipe: Recipe, running: Running) -> bool:
    """Return whether the recipe's export was uploaded, as far as can be told before it is checked."""
    with suppress(A3Error):  # missing or damaged
        manifest = read_export_manifest(recipe.out / MANIFEST)
        work = Work(recipe.work, recipe.solve.name)
        return not running.overwrite and kept_push(manifest, recipe.export, work) is not None
    return False


def pushed(
    recipe: Recipe,
    work: Work,
    manifest: Manifest,
    repository: Repository | None,
    *,
    overwrite: bool,
    progress: Progress,
) -> Pushed:
    """Upload the export unless that was done; return where it is."""
    if not overwrite and (found := kept_push(manifest, recipe.export, work)):
        return found
    repository = repository or open_repository(recipe.export)
    assert repository is not None
    settings = recipe.export.model_copy(update={"name": recipe.solve.name})
    done = push(recipe.out, manifest, repository, settings, work, progress)
    keep_push(done, manifest, recipe.export, work)
    return done


def calibrated(
    settings: CalibrateSettings, work: Work, *, overwrite: bool, progress: Progress, stop: Stop, quiet: bool
) -> CalibrationManifest:
    """Calibrate, in as many processes as the settings say; return the manifest."""
    if settings.num_processes > 1 and (overwrite or not work.calibration_manifest.exists()):
        calibrate_in_processes(settings, work, overwrite=overwrite, stop=stop, quiet=quiet)
        overwrite = False
    return calibrate(settings, work, overwrite=overwrite, progress=progress, stop=stop)


def when_written(recipe: Recipe) -> dict[Path, int]:
    """Return when each stage's last file was written, in nanoseconds; a stage that does anything writes it."""
    work = Work(recipe.work, recipe.solve.name)
    stages = [work.calibration_manifest, work.solution_manifest, recipe.out / MANIFEST]
    results = [work.verification, work.evaluation, work.publication, *([recipe.report.html] if recipe.report else [])]
    return {file: file.stat().st_mtime_ns for file in (*stages, *results) if file.is_file()}


def calibrate_in_processes(
    settings: CalibrateSettings, work: Work, *, overwrite: bool, stop: Stop, quiet: bool
) -> None:
    """Run `a3 calibrate` with these settings and their number of processes."""
    options = settings.model_dump(exclude={"model", "num_processes", "texts"})
    if settings.texts:
        options["text"] |= mixture_options(settings.texts)
    options |= {"work": work.folder, "overwrite": overwrite, "quiet": quiet}
    if stop.deadline < math.inf:
        options["max_minutes"] = max(0.0, stop.deadline - time.monotonic()) / 60
    with without_output():  # its result is part of this one
        launch(settings.num_processes, command_words("calibrate", settings.model, options))


def exported(
    recipe: Recipe, work: Work, solution: SolutionManifest, *, overwrite: bool, progress: Progress, stop: Stop
) -> Manifest:
    """Export unless `out` is complete and has this solution and settings; return the manifest.

    A damaged export is replaced, with a warning that names the file.
    """
    replace = overwrite or recipe.export.overwrite
    if not overwrite and (recipe.out / MANIFEST).is_file():
        try:
            found = read_export_manifest(recipe.out / MANIFEST)
            if is_asked_for(found, recipe.export, solution):
                check_hashes({recipe.out / name: digest for name, digest in found.files.items()}, "export again")
                return found
        except A3Error as damage:
            log.warning("exporting %s again: %s", recipe.out, damage)
            replace = True
    settings = ExportSettings(**{**recipe.export.model_dump(), "overwrite": replace, "name": recipe.solve.name})
    return export(recipe.out, settings, work, progress=progress, stop=stop)


def is_asked_for(manifest: Manifest, settings: ExportSettings, solution: SolutionManifest) -> bool:
    asked = {name: getattr(settings, name) for name in ("dtype", "max_shard_size", "as_type")}
    same_settings = all(getattr(manifest, name) == value for name, value in asked.items())
    return bool(same_settings and manifest.solution.sha256 == solution.sha256)


def verified(
    settings: VerifySettings, recipe: Recipe, work: Work, manifest: Manifest, *, overwrite: bool, progress: Progress
) -> Json:
    """Return the outcomes of the checks, cached in the work folder for this export and these versions if all passed.

    The code of a per-layer export may run: `verify` runs it only if it is the file that a3 ships.
    """
    settings = settings.model_copy(update={"trust_remote_code": True})
    if not overwrite and (found := kept_verification(settings, work, manifest)):
        return found
    result = verify(recipe.out, settings, work, progress=progress)
    if result["passed"]:
        with work.locked():
            request = verification_request(settings, manifest)
            write_manifest(work.verification, {"request": request, "result": result})
    return result


def kept_verification(settings: VerifySettings, work: Work, manifest: Manifest) -> Json | None:
    """Return the outcomes that are cached for this export, these settings and versions, or None."""
    found = read_if_request_matches(work.verification, verification_request(settings, manifest))
    return dict(found["result"]) if found else None


def verification_request(settings: VerifySettings, manifest: Manifest) -> Json:
    """Return everything that the outcomes depend on."""
    allowed = settings.model_copy(update={"trust_remote_code": True})
    return {
        "settings": allowed.model_dump(mode="json"),
        "export": hash_json(manifest.plain()),
        "versions": versions(),
    }


def evaluated(settings: EvalSettings, work: Work, manifest: Manifest, *, overwrite: bool, progress: Progress) -> Json:
    """Return the measured figures, cached in the work folder with their request."""
    check_texts(settings.texts)
    settings = for_models(settings)
    if not overwrite and (found := kept_evaluation(settings, work, manifest)):
        return found
    result = evaluate(settings, progress=progress)
    read = [each["text_files"] for each in result["datasets"]]
    with work.locked():
        write_manifest(work.evaluation, {"request": describe_request(settings, manifest, read), "result": result})
    return result


def kept_evaluation(settings: EvalSettings, work: Work, manifest: Manifest) -> Json | None:
    """Return the figures that are cached for this export, these settings and texts, or None."""
    if not work.evaluation.is_file():
        return None
    found = read_manifest(work.evaluation, "use --overwrite")
    request = describe_request(settings, manifest, files_read_again(settings, found["result"]))
    return dict(found["result"]) if found["request"] == request else None


def describe_request(settings: EvalSettings, manifest: Manifest, files: list[Json]) -> Json:
    """Return everything that an evaluation's figures depend on; `files` are those read of each text."""
    texts = [as_compared(describe_text(text), read) for text, read in zip(settings.texts, files, strict=True)]
    return {
        "settings": {**settings.model_dump(mode="json"), "texts": texts},
        "text_files": files,
        "export": hash_json(manifest.plain()),
    }


def files_read_again(settings: EvalSettings, result: Json) -> list[Json]:
    """Return the files that a new evaluation would read, if it has the same texts as the one with this result."""
    known = [*result["datasets"], *[None] * len(settings.texts)]
    return [
        files_now(text, each["text_files"], whole=each["text_read"]["whole"]) if each and "text_read" in each else {}
        for text, each in zip(settings.texts, known, strict=False)
    ]
