"""Printed text is plain: names without markup, emoji or control characters, and JSON without NaN."""

import json
import logging

import pytest

from a3cli.cli import display
from a3cli.cli.console import print_json, set_up_logging
from a3cli.cli.progress import sweep_progress

EVIL = "a\x1b[31m:cat:[b]evil"
SEEN = r"a\x1b[31m:cat:[b]evil"


@pytest.mark.parametrize("name", ["o[final]", "x[/y]", "a:cat:b"])
def test_places_are_printed_as_they_are(name, a3, work, tmp_path):
    exported = a3("export", tmp_path / name, "--work", work, "--quiet")
    assert (exported.code, exported.stdout.splitlines()[-1]) == (0, str(tmp_path / name))
    html = (tmp_path / name).with_suffix(".html")
    reported = a3("report", work, "--html", html)
    assert (reported.code, reported.stdout.splitlines()[-1]) == (0, str(html))
    assert str(tmp_path / name) in a3("inspect", tmp_path / name).stdout
    missing = a3("inspect", tmp_path / f"{name}.missing")
    assert str(tmp_path / f"{name}.missing") in missing.stderr


def test_tables_of_names(capsys):
    figures = {
        "dataset": EVIL,
        "perplexity": 2.0,
        "gates": [{"gate": "kl > 1", "failed": True, "value": 2, "limit": 1}],
    }
    display.print_evaluation({"datasets": [figures], "tasks": {"model": {EVIL: {EVIL: 0.5}}}})
    display.print_verification({"checks": [{"name": "files", "outcome": "failed", "detail": f"unknown: {EVIL}"}]})
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert shown.count(SEEN) == 5


def test_log_lines_of_names(capsys):
    set_up_logging()
    logging.getLogger("a3cli").warning("%s is made again", EVIL)
    assert capsys.readouterr().err == f"warning: {SEEN} is made again\n"


def test_json_has_no_nan(capsys):
    print_json({"a": float("nan"), "b": [float("inf"), {"c": (-float("inf"), 1.5, True, None, "NaN")}]})
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"a": None, "b": [None, {"c": [None, 1.5, True, None, "NaN"]}]}


def test_progress_counts_layers_from_one(capsys):
    set_up_logging()
    with sweep_progress(quiet=True) as progress:
        progress(layer=2, layers=5, tokens=8, total_tokens=8)
    assert capsys.readouterr().err.startswith("layer 3 of 5: 8/8 tokens, ")
