"""The quality benchmark at small scale: it uses the same blocks for every method, resumes, and prints one table."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import quality
from benchmarks.baselines import BASELINES


@pytest.fixture
def bench(checkpoint, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "SEQ_LEN", 64)
    (tmp_path / "data").mkdir()
    row = json.dumps({"text": "What is written here is no Python. " * 50})
    (tmp_path / "data" / "c4-sample.jsonl").write_text(f"{row}\n{row}\n", "utf-8")
    rounding = "--head-multiple 2 --mlp-multiple 4"
    subject = quality.Subject("tiny", checkpoint("llama-gqa-tied"), text_file, text_file, 4, rounding)
    plan = quality.Plan(
        shared=tmp_path,
        scratch=tmp_path,
        results=tmp_path / "quality.json",
        device=torch.device("cpu"),
        budgets=(0.25,),
        seeds=(0,),
        blocks=3,
        only=(),
    )
    return quality.Bench(subject, plan)


@pytest.mark.slow
def test_every_method_is_measured_once(bench, monkeypatch):
    results = quality.Cells(bench.plan.results)
    bench.measure_missing(results)
    assert [cell["method"] for cell in results.all] == [*BASELINES, *dict(quality.OURS)]
    for cell in results.all:
        assert cell["removed"] >= 0.25 - 1e-9
        for text in ("own", "other"):
            assert cell[text]["predicted_tokens"] == 3 * 63
            assert cell[text]["kl"] > 0

    # Cells in the file are not measured again; another seed repeats only the methods that depend on the text.
    monkeypatch.setattr(quality.SeedRun, "compress", lambda *_: pytest.fail("measured again"))
    again = quality.Cells(bench.plan.results)
    assert again.all == results.all
    bench.measure_missing(again)
    asked = []
    monkeypatch.setattr(quality.Bench, "cell", lambda self, one, method, budget: asked.append(method) or results.all[0])
    monkeypatch.setattr(quality, "summary", lambda cell: "")
    bench.plan = replace(bench.plan, seeds=(0, 1))
    bench.measure_missing(again)
    assert asked == [method for method in (*BASELINES, *dict(quality.OURS)) if method not in quality.WITHOUT_TEXT]


def made_up(method, seed, increase):
    text = {"perplexity_increase": increase, "source_perplexity": 50.0, "kl": 0.5, "top1_agreement": 0.75}
    key = {"model": "tiny", "budget": 0.25, "seed": seed, "method": method}
    return {**key, "removed": 0.26, "own": text, "other": text}


def test_table(tmp_path):
    cells = [made_up(quality.PAPER, seed, 2.0 + 2 * seed) for seed in (0, 1)]
    cells += [made_up("svd_llm", seed, 1.0 + 3 * seed) for seed in (0, 1)] + [made_up("svd", 0, 6.0)]
    document = tmp_path / "results.md"
    document.write_text("before\n<!-- quality -->\nold\n<!-- end of quality -->\nafter\n", "utf-8")
    quality.write_between(document, "quality", quality.table(cells))
    lines = document.read_text("utf-8").splitlines()
    assert [lines[0], lines[1], lines[-2], lines[-1]] == [
        "before",
        "<!-- quality -->",
        "<!-- end of quality -->",
        "after",
    ]
    assert lines[4] == "| tiny | 0 % | dense, perplexity | yes |  | 50.00 |  |  |  | 50.00 |  |"
    assert lines[5].startswith("| tiny | 25 % | SVD |  | 26.0 % | +6.00 | 3.00 | 0.5000 | 75.0 % | +6.00 | 0.5000 |")
    assert lines[6].startswith("| tiny | 25 % | SVD-LLM |  | 26.0 % | +2.50 ± 2.12 | 0.75 ± 0.35 |")
    assert lines[7].startswith("| tiny | 25 % | a3 paper | yes | 26.0 % | +3.00 ± 1.41 | 1.00 ± 0.00 |")
    assert len({line.count("|") for line in lines[2:8]}) == 1
