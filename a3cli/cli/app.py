"""The command line: each command parses, calls one library function and prints what it returns.

Heavy imports stay inside the commands, so that `a3 --help` answers at once.
"""

import sys
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from a3cli import __version__
from a3cli.cli import display, next_command, runs
from a3cli.cli.console import print_json, set_up_output, show
from a3cli.cli.exits import ErrorsToExitCodes, report_bug
from a3cli.cli.looking import looking
from a3cli.cli.options import (
    AsJson,
    Junit,
    MaxMinutes,
    OnceTyper,
    Output,
    Overwrite,
    Quiet,
    SourceOption,
    WorkOption,
    check_output,
    option,
    with_settings,
)
from a3cli.cli.progress import sweep_progress
from a3cli.errors import A3Error
from a3cli.settings import (
    DEFAULT_WORK,
    CalibrateSettings,
    EvalSettings,
    ExportSettings,
    ParetoSettings,
    PlanSettings,
    SolveSettings,
    VerifySettings,
)
from a3cli.settings.options import HOW, OUTPUT
from a3cli.work.processes import is_main, launch, launched

if TYPE_CHECKING:
    from a3cli.work.folder import Work

app = OnceTyper(
    cls=ErrorsToExitCodes,
    help="Smaller language models in closed form: calibrate, solve, export.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


@app.command()
@with_settings(CalibrateSettings)
def calibrate(
    settings: CalibrateSettings,
    work: WorkOption = DEFAULT_WORK,
    max_minutes: MaxMinutes = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run text through the model, layer by layer, and keep each layer's statistics.

    Resumable: after a stop, rerun the command; it resumes at the unfinished layer.
    """
    set_up_output(quiet=quiet)
    if settings.num_processes > 1 and not launched():
        launch(settings.num_processes, sys.argv[1:])
        return
    from a3cli.stages.calibrate import calibrate as run
    from a3cli.work.interrupt import stopping

    with stopping(max_minutes) as stop, sweep_progress(quiet=quiet or not is_main()) as progress:
        manifest = run(settings, open_work(work), overwrite=overwrite, progress=progress, stop=stop)
    if is_main():
        print_json(manifest) if as_json else display.print_calibration(manifest)
        if not (as_json or quiet):
            next_command.after_calibration(work)


@app.command()
@with_settings(SolveSettings)
def solve(
    settings: SolveSettings,
    work: WorkOption = DEFAULT_WORK,
    source: SourceOption = None,
    max_minutes: MaxMinutes = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Choose head and MLP sizes for a budget and compute each layer's projections."""
    set_up_output(quiet=quiet)
    from a3cli.stages.rounding import warnings_of
    from a3cli.stages.solve import solve as run
    from a3cli.work.interrupt import stopping

    with stopping(max_minutes) as stop, sweep_progress(quiet=quiet) as progress:
        manifest = run(settings, open_work(work, source), overwrite=overwrite, progress=progress, stop=stop)
    warnings = warnings_of(manifest, open_work(work), settings.memory)
    if as_json:
        print_json(display.solution_json(manifest, warnings, settings.memory))
    else:
        display.print_solution(manifest, warnings, settings.memory)
    if not (as_json or quiet):
        next_command.after_solution(work, settings.name)


@app.command()
@with_settings(ParetoSettings)
def pareto(
    settings: ParetoSettings,
    work: WorkOption = DEFAULT_WORK,
    source: SourceOption = None,
    plot: Annotated[Path | None, option(panel=OUTPUT, help="Write a plot to this .png, .svg or .pdf file.")] = None,
    output: Output = None,
    max_minutes: MaxMinutes = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare loss against size at many budgets, for every method, from one calibration."""
    set_up_output(quiet=quiet)
    from a3cli.stages.pareto import draw
    from a3cli.stages.pareto import pareto as run
    from a3cli.work.interrupt import stopping

    check_output("--plot", plot, suffixes=(".png", ".svg", ".pdf"))
    check_output("--output", output)
    with stopping(max_minutes) as stop, sweep_progress(quiet=quiet) as progress:
        result = run(settings, open_work(work, source), progress=progress, stop=stop)
    if plot:
        draw(result, plot)
    show(result, display.print_pareto, as_json=as_json, output=output)


@app.command()
@with_settings(ExportSettings)
def export(
    settings: ExportSettings,
    out: Annotated[Path, typer.Argument(help="Folder to write: empty or not there yet.")],
    work: WorkOption = DEFAULT_WORK,
    source: SourceOption = None,
    max_minutes: MaxMinutes = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the smaller model as a standard checkpoint that stock loaders read."""
    set_up_output(quiet=quiet)
    from a3cli.stages.publish import export_and_push as run
    from a3cli.work.interrupt import stopping

    with stopping(max_minutes) as stop, sweep_progress(quiet=quiet) as progress:
        exported = run(out, settings, open_work(work, source), progress=progress, stop=stop)
    print_json(exported) if as_json else display.print_export(exported, str(out))
    if not (as_json or quiet):
        next_command.after_export(out, exported.manifest, work)


@app.command(name="eval")
@with_settings(EvalSettings)
def evaluate(
    settings: EvalSettings,
    junit: Junit = None,
    output: Output = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity and, with --against, the distance from the source; --fail-if makes it a gate."""
    set_up_output(quiet=quiet)
    from a3cli.report.junit import write_junit
    from a3cli.settings.gates import raise_for_failures
    from a3cli.stages.evaluate import cases
    from a3cli.stages.evaluate import evaluate as run

    check_output("--junit", junit)
    check_output("--output", output)
    with sweep_progress(quiet=quiet) as progress:
        result = run(settings, progress=progress)
    if junit:
        write_junit(junit, "a3 eval", cases(result))
    show(result, display.print_evaluation, as_json=as_json, output=output)
    raise_for_failures(result["datasets"])
    if not (as_json or quiet):
        next_command.after_evaluation(settings.model)


@app.command()
@with_settings(VerifySettings)
def verify(
    settings: VerifySettings,
    out: Annotated[Path, typer.Argument(help="Folder that a3 export wrote.")],
    work: WorkOption = DEFAULT_WORK,
    source: SourceOption = None,
    junit: Junit = None,
    output: Output = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check an export as users load it: complete, unaltered, finite, and equal to the solution."""
    set_up_output(quiet=quiet)
    from a3cli.report.junit import write_junit
    from a3cli.stages.verify import cases, raise_for_failures
    from a3cli.stages.verify import verify as run

    check_output("--junit", junit)
    check_output("--output", output)
    with sweep_progress(quiet=quiet) as progress:
        result = run(out, settings, open_work(work, source), progress=progress)
    if junit:
        write_junit(junit, "a3 verify", cases(result))
    show(result, display.print_verification, as_json=as_json, output=output)
    raise_for_failures(result)
    if not (as_json or quiet):
        next_command.after_verification(out, open_work(work))


@app.command()
@with_settings(PlanSettings)
def plan(settings: PlanSettings, output: Output = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Estimate a run's sizes, disk, memory and time, and list what will load the result."""
    set_up_output(quiet=quiet)
    from a3cli.stages.plan import plan as run

    check_output("--output", output)
    show(run(settings), display.print_plan, as_json=as_json, output=output)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file with the settings of all stages.")],
    changes: Annotated[
        list[str] | None, option("--set", panel=HOW, help="Change a setting, like solve.budget=0.3; repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, option("--dry-run", panel=HOW, help="Print settings and finished stages; do nothing.")
    ] = False,
    verify: Annotated[bool, option("--verify/--no-verify", panel=HOW, help="Check the written export.")] = True,
    max_minutes: MaxMinutes = None,
    work: Annotated[Path | None, option(panel=OUTPUT, help="Work folder, in place of the recipe's.")] = None,
    out: Annotated[Path | None, option(panel=OUTPUT, help="Export folder, in place of the recipe's.")] = None,
    overwrite: Annotated[bool, option("--overwrite", panel=OUTPUT, help="Redo all stages.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run all stages of a recipe: calibrate, solve, export, verify, eval, report.

    With a list of budgets the later stages run for each of them, and a table compares them.

    Resumable: rerun the same command after a stop. A finished run is left as it is. The exit code is 1 if a gate of
    the recipe (fail_if) or a check of verify failed, also in a run that had finished before.
    """
    set_up_output(quiet=quiet)
    from a3cli.stages.preview import preview
    from a3cli.stages.recipe import read_recipe
    from a3cli.stages.run import run_recipe
    from a3cli.work.interrupt import stopping

    settings = read_recipe(recipe, work=work, out=out, changes=changes or [])
    if not verify:
        settings = settings.model_copy(update={"verify": False})
    if dry_run:
        previewed = preview(settings, overwrite=overwrite)
        print_json(previewed) if as_json else runs.print_preview(previewed)
        return
    progress = partial(sweep_progress, quiet=quiet)
    with stopping(max_minutes) as stop:
        results = run_recipe(settings, overwrite=overwrite, progress=progress, stop=stop, quiet=quiet)
    print_json(results) if as_json else runs.print_run(results)
    if results.finished_before and not (as_json or quiet):
        runs.print_finished(str(settings.out))
    results.raise_for_failures()


stats = OnceTyper(help="Statistics of finished calibrations.", no_args_is_help=True)
app.add_typer(stats, name="stats")


@stats.command()
def merge(
    works: Annotated[list[Path], typer.Argument(help="Work folders with finished calibrations of one model.")],
    into: Annotated[Path, option(panel=OUTPUT, help="Work folder to write: the calibration on all texts.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Add up calibrations of one model on different text."""
    set_up_output(quiet=quiet)
    from a3cli.stages.merge import merge as run

    manifest = run([open_work(work) for work in works], open_work(into), overwrite=overwrite)
    print_json(manifest) if as_json else display.print_calibration(manifest)
    if not (as_json or quiet):
        next_command.after_calibration(into)


app.add_typer(looking)


def open_work(folder: Path, source: str | None = None) -> "Work":
    if source is not None:
        from a3cli.models.source import opened_work

        return opened_work(folder, source)
    from a3cli.work.folder import Work

    return Work(folder)


def version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Handle --version, and refuse commands that a launcher started in several processes."""
    if launched() and context.invoked_subcommand != "calibrate":
        raise A3Error(
            f"a3 {context.invoked_subcommand} works in one process, and a launcher started it in several "
            "(RANK and WORLD_SIZE are set); only a3 calibrate shares its work among them: start this one on its own"
        )


def main() -> None:
    """Run the `a3` command; a character that the output's encoding lacks is printed as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except Exception:
        report_bug()
