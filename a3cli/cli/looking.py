"""The commands that look at what was made, and change nothing: inspect, report and generate."""

from pathlib import Path
from typing import Annotated

import typer

from a3cli.cli import display, inspection
from a3cli.cli.console import print_json, set_up_output, show
from a3cli.cli.options import (
    AsJson,
    Evaluations,
    Name,
    OnceTyper,
    Output,
    Quiet,
    SourceOption,
    check_output,
    option,
    with_settings,
)
from a3cli.errors import A3Error
from a3cli.settings import DEFAULT_WORK
from a3cli.settings.generation import GenerateSettings
from a3cli.settings.options import OUTPUT
from a3cli.settings.report import ReportSettings, ServingSettings

looking = OnceTyper()


@looking.command()
def inspect(
    folder: Annotated[Path, typer.Argument(envvar="A3_WORK", help="Work folder or export.")] = DEFAULT_WORK,
    source: SourceOption = None,
    name: Name = None,
    output: Output = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show each layer's sizes, losses and statistics, all solutions, the calibration text, and warnings."""
    set_up_output(quiet=quiet)
    from a3cli.report.inspection import describe

    check_output("--output", output)
    show(describe(folder, name, source), inspection.print_inspection, as_json=as_json, output=output)


@looking.command()
@with_settings(ServingSettings)
def report(
    settings: ServingSettings,
    folder: Annotated[Path, typer.Argument(envvar="A3_WORK", help="Work folder or export.")] = DEFAULT_WORK,
    source: SourceOption = None,
    html: Annotated[Path | None, option(panel=OUTPUT, help=ReportSettings.model_fields["html"].description)] = None,
    name: Name = None,
    evaluation: Evaluations = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write one self-contained HTML page: before and after, curves, sizes, RoPE, provenance, warnings."""
    set_up_output(quiet=quiet)
    from a3cli.report.inspection import describe
    from a3cli.report.page import read_evaluations, write_report

    if html is None:
        raise A3Error("no file to write: give --html FILE")
    check_output("--html", html)
    result = write_report(describe(folder, name, source), read_evaluations(evaluation or []), html, settings.memory)
    print_json(result) if as_json else display.print_report(result)


@looking.command()
@with_settings(GenerateSettings)
def generate(settings: GenerateSettings, output: Output = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Continue prompts with a model and, with --against, with its source, side by side."""
    set_up_output(quiet=quiet)
    from a3cli.stages.generate import generate as run

    check_output("--output", output)
    show(run(settings), display.print_generation, as_json=as_json, output=output)
