"""a3_manifest.json matches its published schema, the card is made from it, and exports are reproducible."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from a3cli.report.manifest import SCHEMA_ID, schema
from a3cli.report.names import public_dataset, public_request
from tests.conftest import ROOT, refused, snapshot
from tests.helpers.evaluation import EVALUATION

pytestmark = pytest.mark.usefixtures("hasty")

SCHEMA = ROOT / "docs" / SCHEMA_ID
VALIDATOR = Draft202012Validator(json.loads(SCHEMA.read_text("utf-8")))


@pytest.fixture(params=["stock", "per-layer", "paper", "sequential"])
def out(request, a3, work, tmp_path) -> Path:
    options = {
        "stock": ("--budget", 0.25),
        "per-layer": ("--budget", 0.3, "--shape", "per-layer"),
        "paper": ("--attention-budget", 0.2, "--mlp-budget", 0.3, "--method", "paper"),
        "sequential": ("--budget", 0.2, "--components", "mlp", "--sequential"),
    }[request.param]
    multiples = ("--head-multiple", 2, "--mlp-multiple", 8, "--overwrite", "--work", work)
    assert a3("solve", *options, *multiples).code == 0
    assert a3("export", tmp_path / "out", "--work", work).code == 0
    return tmp_path / "out"


def test_the_published_schema_is_the_one_that_a3_reads_by():
    Draft202012Validator.check_schema(schema())
    assert json.loads(SCHEMA.read_text("utf-8")) == schema(), "run python scripts/manifest_schema.py"


def test_exports_are_valid_and_mutations_are_not(out):
    manifest = json.loads((out / "a3_manifest.json").read_text())
    VALIDATOR.validate(manifest)
    for layer in manifest["solution"]["per_layer"]:  # fewer numbers, for speed
        layer["curves"] = {name: {"size": [8], "loss": [0.0]} for name in layer["curves"]}
    VALIDATOR.validate(manifest)
    assert [path for path, changed in mutations(manifest) if VALIDATOR.is_valid(changed)] == []


def mutations(manifest):
    """Yield manifests with a field added to each object, or a required field removed, of another type, or absurd."""
    for path in paths(manifest):
        for damage in ("gone", "type", "extra", "absurd"):
            changed = copy.deepcopy(manifest)
            parent, key = walk(changed, path[:-1]), path[-1]
            value = parent[key]
            if damage == "gone" and not may_be_gone(path):
                del parent[key]
            elif damage == "type":
                parent[key] = {"value": value} if not isinstance(value, dict) else "object"
            elif damage == "extra" and isinstance(value, dict) and key not in OPEN:
                value["unknown"] = 1
            elif damage == "absurd" and isinstance(value, int | float) and not isinstance(value, bool):
                parent[key] = -1
            else:
                continue
            yield (*path, damage), changed


def may_be_gone(path):
    """Return whether the schema allows this entry to be missing."""
    inside = {"settings", "text", "damping", *OPEN} & {name for name in path[:-1] if isinstance(name, str)}
    return bool(inside) or path[-1] in ("head_dim", "intermediate_size", "in_full", "measured_loss", "kv_cache")


OPEN = {"files", "shards", "tokenizer", "text_files"}  # any file name is allowed; the hashes are checked


def paths(value, before=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, dict | str | int | float) and not (
                inner is None or key in ("eigenvalue_floor", "ridge")
            ):
                yield (*before, key)
            if before[-1:] not in (("files",), ("shards",), ("tokenizer",)):
                yield from paths(inner, (*before, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from paths(value[0], (*before, 0))


def walk(value, path):
    for key in path:
        value = value[key]
    return value


def test_inspect_refuses_a_mutated_manifest(a3, out):
    path = out / "a3_manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["solution"]["sizes"]
    path.write_text(json.dumps(manifest))
    refused(a3("inspect", out), "a3_manifest.json", "solution.sizes")


def test_the_card_says_how_it_was_made(a3, work, source, text_file, tmp_path):
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Source\n")
    (tmp_path / "eval.json").write_text(json.dumps(EVALUATION))
    refused(
        a3("export", tmp_path / "out", "--work", work), "README.md", "a3 calibrate"
    )  # it was added after the calibration
    shutil.copy(source / "README.md", tmp_path / "card")
    record(a3, work, source, text_file)
    options = ("--eval", tmp_path / "eval.json", "--max-shard-size", "100KB")
    assert a3("export", tmp_path / "out", *options, "--work", work).code == 0
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    for words in (
        "Base model: `source`", "Licence: mit", "`--method best --shape stock`", "`text.txt`", "96 tokens",
        "| `out.txt`, blocks of 64 | 10.000 | 12.500 | 0.0321 | 87.5% |", "--max-shard-size 100000",
        "a3 calibrate source --dataset text.txt", "--samples 3 --seq-len 32", "a3 solve --budget 0.25",
        "--mlp-multiple 8",
    ):  # fmt: skip
        assert words in card, words
    manifest = json.loads((tmp_path / "out" / "a3_manifest.json").read_text())
    VALIDATOR.validate(manifest)
    assert manifest["measured"][0]["kl"] == EVALUATION["kl"]
    assert manifest["calibration"]["request"]["text"]["dataset"] == "text.txt"
    for name in ("README.md", "a3_manifest.json"):  # only these contain the paths of the folders
        assert "/" + str(tmp_path).split("/")[1] + "/" not in (tmp_path / "out" / name).read_text("utf-8"), name


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ("wikitext2", "wikitext2"),
        ("allenai/c4:en", "allenai/c4:en"),
        ("/data/secret/train.txt", "train.txt"),
        ("texts/train.jsonl", "train.jsonl"),
        ("../corpus", "corpus"),
        ("/data/corpus/", "corpus"),
    ],
)
def test_data_sets_by_the_name_that_others_know(dataset, said):
    assert public_dataset(dataset) == said
    request = {"text": {"dataset": dataset}, "merged": [{"text": {"dataset": dataset}}]}
    assert public_request(request) == {"text": {"dataset": said}, "merged": [{"text": {"dataset": said}}]}


def test_a_folder_that_looks_like_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_dataset("some/texts") == "some/texts"
    Path("some", "texts").mkdir(parents=True)
    assert public_dataset("some/texts") == "texts"


def record(a3, work, source, text_file):
    """Run the same calibration again, which records the small files as they are now."""
    text = ("--dataset", text_file, "--samples", 3, "--seq-len", 32)
    assert a3("calibrate", source, *text, "--work", work).code == 0


def test_names_in_a_card_are_escaped(a3, checkpoint, text_file, tmp_path):
    name = "a`b\n# Title\n<script>alert(1)<|x|>\x1b[31m\u202e"
    source = Path(shutil.copytree(checkpoint("llama-gqa"), tmp_path / name))
    (source / "README.md").write_text('---\nlicense: "mit\\n# Title <script>"\n---\n')
    text = tmp_path / "te`xt\n```\n# Title.txt"
    text.write_bytes(text_file.read_bytes())
    work = ("--work", tmp_path / "work")
    assert a3("calibrate", source, "--dataset", text, "--samples", 2, "--seq-len", 32, *work).code == 0
    assert a3("solve", "--budget", 0.2, "--mlp-multiple", 8, *work).code == 0
    assert a3("export", tmp_path / "out", *work).code == 0
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", card)
    body = card.split("---\n", 2)[2]
    assert len(re.findall(r"^# ", body, re.M)) == 1
    outside_code = re.sub(r"````.*?````|`[^`\n]*`", "", body, flags=re.S)
    assert "<script>" not in outside_code.replace(r"\<script\>", "")


def test_reproducible_exports(a3, work, tmp_path, monkeypatch):
    from a3cli.stages import weights

    assert a3("export", tmp_path / "out", "--check-reproducible", "--work", work).code == 0
    assert not (work / ".scratch").exists()
    before = snapshot(tmp_path)
    plain, calls = weights.convert, []

    def drifting(*given):
        calls.append(given)
        return plain(*given) + len(calls) * 1e-6

    monkeypatch.setattr(weights, "convert", drifting)
    outcome = a3("export", tmp_path / "new", "--check-reproducible", "--work", work)
    assert outcome.code == 1
    assert "differ in model.safetensors" in outcome.stderr
    assert snapshot(tmp_path) == before
