"""The comparison without RoPE at small scale: each method has the rank, and each is best at what it minimises."""

import pytest
import torch

from a3cli.solvers.linalg import JointDecomposition
from a3cli.solvers.qk import solve_qk
from benchmarks import no_rope
from tests.conftest import build_model

METHODS = {"theorem": no_rope.theorem, **no_rope.BASELINES}


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    """Give the script the sizes of the table's models."""
    for name, value in {"HEADS": 4, "HEAD": 16, "HIDDEN": 64, "LAYERS": 2}.items():
        monkeypatch.setattr(no_rope, name, value)


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(400, 64, generator=generator).double() @ torch.randn(64, 64, generator=generator).double()


def reduced(form, part: str, rank: int, theorem: JointDecomposition | None = None) -> tuple[torch.Tensor, ...]:
    """Return both matrices of the first layer's heads, whole and reduced."""
    block = build_model("mpt-mha").transformer.blocks[0]
    before = [each.clone() for each in no_rope.Heads(block, part).read()]
    form(no_rope.Heads(block, part, theorem), rank)
    return (*before, *no_rope.Heads(block, part).read())


def solution(x: torch.Tensor) -> JointDecomposition:
    queries, keys = no_rope.Heads(build_model("mpt-mha").transformer.blocks[0], "qk").read()
    grams = (weight @ (x.T @ x / len(x)) @ weight.mT for weight in (queries, keys))
    return solve_qk(*grams, floor=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_every_head_has_the_rank(method, x):
    *_, first, second = reduced(METHODS[method], "qk", 6, solution(x))
    if method == "svd":  # of all heads together
        assert [torch.linalg.matrix_rank(each.flatten(0, 1), rtol=1e-5) for each in (first, second)] == [24, 24]
    else:
        assert torch.linalg.matrix_rank(first.mT @ second, rtol=1e-5).tolist() == [6] * 4


@pytest.mark.parametrize("part", ["qk", "ov"])
@pytest.mark.parametrize("method", no_rope.BASELINES)
def test_the_full_rank_changes_nothing(method, part):
    first, second, *found = reduced(METHODS[method], part, 16)
    torch.testing.assert_close(found[0].mT @ found[1], first.mT @ second, rtol=1e-4, atol=1e-4)


def test_the_theorem_is_best_for_scores_and_clover_for_weights(x):
    scores, weights = {}, {}
    for name, form in METHODS.items():
        first, second, *found = reduced(form, "qk", 6, solution(x))
        difference = found[0].mT @ found[1] - first.mT @ second
        scores[name] = (x @ difference @ x.T).square().mean().item()
        weights[name] = difference.square().sum().item()
    per_head = {name for name in METHODS if name != "svd"}  # which shares its rank among the heads
    assert min(per_head, key=lambda name: scores[name]) == "theorem"
    assert min(per_head, key=lambda name: weights[name]) == "clover"


def test_every_cell_of_the_cache_has_the_asked_for_bytes():
    ranks = sorted({rank for part, _, rank in no_rope.wanted() if part == "kv"}, reverse=True)
    for budget, rank in zip(no_rope.BUDGETS, ranks, strict=True):
        assert 1 - rank / no_rope.HEAD >= budget


@pytest.mark.slow
def test_the_whole_comparison(checkpoint, text_file, tmp_path, monkeypatch, capsys, hasty):
    for name, value in {"RANKS": (8,), "BUDGETS": (0.6,), "CONTEXT": 64}.items():
        monkeypatch.setattr(no_rope, name, value)
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {part} -->\n\n<!-- end of {part} -->\n" for part in ("qk", "ov", "kv", "source")))
    texts = ("--training", text_file, "--evaluation", text_file, "--folder", tmp_path / "bench")
    options = ("--seeds", "0", "--steps", 2, "--samples", 6, "--blocks", 8, "--write", page)
    command = ["no_rope.py", checkpoint("mpt-mha"), *texts, *options]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    no_rope.main()
    written, printed = page.read_text(), capsys.readouterr().out
    for method in (no_rope.THEOREM, no_rope.CENTRED, no_rope.OURS, no_rope.PUBLISHED, *no_rope.LABELS):
        assert f"| {method} | " in written
    monkeypatch.setattr(no_rope, "Bench", lambda *_: pytest.fail("measured again"))
    no_rope.main()
    assert capsys.readouterr().out == printed
    assert page.read_text() == written
