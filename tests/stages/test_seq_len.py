"""Tokens per block by default: 2048, or the model's context if it is shorter; every record has the number."""

import json

import pytest
import yaml

from a3cli.settings import CalibrateSettings
from a3cli.settings.seq_len import USUAL_SEQ_LEN, resolved_seq_len
from a3cli.work.manifests import CalibrationManifest
from tests.conftest import CONTEXT, refused

ONE = ("--samples", 1)


@pytest.mark.parametrize(
    ("seq_len", "context", "tokens"),
    [
        (None, 512, 512),
        (None, 131072, USUAL_SEQ_LEN),
        (None, None, USUAL_SEQ_LEN),
        (None, "many", USUAL_SEQ_LEN),
        (64, 512, 64),
        (1024, 512, 1024),  # refused later, by name
    ],
)
def test_the_default_is_at_most_the_context(seq_len, context, tokens):
    assert resolved_seq_len(seq_len, context) == tokens


def test_calibrate_records_the_number(a3, checkpoint, text_file, tmp_path):
    work = tmp_path / "work"
    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *ONE, "--work", work, "--json")
    found = a3(*command).json
    assert found["request"]["text"]["seq_len"] == CONTEXT
    assert found["blocks"] == [1, CONTEXT]
    assert a3(*command, "--seq-len", CONTEXT).json == found  # the same request
    manifest = work / "calibration" / "manifest.json"
    CalibrationManifest.read(manifest, "")
    unresolved = json.loads(manifest.read_text())
    unresolved["request"]["text"]["seq_len"] = None
    with pytest.raises(Exception, match="seq_len"):
        CalibrationManifest.model_validate(unresolved)


def test_settings_stay_as_they_were_given(checkpoint):
    settings = CalibrateSettings(model="m", text={"dataset": "wikitext2"})
    resolved = settings.text.for_context(CONTEXT)
    assert (settings.text.seq_len, resolved.seq_len) == (None, CONTEXT)
    with pytest.raises(AssertionError, match="seq_len"):
        _ = settings.text.block_tokens


def test_plan_and_eval_run_without_it(a3, checkpoint, text_file):
    source = checkpoint("llama-gqa")
    sizes = ("--head-multiple", 2, "--mlp-multiple", 8)
    assert a3("plan", source, *sizes, "--json").json["prefill_flops_per_token"]["seq_len"] == CONTEXT
    found = a3("eval", source, "--dataset", text_file, *ONE, "--json").json
    assert (found["seq_len"], found["tokens"]) == (CONTEXT, CONTEXT)


def test_two_models_are_compared_within_the_shorter_context(a3, checkpoint, text_file):
    source, longer = checkpoint("llama-gqa"), checkpoint("llama-gqa", max_position_embeddings=2 * CONTEXT)
    for models in ((source, "--against", longer), (longer, "--against", source)):
        assert a3("eval", *models, "--dataset", text_file, *ONE, "--json").json["seq_len"] == CONTEXT


@pytest.mark.usefixtures("hasty")
def test_pareto_measures_without_it(a3, work, text_file, monkeypatch):
    measured = []

    def measure(settings, text, *_):
        measured.append(text.seq_len)
        return {"perplexity": 2.0, "source_perplexity": 1.0, "perplexity_increase": 1.0, "kl": 0.1} | {
            "top1_agreement": 1.0,
            "text_files": {},
            "text_read": {"whole": False},
        }

    monkeypatch.setattr("a3cli.stages.pareto.measure", measure)
    sizes = ("--head-multiple", 2, "--mlp-multiple", 8)
    assert a3("pareto", "--budgets", "0.2", *sizes, "--dataset", text_file, *ONE, "--work", work, "--json").code == 0
    assert set(measured) == {CONTEXT}


def test_a_recipe_without_it_records_it(a3, checkpoint, text_file, tmp_path):
    text = {"dataset": str(text_file), "samples": 1}
    recipe = {
        "work": "work",
        "out": "out",
        "calibrate": {"model": str(checkpoint("llama-gqa")), "text": text},
        "solve": {"budget": 0.25, "method": "paper", "head_multiple": 2, "mlp_multiple": 8},
        "verify": False,
        "eval": {"text": text},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = a3("run", tmp_path / "recipe.yaml", "--json").json
    assert found["calibrate"]["request"]["text"]["seq_len"] == found["eval"]["seq_len"] == CONTEXT
    evaluation = json.loads((tmp_path / "work" / "evaluation.json").read_text())
    assert [each["seq_len"] for each in evaluation["request"]["settings"]["texts"]] == [CONTEXT]
    assert f"--seq-len {CONTEXT}" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert a3("run", tmp_path / "recipe.yaml", "--json").json == found


def test_longer_than_the_context_is_refused(a3, checkpoint, text_file, tmp_path):
    source, long = checkpoint("llama-gqa"), ("--seq-len", CONTEXT + 1)
    text = ("--dataset", text_file, *ONE)
    for command in (("plan", source), ("eval", source, *text), ("calibrate", source, *text, "--work", tmp_path / "w")):
        refused(a3(*command, *long), f"--seq-len {CONTEXT + 1}", f"({CONTEXT})", "lower it")


def test_help_says_so(a3, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for command in ("calibrate", "eval", "plan", "pareto"):
        assert "Tokens per block (default: 2048, or the context if shorter)." in a3(command, "--help").stdout, command
