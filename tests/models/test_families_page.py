"""docs/families.md says what the definitions of the families and the rules for runtimes say today."""

import importlib.util
from typing import Any

import pytest

from a3cli.models.families import FAMILIES
from a3cli.runtimes.rules import RULES
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "families.md"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("families_page", ROOT / "scripts" / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script):
    assert PAGE.read_text("utf-8") == script.page(), "run python scripts/families.py"


def test_every_family_has_a_row_for_each_shape(script):
    rows = [row.split(" | ") for row in script.compressed()][2:]
    assert len(rows) == 2 * len(FAMILIES)
    for shape, row in zip(["stock", "per-layer"] * len(FAMILIES), rows, strict=True):
        assert row[1] == shape
        kept = {*row[3:6]} - {"exact", "refined"}
        assert bool(kept) == bool(row[6].strip(" |")), "a reason where a component keeps its size"


def test_every_form_has_a_verdict_of_each_runtime(script):
    head, _, *rows = [row for row in script.loading() if row.startswith("|")]
    assert head == f"| model type | export | {' | '.join(RULES)} |"
    assert {row.count("|") for row in rows} == {head.count("|")}
    assert sum("per-layer" in row for row in rows) == len(FAMILIES)


def test_how_is_what_the_solvers_do(script):
    """A norm on heads leaves no map of queries and keys; RoPE leaves no closed form, and without it there is one."""
    llama, qwen3, gemma3, olmo2, opt = (FAMILIES[name] for name in ("llama", "qwen3", "gemma3_text", "olmo2", "opt"))
    assert [script.how(opt, part, "stock") for part in ("qk", "ov", "mlp")] == ["no", "no", "exact"]
    assert [script.how(opt, part, "per-layer") for part in ("qk", "ov", "mlp")] == ["exact"] * 3
    assert [script.how(llama, part, "stock") for part in ("qk", "ov", "mlp")] == ["refined", "exact", "exact"]
    for family in (qwen3, gemma3):
        found = [[script.how(family, part, shape) for part in ("qk", "ov", "mlp")] for shape in ("stock", "per-layer")]
        assert found == [["refined, if asked", "exact, if asked", "exact"], ["refined, if asked", "exact", "exact"]]
    assert [script.how(olmo2, part, "stock") for part in ("qk", "ov", "mlp")] == ["no", "no", "exact"]
    assert [script.how(olmo2, part, "per-layer") for part in ("qk", "ov", "mlp")] == ["no", "exact", "exact"]
