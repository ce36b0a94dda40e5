"""The comparison on a real model, at small scale: equal blocks, equal removal, resumable, and its page."""

import json
import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from a3cli.work.folder import Work
from benchmarks import real, real_page, stages
from benchmarks.baselines import Calibration
from benchmarks.quality import load
from benchmarks.results import Cells
from benchmarks.stages import measured
from tests.conftest import ROOT

CPU = torch.device("cpu")
POSITIONS = (1, 32, 128)


@pytest.fixture
def run(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    """Run the benchmark on a tiny model with further options; return its cells and the page's tables.

    Stages run in this process; a test of its own starts one.
    """
    monkeypatch.setattr(real, "in_child", measured)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own stay
    for module in (real, real_page):
        monkeypatch.setattr(module, "POSITIONS", POSITIONS)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"Row {n} is no Python. " * 40}) + "\n" for n in range(12)), "utf-8")
    written = tmp_path / "page.md"
    model = checkpoint("llama-gqa-tied")
    written.write_text(f"before\n<!-- {model.name} -->\n\n<!-- end of {model.name} -->\nafter\n", "utf-8")
    sizes = ["--samples", "4", "--seq-len", "32", "--eval-blocks", "2", "--long-blocks", "2", "--budgets", "0.25"]

    def call(*options):
        texts = ("--texts", f"code={text_file}:{text_file}", f"other={other}")
        files = ("--cells", tmp_path / "cells.jsonl", "--write", written)
        monkeypatch.setattr(sys, "argv", ["real.py", *map(str, (model, *files, *texts, *sizes, *options))])
        real.main()
        assert capsys.readouterr().out.strip() in written.read_text("utf-8")
        return Cells(tmp_path / "cells.jsonl").all, written.read_text("utf-8")

    return call


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_every_kind_of_method_gets_the_same_blocks_of_a_mixture(run, tmp_path, monkeypatch):
    seen = {}

    def spy(name, function):
        def compress(calibration, budget):
            seen[name] = calibration.tokens
            return function(calibration, budget)

        return compress

    for name in (real.PUBLISHED, "slicegpt"):
        monkeypatch.setitem(real.ALL_BASELINES, name, spy(name, real.ALL_BASELINES[name]))
    options = ("--calibrations", "mixture", "--methods", "published,a3-paper,slicegpt")
    cells, _ = run(*options)
    measured = [cell for cell in cells if "method" in cell]
    assert [cell["method"] for cell in measured] == ["published", "a3-paper", "slicegpt"]
    tokens = calibrated_tokens(tmp_path, "mixture")
    assert all(torch.equal(each, tokens) for each in seen.values())
    assert len(seen) == 2
    for cell in measured:
        assert cell["removed"] >= 0.25 - 1e-9
        assert set(cell["texts"]) == {"code", "other"}
        for figures in cell["texts"].values():
            assert figures["predicted_tokens"] == 2 * 31
            assert figures["kl"] > 0
        assert len(cell["long"]["model"]) == len(POSITIONS) - 1
        assert all(stage["seconds"] > 0 and stage["peak"] > 1e7 for stage in cell["stages"].values())
    assert [set(cell["stages"]) for cell in measured] == [{"whole"}, {"solve", "export"}, {"whole"}]
    assert [cell["stage"] for cell in cells if "stage" in cell] == ["calibrate", "statistics"]


def test_figures_are_those_of_the_compressed_model(run, checkpoint, tmp_path, text_file, monkeypatch):
    """The kept answers, the kept second moments and the removal give what a plain computation in one process does."""
    options = ("--calibrations", "code", "--methods", "published")
    cells, page = run(*options)
    cell = next(cell for cell in cells if "method" in cell)
    source = load(checkpoint("llama-gqa-tied"), CPU)
    tokens = calibrated_tokens(tmp_path, "code")
    result = real.published(Calibration(source, tokens), 0.25)
    assert cell["removed"] == result.removed
    blocks = torch.stack(
        plan_of(checkpoint("llama-gqa-tied"), text_file, tmp_path).blocks(
            real.RealText("code", text_file, text_file), length=32, most=2
        )
    )
    with torch.no_grad():
        log_p, log_q = (model(blocks).logits[:, :-1].double().log_softmax(-1) for model in (result.model, source))
        losses = [-each.gather(-1, blocks[:, 1:, None]).mean() for each in (log_p, log_q)]
    figures = cell["texts"]["code"]
    assert figures["perplexity"] == pytest.approx(losses[0].exp().item(), rel=1e-4)
    assert figures["source_perplexity"] == pytest.approx(losses[1].exp().item(), rel=1e-4)
    assert figures["kl"] == pytest.approx((log_q.exp() * (log_q - log_p)).sum(-1).mean().item(), rel=1e-3)
    assert figures["top1_agreement"] == (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()

    # What is in the file is not measured again, and the page is the same.
    monkeypatch.setattr(real, "in_child", lambda *_: pytest.fail("measured again"))
    again, same = run(*options)
    assert again == cells
    assert same == page
    assert "Everything that the command asks for is measured." in page
    assert f"--cells {tmp_path / 'cells.jsonl'}" in page


def calibrated_tokens(folder, calibration):
    return load_file(Work(folder / "cells.work" / f"{calibration}-0-4x32").tokens)["tokens"]


def plan_of(model, text, folder):
    return real.Plan(model, (real.RealText("code", text, text),), folder, 4, 32, 2, 0)


def test_it_stops_between_cells_and_says_what_is_missing(run):
    options = ("--calibrations", "code", "--methods", "modegpt_mlp,svd_llm")
    cells, page = run(*options, "--max-minutes", "0")
    assert [cell for cell in cells if "method" in cell] == []
    assert "Not measured yet:\n\n- loss by position\n- code, 25 %, seed 0: every method\n" in page
    run("--calibrations", "code", "--methods", "modegpt_mlp")
    _, page = run(*options, "--only-write")
    assert "Not measured yet:\n\n- code, 25 %, seed 0: SVD-LLM\n" in page
    assert "--only-write" not in page


def test_a_stage_runs_in_a_process_of_its_own():
    """Its peak is its own: this process has more."""
    ballast = torch.ones(100_000_000)
    seconds, cost = stages.in_child(stages.cost_since, 0.0, 0.0)
    assert cost.seconds >= 0
    assert 0 < cost.peak < stages.peak_memory() - ballast.nbytes / 2
    assert seconds.peak <= cost.peak


def test_a_stage_that_fails_says_so():
    with pytest.raises(ValueError, match="invalid literal"):
        stages.in_child(int, "five")
    with pytest.raises(RuntimeError, match="_exit: its process ended with exit code 7"):
        stages.in_child(os._exit, 7)


def test_an_interrupt_ends_the_stage():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            stages.in_child(time.sleep, 600)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert multiprocessing.active_children() == []


def made_up(method, increase, seed=0, **more):
    text = {"perplexity_increase": increase, "source_perplexity": 30.0, "kl": 0.25, "top1_agreement": 0.75}
    texts = {"wikitext": text, "c4": {**text, "perplexity_increase": 3 * increase}}
    key = {"method": method, "calibration": "wikitext", "budget": 0.1, "seed": seed}
    sizes = {"samples": 32, "seq_len": 512, "eval_blocks": 12, "removed": 0.1003}
    long = {"source": [3.0] * 5, "model": [3.0 + increase / 10] * 5}
    stage = {"whole": {"seconds": 12.4, "cpu_seconds": 8.0, "peak": 2_000_000_000}}
    return {**key, **sizes, "texts": texts, "long": long, "stages": stage, **more}


def test_page():
    cells = [made_up("published", 4.0), made_up("published", 2.0, seed=1), made_up("svd_llm", 6.0)]
    cells += [made_up("a3-best", 1.0), made_up("a3-best", 1.0, seed=1)]
    cells.append(made_up("modegpt", 1.0, budget=0.2))  # not asked for
    cells.append(
        {"calibration": "wikitext", "seed": 0, "stage": "calibrate", "seconds": 5, "cpu_seconds": 4, "peak": 6e8}
    )
    wanted = [
        {"method": method, "calibration": "wikitext", "budget": 0.1, "seed": seed}
        for method in ("published", "a3-best", "svd_llm", "slicegpt")
        for seed in (0, 1)
    ]
    lines = real_page.page(cells, wanted, "python real.py").splitlines()
    assert lines[:3] == ["```", "python real.py", "```"]
    rows = [line for line in lines if line.startswith("| 10 %")]
    assert rows[0].startswith(
        "| 10 % | paper as published | nothing | 10.03 % | +3.00 ± 1.41 | 0.250 ± 0.000 | 75.0 ± 0.0 % |"
    )
    assert rows[0].endswith("| 1.00 ± 0.00 | 1.00 ± 0.00 | 1.00 ± 0.00 |")
    assert rows[1].startswith("| 10 % | `a3` | stock | 10.03 % | +1.00 ± 0.00 |")
    assert "| +3.00 ± 0.00 |" in rows[1]
    assert rows[1].endswith("| 0.38 ± 0.18 | 0.38 ± 0.18 | 0.38 ± 0.18 |")
    assert rows[2].startswith("| 10 % | SVD-LLM | own code | 10.03 % | +6.00 |")
    assert rows[2].endswith("| 1.50 | 1.50 | 1.50 |")
    assert rows[5] == "| 10 % | SVD-LLM | +0.600 | +0.600 | +0.600 | +0.600 | +0.600 |"
    assert rows[8] == "| 10 % | SVD-LLM | whole | 12 | 8 | 2.0 |"
    assert "|  | every `a3` | calibrate | 5 | 4 | 0.6 |" in lines
    assert lines[-2:] == [
        "- wikitext, 10 %, seed 0: SliceGPT",
        "- wikitext, 10 %, seed 1: SVD-LLM; SliceGPT",
    ]
    assert "MoDeGPT" not in "\n".join(lines)


def test_texts(tmp_path):
    sources = tmp_path / "lib"
    for name in ("a.py", "b/c.py", "d.py", "site-packages/e.py", "tests/f.py"):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_text(f"# {name}\n")
    whole = tmp_path / "rows.txt"
    whole.write_text("1\n2\n3\n4\n")
    code, rows, both = real.read_texts(
        [f"code={sources}", f"rows={whole}", f"both={whole}:{sources}"], tmp_path / "work"
    )
    assert [code.calibration.read_text(), code.evaluation.read_text()] == ["# a.py\n\n# d.py\n", "# b/c.py\n"]
    assert [rows.calibration.read_text(), rows.evaluation.read_text()] == ["1\n2\n", "3\n4\n"]
    assert (both.name, both.calibration, both.evaluation) == ("both", whole, sources)
    with pytest.raises(SystemExit, match="write NAME="):
        real.read_texts([str(whole)], tmp_path)
    with pytest.raises(SystemExit, match=r"there is no .*absent"):
        real.read_texts([f"rows={tmp_path / 'absent'}"], tmp_path)


def test_the_page_has_markers_for_each_model():
    page = (ROOT / "docs" / "real_models.md").read_text("utf-8")
    assert page.count("<!-- smollm2-135m -->") == page.count("<!-- end of smollm2-135m -->") == 1
