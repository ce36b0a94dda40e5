"""What `a3 inspect` prints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from a3cli.cli.console import print_line, print_sentence
from a3cli.cli.tables import new_table, print_table
from a3cli.report.figures import TITLES, describe_budgets, percent, spread
from a3cli.report.names import describe_texts
from a3cli.settings import COMPONENTS
from a3cli.work.escape import printable

if TYPE_CHECKING:
    from a3cli.report.inspection import Inspection, SolutionSummary
    from a3cli.report.layers import ComponentState, LayerState
    from a3cli.text.tokens import TokenStatistics

Json = dict[str, Any]


def print_inspection(found: "Inspection") -> None:
    """Print stage and source, a table of all layers, the calibration text, and the warnings."""
    calibration, solution = found.calibration, found.solution
    blocks, length = calibration.blocks
    print_line(f"{printable(found.path)}: {found.stage}, from {printable(str(found.source.model))}")
    done = f"; {len(found.layers)} layers are done" if found.stage == "calibrating" else ""
    print_sentence(f"calibrated on {calibration.tokens:,} tokens ({blocks} blocks of {length}){done}")
    print_sentence(f"text: {printable(describe_texts(calibration, quoted=str))}")
    if solution:
        removed = f"{percent(solution.budget_reached, 2)} of the decoder's linear weights removed"
        named = f" as {found.name}" if found.name else ""
        settings = f"--method {solution.request.settings.method} --shape {solution.shape}"
        asked = describe_budgets(solution.request.settings)
        print_sentence(f"solved{named} with {settings}: {removed} (asked: {asked})")
    if any(each.name for each in found.solutions):
        print_table(_solutions_table(found.solutions))
    if found.layers:
        print_table(_layers_table(found.layers))
    if found.text:
        print_table(_text_table(found.text))
    for warning in found.warnings:
        print_sentence(Text.assemble(("warning:", "yellow"), " ", printable(warning)))
    if not found.warnings:
        print_sentence("no warnings")


def _solutions_table(solutions: "Sequence[SolutionSummary]") -> Table:
    table = new_table("solution", figures=("asked", "removed", *TITLES.values(), "predicted loss"))
    for each in solutions:
        sizes = (spread([getattr(size, component) for size in each.sizes]) for component in COMPONENTS)
        loss = sum(getattr(each.predicted_loss, component) for component in COMPONENTS)
        name = (each.name or "without a name") + ("" if each.current else " (of another calibration)")
        table.add_row(name, each.asked, percent(each.budget_reached, 2), *sizes, f"{loss:.4g}")
    return table


def _layers_table(layers: "Sequence[LayerState]") -> Table:
    columns = ("size", "predicted loss", "energy kept", "effective rank", "condition")
    table = new_table("layer", "", figures=(*columns, "tokens per dim", "damping", "MB"))
    for each in layers:
        for component, title in TITLES.items():
            number = str(each.layer) if component == COMPONENTS[0] else ""
            last = component == COMPONENTS[-1]
            table.add_row(number, title, *_component_figures(each.part(component)), end_section=last)
    return table


def _component_figures(part: "ComponentState") -> list[str]:
    """Return one component's row of the table of layers."""
    now = part.bytes.now
    return [
        f"{part.full_size:,}" if part.size is None else f"{part.size:,} of {part.full_size:,}",
        _or_dash(part.predicted_loss, ".3g"),
        _or_dash(part.energy_kept, ".2%"),
        _or_dash(part.effective_rank, ".1f"),
        "singular" if part.is_singular else _or_dash(part.condition, ".1e"),
        _or_dash(part.tokens_per_dimension, ",.1f"),
        _or_dash(part.damping, ".0e"),
        _or_dash(None if now is None else now / 1e6, ",.2f"),
    ]


def _text_table(text: "TokenStatistics") -> Table:
    table = new_table("calibration text", "")
    table.add_row("distinct tokens", f"{text.distinct_tokens:,}")
    if text.characters is not None:
        table.add_row("share of the vocabulary", f"{text.share_of_vocabulary:.1%} of {text.vocabulary:,}")
        table.add_row("bytes per token", f"{text.bytes_per_token:.2f}")
        table.add_row("characters", ", ".join(f"{share:.0%} {kind}" for kind, share in text.characters.items()))
    table.add_row(f"repeated {text.ngram}-grams", f"{text.repeated_ngrams:.1%}")
    table.add_row("blocks that repeat another", str(len({each.block for each in text.overlapping_blocks})))
    tokens = ((each.token if each.text is None else each.text, each.share) for each in text.most_frequent)
    frequent = ", ".join(f"{printable(repr(token))} {share:.1%}" for token, share in tokens)
    table.add_row("most frequent tokens", frequent)
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
