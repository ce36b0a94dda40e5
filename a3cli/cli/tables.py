"""Fit tables into the terminal's width, with every figure and every word whole."""

import sys
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.table import Table

from a3cli.cli.console import open_console, print_wrapped

LOG_WIDTH = 160  # columns of a table that is not printed on a terminal; more if its words need more
LONG_HEADING = 30  # columns; a heading with a longer word is listed below a table that does not fit


def new_table(*names: str, figures: Iterable[str] = ()) -> Table:
    """Return a table with these headings: columns of text, then right-justified columns of figures."""
    table = Table(*names)
    for heading in figures:
        table.add_column(heading, justify="right")
    return table


def print_table(table: Table) -> None:
    """Print a table with every figure and every word whole.

    Right-justified columns hold figures, which are never wrapped; other cells wrap between words. A table that is too
    wide for the terminal is split into several, each with the columns before the first figure. If a word is too long
    even for that, rows are printed as lines.
    """
    if not sys.stdout.isatty():
        room = max(LOG_WIDTH, _outer_width(_least_widths(table)))
        open_console(width=room).print(_sized(table, range(len(table.columns)), room))
        return
    console = open_console(soft_wrap=False)
    for part in arrange(table, console.width):
        if isinstance(part, Table):
            console.print(part)
        else:
            print_wrapped(console, part)


def arrange(table: Table, room: int) -> list[Table | str]:
    """Return a table as tables of some of its columns that fit in `room`, and as lines of text."""
    notes: list[str] = []
    if _outer_width(_full_widths(table)) > room:
        table, notes = _number_long_headings(table)
    groups = _group_columns(_least_widths(table), _key_columns(table), room)
    if groups is None:
        return [*_as_lines(table), *notes]
    return [*(_sized(table, group, room) for group in groups), *notes]


def _key_columns(table: Table) -> int:
    """Return the number of columns before the first one of figures, which name the row; one if there are no figures."""
    figures = [index for index, column in enumerate(table.columns) if column.justify == "right"]
    return figures[0] if figures else 1


def _least_widths(table: Table) -> list[int]:
    """Return the least width of each column in which words and figures stay whole."""
    return [
        max([_longest_word(heading), *map(cell_len if column.justify == "right" else _longest_word, cells)])
        for column, (heading, *cells) in zip(table.columns, _texts(table), strict=True)
    ]


def _full_widths(table: Table) -> list[int]:
    """Return the width of each column without wrapping."""
    return [max(1, *map(cell_len, texts)) for texts in _texts(table)]


def _texts(table: Table) -> list[list[str]]:
    """Return the heading and the cells of each column."""
    return [[str(text) for text in (column.header, *column.cells)] for column in table.columns]


def _longest_word(text: str) -> int:
    return max((cell_len(word) for word in text.split()), default=1)


def _outer_width(widths: Sequence[int]) -> int:
    """Return the width of a table with columns of these widths, with spaces and lines between them."""
    return sum(widths) + 3 * len(widths) + 1


def _number_long_headings(table: Table) -> tuple[Table, list[str]]:
    """Replace headings that have long words, such as paths, by numbers; return also the list of numbered headings."""
    names = [heading for heading, *_ in _texts(table)]
    long = [name for name in names if _longest_word(name) > LONG_HEADING]
    numbers = {name: f"[{number}]" for number, name in enumerate(long, 1)}
    headings = [numbers.get(name, name) for name in names]
    return _select(table, range(len(names)), headings), [f"{number} {name}" for name, number in numbers.items()]


def _group_columns(widths: list[int], keys: int, room: int) -> list[list[int]] | None:
    """Split the columns into tables that each have the first `keys` columns; return None if one does not fit."""
    groups = [list(range(keys))]
    for column in range(keys, len(widths)):
        if _outer_width([widths[index] for index in (*groups[-1], column)]) <= room:
            groups[-1].append(column)
        else:
            groups.append([*range(keys), column])
    fit = all(_outer_width([widths[index] for index in group]) <= room for group in groups)
    return [group for group in groups if len(group) > keys or len(widths) == keys] if fit else None


def _sized(table: Table, columns: Sequence[int], room: int) -> Table:
    """Return a table of some columns that fits in `room`; the widest text columns are narrowed first."""
    part = _select(table, columns)
    least = _least_widths(part)
    widths = _full_widths(part)
    while _outer_width(widths) > room:
        widest = max((i for i, width in enumerate(widths) if width > least[i]), key=lambda i: widths[i])
        widths[widest] -= 1
    for column, width in zip(part.columns, widths, strict=True):
        column.width = width
    return part


def _select(table: Table, columns: Sequence[int], headings: Sequence[str] | None = None) -> Table:
    """Return a table of some columns, with other headings if they are given."""
    texts = [_texts(table)[index] for index in columns]
    part = Table(*(headings or [heading for heading, *_ in texts]))
    for column, index in zip(part.columns, columns, strict=True):
        column.justify = table.columns[index].justify
    for index, row in enumerate(table.rows, 1):
        part.add_row(*(column[index] for column in texts), end_section=row.end_section)
    return part


def _as_lines(table: Table) -> list[str]:
    """Return each row as lines of `heading: cell`, with an empty line after it."""
    headings, *rows = zip(*_texts(table), strict=True)
    lines = []
    for row in rows:
        lines += [f"{heading}: {cell}" if heading else cell for heading, cell in zip(headings, row, strict=True)]
        lines.append("")
    return lines
