"""Print what `a3 run` returns: the results of one solution, a table of several, and what a run would do."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from a3cli.cli import display
from a3cli.cli.console import print_line
from a3cli.cli.tables import new_table, print_table
from a3cli.report.figures import TITLES, human_bytes, percent
from a3cli.settings import COMPONENTS
from a3cli.work.escape import printable

if TYPE_CHECKING:
    from a3cli.stages.preview import Preview
    from a3cli.stages.run_results import RunResults, SolutionResults
    from a3cli.work.manifests import Sizes, Solution

Json = dict[str, Any]
# Figures of an evaluation: the heading, the key of the source's figure, and the form.
MEASURED = {"perplexity": ("perplexity", "source_perplexity", ",.2f"), "kl": ("KL", "", ".4f")}


def print_run(results: "RunResults") -> None:
    display.print_calibration(results.calibration)
    if results.several:
        print_solutions(results.solutions)
        return
    (only,) = results.solutions
    display.print_solution(only.solution, only.warnings, only.memory)
    if only.evaluation is not None:
        display.print_evaluation(only.evaluation)
    if only.verification is not None:
        display.print_verification(only.verification)
    display.print_export(only.exported, str(only.out))
    if only.report is not None:
        print_line(printable(str(only.report.html)))


def print_solutions(solutions: "Sequence[SolutionResults]") -> None:
    """Print a table that compares the source and the solutions, then where each export is, and warnings."""
    datasets: list[Json] = next((each.evaluation["datasets"] for each in solutions if each.evaluation), [])
    measured = [(place, key) for place, found in enumerate(datasets) for key in MEASURED if key in found]
    names = [f", {printable(each['dataset'])}" if len(datasets) > 1 else "" for each in datasets]
    headings = [MEASURED[key][0] + names[place] for place, key in measured]
    columns = ("removed", *TITLES.values(), "size", "KV bytes per token", *headings)
    table = new_table("solution", "checks", figures=columns)
    of_source = [show(datasets[place].get(MEASURED[key][1]), key) for place, key in measured]
    table.add_row("source", "", *costs_of(solutions[0].solution, source=True), *of_source)
    for each in solutions:
        own = each.evaluation["datasets"] if each.evaluation else [{}] * len(datasets)
        figures = [show(own[place].get(key), key) for place, key in measured]
        table.add_row(each.name or "", outcome(each), *costs_of(each.solution), *figures)
    print_table(table)
    for each in solutions:
        page = f", {each.report.html}" if each.report else ""
        at = f", uploaded to {each.pushed.url}" if each.pushed else ""
        print_line(printable(f"{each.name}: {each.out}{page}{at}"))
    display.warn(f"{each.name}: {warning}" for each in solutions for warning in each.warnings)


def costs_of(solution: "Solution", *, source: bool = False) -> list[str]:
    """Return what is removed, the mean sizes, bytes and KV bytes of a solution, or of its source."""
    sizes, when = ([solution.full_size], "before") if source else (solution.sizes, "after")
    return [
        percent(0 if source else solution.budget_reached, 1),
        *(mean(sizes, component) for component in COMPONENTS),
        human_bytes(getattr(solution.bytes, when)),
        f"{getattr(solution.kv_bytes_per_token, when):,}",
    ]


def mean(sizes: "Sequence[Sizes]", component: str) -> str:
    value = sum(getattr(each, component) for each in sizes) / len(sizes)
    return f"{value:,.0f}" if value.is_integer() else f"{value:,.1f}"


def show(figure: float | None, key: str) -> str:
    """Return a figure of an evaluation, empty if it was not measured."""
    return "" if figure is None else format(figure, MEASURED[key][2])


def outcome(results: "SolutionResults") -> str:
    if not results.passed:
        return "FAILED"
    gates = any(each.get("gates") for each in (results.evaluation or {"datasets": []})["datasets"])
    return "passed" if results.verification or gates else "none"


def print_preview(preview: "Preview") -> None:
    """Print the recipe with every setting, and as comments above each stage how far it is."""
    folders: Json = {"work": str(preview.recipe.work), "out": str(preview.recipe.out)}
    for name, folder in folders.items():
        print_yaml({name: folder})
    for name, comments, settings in preview.sections():
        for comment in comments:
            print_line(printable(f"# {comment}"))
        print_yaml({name: settings})
    if preview.recipe.verify is False:
        print_line("verify: false")


def print_yaml(content: Json) -> None:
    import yaml

    dumped = yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=10**6)
    for line in dumped.splitlines():
        print_line(printable(line))


def print_finished(out: str) -> None:
    print_line(f"nothing was left to do: this run had finished; the export is in {printable(out)}")
