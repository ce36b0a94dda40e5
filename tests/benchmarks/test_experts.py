"""The benchmark of models with experts: what magnitude pruning keeps, and that the comparison is complete."""

import sys
from types import ModuleType

import pytest
import torch

from tests.conftest import ROOT, VOCABULARY, build_model, build_tokenizer


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    before = list(sys.path)
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import experts

        return experts
    finally:
        sys.path[:] = before


def test_magnitude_keeps_the_channels_with_the_largest_weights(benchmark):
    model, pruned = build_model("mixtral-gqa"), build_model("mixtral-gqa")
    benchmark.prune_by_magnitude(pruned, 40)
    for layer, small in zip(model.model.layers, pruned.model.layers, strict=True):
        for gate_up, down, left in zip(
            layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, small.mlp.experts.down_proj, strict=True
        ):
            size = gate_up.square().sum(1).view(2, -1).sum(0) + down.square().sum(0)
            kept = left.abs().sum(0) > 0
            assert kept.sum() == 40
            assert size[kept].min() > size[~kept].max()
            assert torch.equal(left[:, kept], down[:, kept])


@pytest.mark.slow
def test_every_budget_has_a_row(benchmark, text_file, tmp_path):
    build_model("mixtral-gqa", intermediate_size=128).save_pretrained(tmp_path / "source")
    build_tokenizer().save_pretrained(tmp_path / "source")
    tokens = torch.randint(VOCABULARY, (600,))
    rows = benchmark.compare(tmp_path / "source", text_file, tokens, 3, tmp_path)
    assert len(rows) == len(benchmark.BUDGETS)
    assert {row.count("|") for row in rows} == {len(benchmark.HEADER) + 1}
