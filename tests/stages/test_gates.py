"""Quality gates of `a3 eval`: syntax, verdicts, intervals, several data sets, JUnit, tasks."""

import importlib.util
import json
import math
import re
from xml.etree import ElementTree

import pytest
import torch

from a3cli.errors import CheckFailed
from a3cli.settings.gates import parse_gate, raise_for_failures
from a3cli.stages.evaluate import bootstrap, describe_sums
from tests.conftest import refused

pytestmark = pytest.mark.usefixtures("hasty")

TEXT = ("--samples", 4, "--seq-len", 48)


@pytest.mark.parametrize(
    ("text", "key", "value", "failed"),
    [
        ("perplexity > 10", "perplexity", 10.5, True),
        ("perplexity > 10", "perplexity", 10.0, False),
        ("perplexity>=10", "perplexity", 10.0, True),
        ("ppl_increase > 5%", "perplexity_increase_percent", 5.1, True),
        ("ppl_increase > 5", "perplexity_increase", 4.9, False),
        ("  kl <= .1 ", "kl", 0.1, True),
        ("top1_agreement < 0.9", "top1_agreement", 0.89, True),
        ("top1_agreement < 9e-1", "top1_agreement", 0.91, False),
        ("kl > -1", "kl", 0.0, True),
        ("kl > 0.1", "kl", math.nan, True),
        ("top1_agreement < 0.9", "top1_agreement", math.inf, True),
    ],
)
def test_gates_say_when_a_model_fails(text, key, value, failed):
    gate = parse_gate(text)
    assert gate.judge({key: value})["failed"] == failed


@pytest.mark.parametrize(
    "text",
    ["", "kl", "kl > ", "> 0.1", "kl = 0.1", "kl == 0.1", "KL > 0.1", "loss > 1", "kl > 5%", "kl > 1 > 2", "kl > nan",
     "kl > 0x1", "kl > 1e999", "perplexity increase > 1", "kl > 0.1; kl > 0.2", "kl >> 1"],
)  # fmt: skip
def test_anything_else_is_refused_with_the_names(text, a3, checkpoint, text_file):
    with pytest.raises(ValueError, match=r"metrics are perplexity, ppl_increase, kl, top1_agreement|ppl_inc|too large"):
        parse_gate(text)


def test_bad_gates_are_refused_together_before_any_work(a3, checkpoint):
    outcome = a3("eval", "nowhere", "--fail-if", "loss > 1", "--fail-if", "kl > 5%", "--bootstrap", -1)
    assert outcome.code == 2
    (line,) = outcome.stderr.splitlines()
    for word in ("--fail-if 'loss > 1'", "perplexity, ppl_increase, kl, top1_agreement", "'kl > 5%'", "--bootstrap"):
        assert word in line
    alone = a3("eval", "nowhere", "--fail-if", "kl > 1")
    assert alone.code == 2
    assert "--against" in alone.stderr


def test_failures_say_which_where_and_by_how_much():
    figures = {"perplexity_increase_percent": 7.31, "kl": 0.05, "top1_agreement": 0.85}
    gates = [parse_gate(text) for text in ("ppl_increase > 5%", "kl > 0.1", "top1_agreement < 0.9")]
    judged = [{"dataset": name, "gates": [gate.judge(figures) for gate in gates]} for name in ("one", "two")]
    with pytest.raises(CheckFailed) as failure:
        raise_for_failures(judged)
    assert str(failure.value) == (
        "4 gates failed: ppl_increase > 5%: 7.31 %, 2.31 % above the limit on one; "
        "top1_agreement < 0.9: 0.85, 0.05 below the limit on one; "
        "ppl_increase > 5%: 7.31 %, 2.31 % above the limit on two; "
        "top1_agreement < 0.9: 0.85, 0.05 below the limit on two"
    )
    raise_for_failures([{"dataset": "one"}])


def test_gates_apply_to_each_data_set_through_the_command_line(a3, checkpoint, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("".join(chr(33 + i * i % 90) for i in range(300)))
    model, source, junit = checkpoint("llama-gqa", seed=1), checkpoint("llama-gqa"), tmp_path / "report.xml"
    command = ("eval", model, "--against", source, "--dataset", text_file, "--dataset", other, *TEXT, "--junit", junit)
    measured = a3(*command, "--json").json["datasets"]
    assert [each["dataset"] for each in measured] == [str(text_file), str(other)]
    between = sum(each["kl"] for each in measured) / 2  # fails on one of the two
    worse, better = sorted(measured, key=lambda each: -each["kl"])
    assert worse["kl"] > better["kl"]

    outcome = a3(*command, "--fail-if", f"kl > {between}", "--fail-if", "perplexity > 1e9", "--json")
    assert outcome.code == 1
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        f"error: 1 gate failed: kl > {between}: {worse['kl']:.4g}, {worse['kl'] - between:.4g} above"
    )
    assert line.endswith(f"on {worse['dataset']}")
    assert [g["failed"] for each in outcome.json["datasets"] for g in each["gates"]].count(True) == 1
    root = ElementTree.parse(junit).getroot()
    assert root.find("testsuite").attrib | {"tests": "4", "failures": "1"} == root.find("testsuite").attrib
    (failed,) = [case for case in root.iter("testcase") if case.find("failure") is not None]
    assert failed.get("classname") == worse["dataset"]

    shown = a3(*command, "--fail-if", "kl < 0")
    assert shown.code == 0
    assert shown.stdout.count("passed") == 2
    assert other.name in shown.stdout


def test_one_data_set_keeps_its_figures_at_the_top(a3, checkpoint, text_file):
    source = checkpoint("llama-gqa")
    result = a3("eval", source, "--dataset", text_file, *TEXT, "--json").json
    assert result["datasets"] == [{key: result[key] for key in result["datasets"][0]}]
    assert result["perplexity"] > 1
    assert "kl" not in result


def test_intervals_are_the_literal_bootstrap_of_blocks():
    generator = torch.Generator().manual_seed(3)
    count = torch.full((40, 1), 10.0, dtype=torch.float64)
    sums = torch.cat([count, 30 * torch.rand(40, 4, generator=generator, dtype=torch.float64)], 1)
    found = bootstrap(sums, resamples=2000, seed=1)
    assert found == bootstrap(sums, resamples=2000, seed=1)
    assert found["kl"] != bootstrap(sums, resamples=2000, seed=2)["kl"]
    generator = torch.Generator().manual_seed(7)
    literal = []
    for _ in range(2000):
        rows = [sums[i].tolist() for i in torch.randint(40, (40,), generator=generator).tolist()]
        predicted = sum(row[0] for row in rows)
        literal.append(math.exp(sum(row[1] for row in rows) / predicted))
    literal.sort()
    for ours, theirs in zip(found["perplexity"], (literal[50], literal[1949]), strict=True):
        assert ours == pytest.approx(theirs, rel=0.04)
    assert found["perplexity"][0] < describe_sums(sums)["perplexity"] < found["perplexity"][1]
    assert bootstrap(sums[:1], resamples=10, seed=0)["kl"] is None


def test_intervals_cover_what_they_should():
    """About 95 % of the intervals of 200 samples of 30 blocks contain the true mean."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for trial in range(200):
        blocks = torch.ones(30, 5, dtype=torch.float64)
        blocks[:, 3] = 0.3 + 0.1 * torch.randn(30, generator=generator, dtype=torch.float64)
        low, high = bootstrap(blocks, resamples=200, seed=trial)["kl"]
        held += low < 0.3 < high
    assert 0.88 < held / 200 < 0.99


def test_bad_places_for_junit_are_refused_before_any_work(a3, tmp_path):
    for place in (tmp_path, tmp_path / "no" / "report.xml"):
        outcome = a3("eval", "nowhere", "--junit", place)
        assert outcome.code == 2
        assert "--junit" in outcome.stderr


def test_junit_holds_names_that_xml_cannot(tmp_path):
    from a3cli.report.junit import Case, write_junit

    write_junit(tmp_path / "r.xml", "suite", [Case("a\x00<b>&", "\x1b[31mred", "skipped", "why\x07 \ud800")])
    case = ElementTree.parse(tmp_path / "r.xml").getroot().find("testsuite/testcase")
    assert case.get("classname") == "a�<b>&"
    assert case.find("skipped").get("message") == "why� �"


@pytest.fixture
def own_tasks(tmp_path):
    """Return a folder with one multiple-choice task on a local file, in the harness's own format."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"def f{i}(x):", "choices": [" return", "£££", "@@"], "answer": 0} for i in range(10)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "own.yaml").write_text(
        f"""task: own_task
dataset_path: json
dataset_kwargs: {{data_files: {folder / "rows.jsonl"}}}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return folder


class NoTasks:
    def __init__(self, **options):
        pass

    def match_tasks(self, names):
        return []


def literal_accuracy(folder, rows) -> float:
    """Return the accuracy of choosing the likeliest choice, computed literally."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in rows:
        scores = []
        context = tokenizer(row["question"])["input_ids"]
        for choice in row["choices"]:
            ids = tokenizer(choice)["input_ids"]
            with torch.no_grad():
                log_p = model(torch.tensor([context + ids])).logits[0].log_softmax(-1)
            scores.append(sum(log_p[len(context) + i - 1, token].item() for i, token in enumerate(ids)))
        right += max(range(3), key=scores.__getitem__) == row["answer"]
    return right / len(rows)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra a3cli[lm-eval] is not installed")
@pytest.mark.filterwarnings("ignore")
def test_tasks_of_the_harness_run_offline(a3, checkpoint, own_tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model, source = checkpoint("llama-gqa", seed=1), checkpoint("llama-gqa")
    command = ("eval", model, "--against", source, "--tasks", "own_task", "--tasks-path", own_tasks)
    outcome = a3(*command, "--junit", tmp_path / "r.xml", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr.count("\n") == 2, outcome.stderr  # one line per model, and no bars
    assert outcome.json["datasets"] == []
    rows = [json.loads(line) for line in (own_tasks / "rows.jsonl").read_text().splitlines()]
    for which, folder in (("model", model), ("against", source)):
        found = outcome.json["tasks"][which]["own_task"]
        assert found["documents"] == 10
        assert found["acc"] == pytest.approx(literal_accuracy(folder, rows))
    assert ElementTree.parse(tmp_path / "r.xml").getroot().find("testsuite/testcase").get("name") == "own_task"
    shown = a3("eval", model, "--tasks", "own_task", "--tasks-path", own_tasks, "--task-limit", 3)
    assert re.search(r"own_task *│ *documents *│ *3 │", shown.stdout), shown
    monkeypatch.setattr("lm_eval.tasks.TaskManager", NoTasks)  # listing the harness's tasks takes ten seconds
    unknown = a3("eval", model, "--tasks", "own_task,no_such_task", "--tasks-path", own_tasks)
    assert unknown.code == 2
    assert "own_task, no_such_task" in unknown.stderr


def test_without_the_harness_the_extra_is_named(a3, checkpoint, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    outcome = a3("eval", checkpoint("llama-gqa"), "--tasks", "boolq")
    assert outcome.code == 2
    assert "a3cli[lm-eval]" in outcome.stderr


def test_a_text_field_for_each_data_set(a3, checkpoint, text_file, tmp_path):
    text = text_file.read_text("utf-8")[:4000]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, field in zip(files, ("body", "content"), strict=True):
        file.write_text(json.dumps({field: text}) + "\n", "utf-8")
    command = ("eval", checkpoint("llama-gqa"), "--dataset", files[0], "--dataset", files[1], *TEXT, "--json")
    found = a3(*command, "--text-field", "body", "--text-field", "content")
    assert found.code == 0, found
    first, second = found.json["datasets"]
    assert first["perplexity"] == second["perplexity"]
    refused(a3(*command, "--text-field", "body"), "b.jsonl", "body")
    refused(a3(*command, *("--text-field", "body") * 3), "--text-field was given 3 times for 2 data sets")
    refused(a3(*command, "--split", "a", "--split", "b", "--split", "c"), "--split was given 3 times for 2 data sets")
