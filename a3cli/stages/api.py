"""The Python interface: each command as a function, with the command's options as keyword arguments.

A keyword is an option's name with `_` for `-`: `--seq-len 512` is `seq_len=512`. Names, defaults and bounds are those
of `a3 COMMAND --help`; the classes in `a3cli.settings` define them. Where a message names an option, change that
keyword.

Nothing is printed: a function returns its result, reports progress to a callback, logs to the logger `a3cli`, and
raises `A3Error` for everything that the caller can mend. All stages are resumable: after an error, a kill or
`max_minutes`, the same call resumes.
"""

import shutil
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from a3cli.errors import A3Error
from a3cli.models.source import opened_work
from a3cli.report.manifest import Manifest
from a3cli.settings import (
    DEFAULT_DATASET,
    DEFAULT_WORK,
    CalibrateSettings,
    EvalSettings,
    ExportSettings,
    PlanSettings,
    Settings,
    SolveSettings,
    VerifySettings,
)
from a3cli.settings.budgets import BUDGETS, DEFAULT_BUDGET
from a3cli.settings.keywords import keywords_of, refuse_unknown, settings_from
from a3cli.stages.allowed import known_family, resolve_settings
from a3cli.stages.as_llama import check_as_type
from a3cli.stages.evaluate import evaluate as run_evaluate
from a3cli.stages.export import export as run_export
from a3cli.stages.libraries import quiet_libraries
from a3cli.stages.plan import plan as run_plan
from a3cli.stages.publish import export_and_push, open_repository, push
from a3cli.stages.run import calibrated
from a3cli.stages.solve import solve as run_solve
from a3cli.stages.verify import verify as run_verify
from a3cli.work.files import Json
from a3cli.work.folder import Work
from a3cli.work.interrupt import Stop
from a3cli.work.manifests import CalibrationManifest, SolutionManifest
from a3cli.work.progress import Progress, silent

__all__ = ["calibrate", "compress", "evaluate", "export", "plan", "solve", "verify"]

PathOrName = str | PathLike[str]


def calibrate(
    model: PathOrName,
    work: PathOrName = DEFAULT_WORK,
    *,
    overwrite: bool = False,
    max_minutes: float | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> CalibrationManifest:
    """Run text through a model, layer by layer, and keep each layer's statistics in the work folder.

    Args:
        model: Local folder or Hub id of a safetensors checkpoint.
        work: Work folder, shared by the stages.
        overwrite: Replace a calibration with other settings.
        max_minutes: Stop after the layer in which this time, in minutes, has passed.
        progress: Called after each batch as `progress(layer=…, layers=…, tokens=…, total_tokens=…)`: the layer's index
            from 0, the number of layers, and tokens through this layer of all calibration tokens. Other steps call
            `progress(step=…, done=…, total=…, unit=…)`: the step's name, and how many of how many units are done.
        **settings: Fields of `CalibrateSettings`, and those of its text, such as `dataset`, `samples` (blocks) and
            `seq_len` (tokens per block). A list of data sets, as in `dataset=["a.txt:0.7", "b.jsonl:0.3"]` or
            `texts=[{"dataset": "a.txt", "weight": 0.7}, …]`, is a mixture.

    Returns:
        The calibration's manifest: settings, text that was read, and hashes of the statistics.

    Raises:
        A3Error: For settings, text, a model or a work folder that do not fit.
        Interrupted: After `max_minutes`; the same call resumes.
    """
    asked = settings_from(CalibrateSettings, "calibrate", {**settings, "model": name_of(model)})
    with quiet_libraries():
        return calibrated(
            asked,
            Work(Path(work)),
            overwrite=overwrite,
            progress=progress or silent,
            stop=Stop(max_minutes),
            quiet=True,
        )


def solve(
    work: PathOrName = DEFAULT_WORK,
    *,
    budget: float | None = None,
    overwrite: bool = False,
    max_minutes: float | None = None,
    source: PathOrName | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> SolutionManifest:
    """Choose head and MLP sizes for a budget and compute each layer's projections, from a finished calibration.

    Args:
        work: Work folder with the calibration.
        budget: Fraction, in [0, 1), of the decoder's linear weights to remove; or give other budgets in `settings`:
            `kv_budget`, `budget_bytes` (bytes, or text like `"10GB"`), `budget_params`.
        overwrite: Replace a solution with other settings.
        max_minutes: Stop after the layer in which this time, in minutes, has passed.
        source: New place of the source, if it was moved since it was calibrated.
        progress: As for `calibrate`.
        **settings: Fields of `SolveSettings`.

    Returns:
        The solution's manifest: sizes of each layer, costs before and after, predicted loss.

    Raises:
        A3Error: For statistics that are missing or altered, or a budget that rounding does not allow.
        Interrupted: After `max_minutes`; the same call resumes.
    """
    asked = settings_from(SolveSettings, "solve", {**settings, "budget": budget})
    with quiet_libraries():
        return run_solve(
            asked, work_of(work, source), overwrite=overwrite, progress=progress or silent, stop=Stop(max_minutes)
        )


def export(
    out: PathOrName,
    work: PathOrName = DEFAULT_WORK,
    *,
    max_minutes: float | None = None,
    source: PathOrName | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Manifest:
    """Write the smaller model as a standard checkpoint.

    Args:
        out: Folder to write: empty or not there yet, or with `overwrite=True` an earlier export.
        work: Work folder with the solution.
        max_minutes: Stop after the weight file in which this time, in minutes, has passed.
        source: New place of the source, if it was moved since it was calibrated.
        progress: As for `calibrate`.
        **settings: Fields of `ExportSettings`; `max_shard_size` in bytes, or as text like `"5GB"`. With
            `push_to_hub="OWNER/NAME"` the export is then uploaded; its URL is logged.

    Returns:
        The export's manifest: what it was made from, sizes, runtimes that load it, and the hash of each file.

    Raises:
        A3Error: For a solution that is missing or altered, a source that changed, or an `out` that is in use; for a
            repository that cannot be written to, before any work.
        CheckFailed: If `check_reproducible=True` and two writes differ.
        Interrupted: After `max_minutes`; the same call resumes.
    """
    asked = settings_from(ExportSettings, "export", settings)
    with quiet_libraries():
        return export_and_push(
            Path(out), asked, work_of(work, source), stop=Stop(max_minutes), progress=progress or silent
        ).manifest


def evaluate(
    model: PathOrName,
    *,
    against: PathOrName | None = None,
    dataset: str | Sequence[str] = DEFAULT_DATASET,
    progress: Progress | None = None,
    **settings: Any,
) -> Json:
    """Measure a model's perplexity and, with `against`, its distance from the source.

    Args:
        model: Local folder or Hub id.
        against: Source to compare with.
        dataset: One data set or several, as for `calibrate`.
        progress: As for `calibrate`.
        **settings: Fields of `EvalSettings`, and those of its texts. A gate of `fail_if` that fails raises nothing: see
            `gates` in the result. For texts that differ in more than the data set give `texts`, a list of dictionaries;
            for `tasks` without a text give `texts=()`.

    Returns:
        A dictionary as `a3 eval --json` prints it: `perplexity`, with a source also `source_perplexity`,
        `perplexity_increase`, `kl` (nats per token) and `top1_agreement` (a fraction), and `datasets`, a list with the
        figures, intervals and gates of each.

    Raises:
        A3Error: For a model that does not load completely, too little text, or a loss that is not finite.
    """
    values = {**settings, "model": name_of(model), "against": None if against is None else name_of(against)}
    if "texts" not in settings:
        values["dataset"] = dataset
    with quiet_libraries():
        return run_evaluate(settings_from(EvalSettings, "evaluate", values), progress=progress or silent)


def verify(
    out: PathOrName,
    work: PathOrName = DEFAULT_WORK,
    *,
    source: PathOrName | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Json:
    """Check an export as users load it: complete, unaltered, finite, and equal to the solution.

    Args:
        out: Folder that `export` or `compress` wrote.
        work: Work folder that it was made from; without it, comparison with the solution is skipped.
        source: New place of the source, if it was moved since it was calibrated.
        progress: As for `calibrate`.
        **settings: Fields of `VerifySettings`.

    Returns:
        A dictionary as `a3 verify --json` prints it: `passed`, and `checks`, a list of `name`, `outcome` (passed,
        failed or skipped) and `detail`. A failed check raises nothing.

    Raises:
        A3Error: If `out` is not an export, or for code that may not run.
    """
    asked = settings_from(VerifySettings, "verify", settings)
    with quiet_libraries():
        return run_verify(Path(out), asked, work_of(work, source), progress=progress or silent)


def plan(model: PathOrName, **settings: Any) -> Json:
    """Estimate a run's sizes, disk, memory and time, and list what will load the result; downloads no weights.

    Args:
        model: Local folder or Hub id.
        **settings: Fields of `PlanSettings`.

    Returns:
        A dictionary as `a3 plan --json` prints it; sizes in bytes, times in seconds.

    Raises:
        A3Error: For a model that does not exist or is not supported, or a budget that rounding does not allow.
    """
    with quiet_libraries():
        return run_plan(settings_from(PlanSettings, "plan", {**settings, "model": name_of(model)}))


def compress(
    model: PathOrName,
    out: PathOrName,
    budget: float | None = None,
    dataset: str | Sequence[str] = DEFAULT_DATASET,
    *,
    work: PathOrName | None = None,
    overwrite: bool = False,
    max_minutes: float | None = None,
    progress: Progress | None = None,
    export: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Manifest:
    """Write a smaller copy of a model to `out`: calibrate, solve and export in one call.

    Args:
        model: Local folder or Hub id of a safetensors checkpoint.
        out: Folder to write: empty or not there yet, or with `overwrite` an earlier export.
        budget: Fraction, in [0, 1), of the decoder's linear weights to remove: 0.25 unless `settings` has another
            budget, like `kv_budget` or `budget_bytes`.
        dataset: Calibration text: a known name, a Hub id, or a text file or folder; or a list of these, a mixture, each
            perhaps with `:WEIGHT`.
        work: Work folder to keep, for `verify` and for other budgets. By default it is `.NAME.a3-work` beside `out`,
            which is removed after a success only. After an error or a kill it stays, and the same call resumes.
        overwrite: Redo all stages, and replace an earlier export.
        max_minutes: Stop after the step in which this time, in minutes, has passed.
        progress: As for `calibrate`.
        export: Fields of `ExportSettings`; separate, since `dtype` there is that of the written weights.
        **settings: Fields of `CalibrateSettings` and its text, and of `SolveSettings`. A name that both have, like
            `device`, `dtype` (to compute in), `batch_size` or `num_processes`, goes to both.

    Returns:
        The export's manifest.

    Raises:
        A3Error: As the stages do; before any work for settings that contradict each other and an `out` in use.
        Interrupted: After `max_minutes`; the same call resumes.
    """
    others = any(settings.get(name) is not None for name in BUDGETS)
    given = {**settings, "model": name_of(model), "budget": DEFAULT_BUDGET if budget is None and not others else budget}
    if not settings.keys() & {"text", "texts"}:
        given["dataset"] = dataset
    refuse_unknown("compress", given, keywords_of(CalibrateSettings) | keywords_of(SolveSettings))
    calibration = settings_from(CalibrateSettings, "compress", known_to(CalibrateSettings, given))
    solution = settings_from(SolveSettings, "compress", known_to(SolveSettings, given))
    written = settings_from(ExportSettings, "export", {"overwrite": overwrite, "name": solution.name, **(export or {})})
    family = known_family(calibration.model, calibration.revision)
    resolve_settings(solution, family)
    check_as_type(written, family, solution.shape)
    target = Path(out)
    folder = Work(Path(work) if work is not None else target.resolve().with_name(f".{target.resolve().name}.a3-work"))
    check_free(target, folder, overwrite=written.overwrite)
    report, stop = progress or silent, Stop(max_minutes)
    with quiet_libraries():
        repository = open_repository(written)
        calibrated(calibration, folder, overwrite=overwrite, progress=report, stop=stop, quiet=True)
        run_solve(solution, folder, overwrite=overwrite, progress=report, stop=stop)
        manifest = run_export(target, written, folder, stop=stop, progress=report)
        if repository:
            push(target, manifest, repository, written, folder, report)
    if work is None:
        shutil.rmtree(folder.folder)
    return manifest


def known_to(kind: type[Settings], given: Mapping[str, Any]) -> dict[str, Any]:
    known = keywords_of(kind)
    return {name: value for name, value in given.items() if name in known}


def check_free(out: Path, work: Work, *, overwrite: bool) -> None:
    """Check before hours of work that `out` may be written. Raises A3Error.

    With a solution in the work folder `out` may be its finished export: `export` finds out.
    """
    if overwrite or work.solution_manifest.is_file() or not out.exists():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise A3Error(f"{out} is not an empty folder; use overwrite=True to replace an earlier export, or another out")


def work_of(work: PathOrName, source: PathOrName | None) -> Work:
    return opened_work(Path(work), None if source is None else name_of(source))


def name_of(model: PathOrName) -> str:
    return model if isinstance(model, str) else str(Path(model))
