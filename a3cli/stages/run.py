"""Run a recipe's stages: calibrate, solve, export, verify unless disabled, and eval if it has that section.

Each stage finds out from its files whether it is done, so a rerun resumes, and a finished recipe does nothing.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from a3cli.errors import A3Error
from a3cli.report.manifest import MANIFEST, Manifest, read_export_manifest
from a3cli.settings import CalibrateSettings, EvalSettings, ExportSettings, VerifySettings
from a3cli.settings.options import command_words
from a3cli.stages.calibrate import calibrate
from a3cli.stages.context import known_family, resolve_settings
from a3cli.stages.evaluate import evaluate, for_models
from a3cli.stages.export import export
from a3cli.stages.recipe import Recipe
from a3cli.stages.solve import solve
from a3cli.stages.verify import verify
from a3cli.text.identity import as_compared, describe_text, files_now
from a3cli.text.sources import check_texts
from a3cli.work.files import Json, check_hashes, hash_json
from a3cli.work.folder import Work
from a3cli.work.interrupt import Stop
from a3cli.work.manifests import CalibrationManifest, SolutionManifest
from a3cli.work.processes import launch, without_output
from a3cli.work.progress import Progress
from a3cli.work.sealed import read_if_request_matches, read_manifest, versions, write_manifest

log = logging.getLogger(__name__)


@dataclass
class RunResults:
    """The results of a recipe's stages; None for a stage that did not run."""

    calibration: CalibrationManifest
    solution: SolutionManifest
    export: Manifest
    verification: Json | None = None
    evaluation: Json | None = None
    finished_before: bool = False  # nothing was left to do

    def plain(self) -> Json:
        """Return the results as JSON has them, by the stage's name."""
        stages = {"verify": self.verification, "eval": self.evaluation}
        return {
            "calibrate": self.calibration.plain(),
            "solve": self.solution.plain(),
            "export": self.export.plain(),
            **{stage: result for stage, result in stages.items() if result is not None},
        }


def run_recipe(
    recipe: Recipe,
    *,
    overwrite: bool,
    progress: Callable[[], AbstractContextManager[Progress]],
    stop: Stop,
    quiet: bool = False,
) -> RunResults:
    """Run all stages and return their results; `overwrite` restarts all, `quiet` also applies to processes.

    An export that fails a check of `verify` is not evaluated.

    Raises A3Error if a stage does, and before the first one for settings that contradict each other; raises Interrupted
    at the end of the step in which `stop` was set off.
    """
    resolve_settings(recipe.solve, known_family(recipe.calibrate.model, recipe.calibrate.revision))
    work = Work(recipe.work, recipe.solve.name)
    before = when_written(recipe, work)
    log.info("calibrate")
    with progress() as report:
        calibration = calibrated(recipe.calibrate, work, overwrite=overwrite, progress=report, stop=stop, quiet=quiet)
    log.info("solve")
    with progress() as report:
        solution = solve(recipe.solve, work, overwrite=overwrite, progress=report, stop=stop)
    log.info("export")
    with progress() as report:
        manifest = exported(recipe, work, solution, overwrite=overwrite, progress=report, stop=stop)
    results = RunResults(calibration, solution, manifest)
    if recipe.verify:
        log.info("verify")
        with progress() as report:
            results.verification = verified(recipe.verify, recipe, work, manifest, overwrite=overwrite, progress=report)
        if not results.verification["passed"]:
            return results
    if recipe.evaluation is not None:
        log.info("eval")
        with progress() as report:
            results.evaluation = evaluated(recipe.evaluation, work, manifest, overwrite=overwrite, progress=report)
    results.finished_before = before == when_written(recipe, work)
    return results


def calibrated(
    settings: CalibrateSettings, work: Work, *, overwrite: bool, progress: Progress, stop: Stop, quiet: bool
) -> CalibrationManifest:
    """Calibrate, in as many processes as the settings say; return the manifest."""
    if settings.num_processes > 1 and (overwrite or not work.calibration_manifest.exists()):
        calibrate_in_processes(settings, work, overwrite=overwrite, stop=stop, quiet=quiet)
        overwrite = False
    return calibrate(settings, work, overwrite=overwrite, progress=progress, stop=stop)


def when_written(recipe: Recipe, work: Work) -> dict[Path, int]:
    """Return when each stage's last file was written, in nanoseconds; a stage that does anything writes it."""
    own = (work.calibration_manifest, work.solution_manifest, work.verification, work.evaluation)
    return {file: file.stat().st_mtime_ns for file in (*own, recipe.out / MANIFEST) if file.is_file()}


def calibrate_in_processes(
    settings: CalibrateSettings, work: Work, *, overwrite: bool, stop: Stop, quiet: bool
) -> None:
    """Run `a3 calibrate` with these settings and their number of processes."""
    options = settings.model_dump(exclude={"model", "num_processes"})
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
    asked = {"dtype": settings.dtype, "max_shard_size": settings.max_shard_size}
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
