"""What is wrong with settings, recipes and manifests is said in plain words: key, value, and what it must be."""

import json
from typing import Literal

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from a3cli.errors import A3Error
from a3cli.report.measured import read_evaluation
from a3cli.settings import CalibrateSettings, ExportSettings, ParetoSettings, PlanSettings, SolveSettings, make_settings
from a3cli.settings.problems import find_problems
from a3cli.stages.recipe import read_recipe
from a3cli.work.manifests import SolutionManifest
from tests.conftest import refused

FOREIGN = ("Input should", "Extra inputs", "Field required", "NoneType", "Value error", "parse string", "None")


def plain_words(message: str) -> str:
    assert not [words for words in FOREIGN if words in message], message
    return message


SETTINGS = {
    "bounds": (SolveSettings, {"budget": 1.5}, "--budget 1.5: must be below 1"),
    "least": (SolveSettings, {"head_multiple": 0}, "--head-multiple 0: must be at least 1"),
    "negative": (SolveSettings, {"ridge": -1.0}, "--ridge -1: must be at least 0"),
    "names": (SolveSettings, {"method": "magic"}, "--method 'magic': must be 'best' or 'paper'"),
    "no number": (SolveSettings, {"budget": "half"}, "--budget 'half': must be a number"),
    "half a size": (SolveSettings, {"min_head": 2.5}, "--min-head 2.5: must be a whole number"),
    "not finite": (SolveSettings, {"budget": float("nan")}, "--budget nan: must be a"),
    "truth": (SolveSettings, {"sequential": "perhaps"}, "--sequential 'perhaps': must be true or false"),
    "none named": (SolveSettings, {"components": ()}, "--components: name at least one of qk, ov, mlp"),
    "in a list": (SolveSettings, {"components": ("qk", "qkv")}, "--components 'qkv': must be 'qk', 'ov' or 'mlp'"),
    "multiple": (PlanSettings, {"model": "m", "head_multiple": 3}, "--head-multiple 3: must be a multiple of 2"),
    "size": (ExportSettings, {"max_shard_size": "5 apples"}, "--max-shard-size '5 apples': must have the form 5GB"),
    "budgets": (ParetoSettings, {"budgets": "all"}, "--budgets 'all': must have the form 0.1:0.5:0.05 or 0.1,0.25,0.4"),
    "nested": (
        CalibrateSettings,
        {"model": "m", "text": {"dataset": "d", "samples": 0, "seq_len": 1}},
        "--samples 0: must be at least 1; --seq-len 1: must be at least 2",
    ),
    **{
        f"auto or {value!r}": (
            CalibrateSettings,
            {"model": "m", "text": {"dataset": "d"}, "batch_size": value},
            f"--batch-size {shown}: must be a whole number of at least 1, or auto",
        )
        for value, shown in (("some", "'some'"), (2.5, "2.5"), (True, "true"), ("1.5", "'1.5'"))
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name):
    kind, values, words = SETTINGS[name]
    with pytest.raises(A3Error) as refusal:
        make_settings(kind, **values)
    assert plain_words(str(refusal.value)).startswith(f"bad settings: {words}")


@pytest.fixture
def recipe(tmp_path):
    """A recipe with other entries, read; the message of the error."""

    def read(**changed) -> str:
        text = {"dataset": "t.txt"}
        content = {"work": "w", "out": "o", "calibrate": {"model": "m", "text": text}, "solve": {"budget": 0.1}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(content | changed))
        with pytest.raises(A3Error) as refusal:
            read_recipe(tmp_path / "r.yaml")
        return plain_words(str(refusal.value)).partition("r.yaml: ")[2]

    return read


def test_a_mistyped_key_of_a_recipe_is_recognised(recipe):
    assert recipe(solve={"budgett": 0.2}) == "solve.budgett: unknown key; did you mean budget?"
    assert recipe(slove={}) == "slove: unknown key; did you mean solve?"
    assert recipe(evla={}) == "evla: unknown key; did you mean eval?"
    text = {"dataset": "t.txt", "seqlen": 4}
    assert recipe(calibrate={"model": "m", "text": text}) == "calibrate.text.seqlen: unknown key; did you mean seq_len?"
    assert recipe(eval={"texts": [{"datset": "t.txt"}]}) == (
        "eval.texts.0.dataset is missing; eval.texts.0.datset: unknown key; did you mean dataset?"
    )
    assert recipe(verify={"dtyp": "float32"}) == "verify.dtyp: unknown key; did you mean dtype?"
    assert recipe(extra=1) == "extra: unknown key; known are work, out, calibrate, solve, export, verify, eval, report"


def test_other_problems_of_a_recipe(recipe):
    assert recipe(calibrate={"model": "m"}) == "calibrate.text is missing"
    assert recipe(calibrate=None) == "calibrate null: must be a mapping of keys to values"
    assert recipe(solve=[1]) == "solve: must be a mapping of keys to values"
    assert recipe(verify=5) == "verify 5: must be a mapping of keys to values or false"
    assert recipe(verify={"dtype": "int4"}).startswith("verify.dtype 'int4': must be 'auto', 'float32'")
    assert recipe(solve={"budget": "x" * 99}).startswith("solve.budget 'xxxx")
    assert len(recipe(solve={"budget": "x" * 9999})) < 120
    text = {"dataset": "t.txt"}
    assert recipe(calibrate={"model": "m", "text": text, "batch_size": "all"}) == (
        "calibrate.batch_size 'all': must be a whole number of at least 1, or auto"
    )


def test_manifests(work):
    path = work / "solution" / "manifest.json"
    sound = json.loads(path.read_text())

    def message(**changed) -> str:
        with pytest.raises(A3Error) as refusal:
            SolutionManifest.parse(sound | changed, path, "run a3 solve --overwrite")
        return plain_words(str(refusal.value)).partition("of this version of a3 ")[2]

    assert message(context="long") == "(context 'long': must be a whole number); run a3 solve --overwrite"
    assert message(contxt=1).startswith("(contxt: unknown key; did you mean context?)")
    assert message(bytes={"before": 1, "after": 0}).startswith("(bytes.after 0: must be at least 1)")
    assert message(layers=["x"]).startswith("(layers.0 'x': must have the form ^blake3:")
    assert message(rope_slots=[-1.0]).startswith("(rope_slots.0 ")


def test_files_of_figures(tmp_path):
    path = tmp_path / "eval.json"
    for content, words in (({}, "(dataset is missing)"), ([1], "holds a list, not a JSON object")):
        path.write_text(json.dumps(content))
        with pytest.raises(A3Error) as refusal:
            read_evaluation(path)
        assert words in plain_words(str(refusal.value))
    path.write_text("null")
    with pytest.raises(A3Error, match="holds nothing"):
        read_evaluation(path)


def test_rows_without_text(a3, checkpoint, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": 5}\n')
    refused(a3("eval", checkpoint("llama-gqa"), "--dataset", tmp_path / "t.jsonl"), "'text' holds a number, not text")


def test_an_error_that_has_no_sentence_keeps_its_words():
    class Odd(BaseModel):
        when: Literal[1] | bytes

    with pytest.raises(ValidationError) as refusal:
        Odd(when={})
    (problem,) = find_problems(refusal.value, Odd)
    assert problem.describe() == "when: must be 1 or Input should be a valid bytes"
