"""Every command on terminals of several sizes: it works and shows its whole result, with no figure or word cut."""

import json
import re
import shutil
from collections import Counter
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from a3cli.cli.console import break_lines
from a3cli.cli.tables import arrange
from tests.conftest import SHORT, SOLVE
from tests.helpers.commands import COMMANDS, RECIPE, chain, commands_of
from tests.helpers.terminals import Shown, Terminal, run_all

XTERM = "xterm-256color"
TERMINALS = [
    Terminal(XTERM, 80, 24),
    pytest.param(Terminal(XTERM, 200, 50), marks=pytest.mark.slow),
    pytest.param(Terminal("dumb", 80, 24), marks=pytest.mark.slow),
]
LONG = "a-folder-with-quite-a-long-name-for-the-text-that-is-measured"  # 60 columns
PROBE = ("--method", "paper", "--sensitivity", "probe", "--probe-points", 1, "--probe-blocks", 1)
FRAME = re.compile("[━─│┃┏┓┗┛┡┩┠┨┯┷┿╇╈┳┻╋┼├┤┬┴└┘┌┐╭╮╰╯]")
TIMES = re.compile(r"layer \d+ of \d+: .* left|tokens per second.*|/\S+/terminal\d+")


@pytest.fixture(scope="module")
def commands() -> dict[str, tuple[object, ...]]:
    """Return the commands by name, in the order in which they run; file names are relative to the current folder."""
    text = f"{LONG}/text.txt"
    plain = {name: (*name.split(), *words) for name, words in chain("source", text, Path()).items()}
    more = ("calibrate", "source", "--dataset", text, *SHORT, "--seed", 1, "--work", "more")
    long = {
        "several data sets": (*plain["eval"], "--dataset", "text.txt", "--dataset", f"{LONG}/other.txt"),
        "measured points": (*plain["pareto"], "--dataset", "text.txt", "--samples", 1, "--seq-len", 32),
        "a work folder": ("inspect", "work"),
        "a work folder as JSON": ("inspect", "work", "--json"),
        "sequential": (*SOLVE, "--method", "paper", "--sequential", "--work", "more"),
        "probed": (*SOLVE, *PROBE, "--overwrite", "--work", "more"),
        "a failure": ("inspect", f"{LONG}/{LONG}/{LONG}"),
        "a bad option": ("solve", "--no-such-option"),
    }  # fmt: skip
    return {"more": more, **plain, **long}


@pytest.fixture(scope="module")
def shown(commands, checkpoint, text_file, tmp_path_factory):
    """Run each command once per terminal and return what it shows; without a terminal, what it prints to a file."""
    known: dict[Terminal | None, dict[str, Shown]] = {}

    def show(terminal: Terminal | None) -> dict[str, Shown]:
        if terminal not in known:
            folder = tmp_path_factory.mktemp("terminal")
            shutil.copytree(checkpoint("llama-gqa"), folder / "source")
            (folder / LONG).mkdir()
            for name in ("text.txt", f"{LONG}/text.txt", f"{LONG}/other.txt"):
                shutil.copyfile(text_file, folder / name)
            (folder / "recipe.yaml").write_text(RECIPE.format(folder=".", source="./source", text="./text.txt"))
            found = run_all(list(commands.values()), folder, terminal)
            known[terminal] = dict(zip(commands, found, strict=True))
        return known[terminal]

    return show


def whole_words(text: str) -> Counter[str]:
    """Count the words between spaces and table lines, except times."""
    return Counter(FRAME.sub(" ", TIMES.sub("", text)).split())


def on_terminals(function):
    return pytest.mark.parametrize("terminal", TERMINALS, ids=lambda each: f"{each.name}-{each.columns}")(function)


@on_terminals
def test_every_command_shows_its_whole_result(terminal, shown, commands):
    assert set(COMMANDS) <= set(commands)
    plain = shown(None)
    for name, found in shown(terminal).items():
        assert found.code == plain[name].code == (2 if name in ("a failure", "a bad option") else 0), found
        assert "Traceback" not in found.text
        assert "…" not in found.text
        if name.endswith("JSON"):
            assert json.loads(TIMES.sub("", found.text)) == json.loads(TIMES.sub("", plain[name].text))
            continue
        assert not whole_words(plain[name].text) - whole_words(found.text), (name, found.text)
        for line in found.lines:
            # Lines with a file name and error lines may exceed the width, so that the name can be copied.
            assert cell_len(line) <= terminal.columns or LONG in line or line.startswith("error: "), (name, line)


@on_terminals
def test_a_sweep_has_a_bar_where_it_can_be_drawn(terminal, shown):
    for name in ("calibrate", "run", "sequential", "probed"):
        found = shown(terminal)[name]
        bar = re.search(r"layer 2 of 2 ━+ [\d,]+ tokens/s \d:\d\d:\d\d left 0:00:00", found.text)
        assert bool(bar) is (terminal.name != "dumb"), found.text
        assert ("\x1b" in found.raw) is (terminal.name != "dumb")
    assert "left" not in shown(terminal)["pareto"].text  # no sweep is running


@on_terminals
def test_help_shows_every_option_and_every_word(terminal, command_line, tmp_path):
    helps = [(), *((name,) for name in command_line.commands), ("stats", "merge")]
    found = run_all([(*words, "--help") for words in helps], tmp_path, terminal)
    for words, each in zip(helps, found, strict=True):
        assert each.code == 0
        assert "…" not in each.text
        assert max(map(cell_len, each.lines)) <= terminal.columns
        command = commands_of(command_line).get(" ".join(words))
        for parameter in command.params if command else []:
            names = parameter.opts if parameter.param_type_name == "option" else []
            assert not Counter([*names, *(parameter.help or "").split()]) - whole_words(each.text), parameter.name


WORDS = st.text("ab-/.", min_size=1, max_size=30)
TEXTS = st.lists(WORDS, max_size=4).map(" ".join)


@st.composite
def tables(draw) -> Table:
    """Draw a table: columns of text, then columns of figures, with headings and cells of any length."""
    of_text, of_figures = draw(st.integers(1, 3)), draw(st.integers(0, 6))
    table = Table(*(draw(TEXTS) for _ in range(of_text + of_figures)))
    for column in table.columns[of_text:]:
        column.justify = "right"
    for _ in range(draw(st.integers(0, 4))):
        table.add_row(*(draw(TEXTS) for _ in table.columns))
    return table


@given(tables(), st.integers(10, 120))
def test_a_table_of_any_width_is_shown_whole(table, width):
    parts = arrange(table, width)
    console = Console(width=10_000, file=StringIO())
    for part in parts:
        console.print(part, markup=False, emoji=False, highlight=False)
    printed = console.file.getvalue().replace(": ", " ")
    in_tables = [part for part in parts if isinstance(part, Table)]
    assert all(console.measure(part).maximum <= width for part in in_tables)
    cells = [str(text) for column in table.columns for text in column.cells]
    headings = [str(column.header) for column in table.columns if in_tables or table.rows]
    assert not whole_words(" ".join((*cells, *headings))) - whole_words(printed)
    if in_tables:
        figures = [cell for column in table.columns if column.justify == "right" for cell in column.cells]
        assert all(figure in printed for figure in figures)


@given(st.lists(WORDS, max_size=30).map(" ".join), st.integers(1, 60))
def test_lines_are_broken_between_words_only(text, width):
    lines = break_lines(text, width).split("\n")
    assert " ".join(lines) == text
    assert all(cell_len(line) <= width or " " not in line for line in lines)
    for line, following in pairwise(lines):
        assert cell_len(f"{line} {following.split(' ')[0]}") > width
