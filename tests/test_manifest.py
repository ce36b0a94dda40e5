"""a3_manifest.json against its published schema, the card that is made from it, and reproducible exports."""

import copy
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from a3cli.calibrate import describe_request
from a3cli.card import calibrate_commands, export_command, public_dataset, public_request, solve_command
from a3cli.checkpoint import resolve_model
from a3cli.errors import A3Error
from a3cli.machine import choose_machine
from a3cli.manifest import SCHEMA_ID, schema
from a3cli.settings import CalibrateSettings, ExportSettings, SolveSettings, TextSettings
from tests.conftest import refused, snapshot
from tests.test_report import EVALUATION

pytestmark = pytest.mark.usefixtures("hasty")

SCHEMA = Path(__file__).resolve().parents[1] / "docs" / SCHEMA_ID
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
    for layer in manifest["solution"]["per_layer"]:  # fewer numbers to look at, for speed
        layer["curves"] = {name: {"size": [8], "loss": [0.0]} for name in layer["curves"]}
    VALIDATOR.validate(manifest)
    assert [path for path, changed in mutations(manifest) if VALIDATOR.is_valid(changed)] == []


def mutations(manifest):
    """Each object of the manifest with a field more; each required field missing, of another type, or absurd."""
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
    """Settings have defaults, files any name, and a shape or method its own fields."""
    inside = {"settings", "text", "damping", *OPEN} & {name for name in path[:-1] if isinstance(name, str)}
    return bool(inside) or path[-1] in ("head_dim", "intermediate_size", "in_full")


OPEN = {"files", "shards", "tokenizer", "text_files"}  # any file names; their hashes are checked


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
    )  # it came after the calibration
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
    for name in ("README.md", "a3_manifest.json"):  # nobody else has these folders
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
    """Run the same calibration again: it takes the small files as they are now."""
    text = ("--dataset", text_file, "--samples", 3, "--seq-len", 32)
    assert a3("calibrate", source, *text, "--work", work).code == 0


PROBED = (
    ("--seed", 3, "--samples", 4, "--batch-size", 2, "--dtype", "bfloat16", "--full-check"),
    (
        "--attention-budget", 0.2, "--mlp-budget", 0.3, "--head-multiple", 4, "--mlp-multiple", 4, "--context", 128,
        "--ridge", 1e-3, "--sensitivity", "probe", "--probe-blocks", 2, "--probe-points", 2, "--dtype", "float32",
        "--sequential", "--refit-rounds", 1, "--batch-size", 2,
    ),
    ("--dtype", "bfloat16", "--max-shard-size", "100KB"),
)  # fmt: skip


@pytest.mark.parametrize("probed", [False, True], ids=["plain", "probed"])
def test_the_commands_of_a_card_give_the_same_bytes(probed, a3, work, source, text_file, tmp_path, monkeypatch):
    calibrating, solving, exporting = PROBED if probed else ((), (), ())
    if probed:
        text = ("--dataset", text_file, "--seq-len", 32, "--overwrite")
        assert a3("calibrate", source, *text, *calibrating, "--work", work).code == 0
        assert a3("solve", *solving, "--work", work).code == 0
    assert a3("export", tmp_path / "out", *exporting, "--work", work).code == 0
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    commands = re.findall(r"^a3 (.+)$", card, re.M)
    assert [line.split()[0] for line in commands] == ["calibrate", "solve", "export"]
    place = tmp_path / "again"
    place.mkdir()
    monkeypatch.chdir(place)
    shutil.copytree(source, "source")
    shutil.copy(text_file, "text.txt")
    for line in commands:
        assert a3(*line.replace("OUT", "out").split()).code == 0
    ours, theirs = (json.loads((folder / "out" / "a3_manifest.json").read_text()) for folder in (tmp_path, place))
    assert ours["solution"]["request"]["settings"] == theirs["solution"]["request"]["settings"]
    for name in {*ours["files"], *theirs["files"]} - {"README.md"}:
        assert (place / "out" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


# What has no option, changes nothing in what is made, or is not kept.
UNSAID = {
    CalibrateSettings: {"devices", "hidden_states", "num_processes"},
    SolveSettings: {"eigenvalue_floor", "num_processes"},
    ExportSettings: {"overwrite", "num_processes", "full_check", "check_reproducible", "evaluations"},
    TextSettings: set(),
}


def test_the_commands_have_every_option_that_was_given(a3, source, monkeypatch):
    text = TextSettings(
        dataset="chats.jsonl", text_field="messages", split="some", chat=True, samples=7, seq_len=33, seed=4
    )
    calibrating = CalibrateSettings(
        model="source", revision="0123abc", text=text, device="cpu", dtype="bfloat16", batch_size=2,
        mlp_stats="diagonal", full_check=True, trust_remote_code=True,
    )  # fmt: skip
    solving = SolveSettings(
        budget=0.2, attention_budget=0.1, mlp_budget=0.3, method="paper", shape="per-layer", context=200,
        components=("qk", "mlp"), head_multiple=4, mlp_multiple=16, min_head=6, min_mlp=24, ridge=1e-3,
        sensitivity="probe", probe_blocks=3, probe_points=5, sequential=True, refit_rounds=1,
        device="cpu", dtype="bfloat16", batch_size=2,
    )  # fmt: skip
    exporting = ExportSettings(dtype="float16", max_shard_size=12345)
    for given in (text, calibrating, solving, exporting):
        for name, field in type(given).model_fields.items():
            assert name in UNSAID[type(given)] or getattr(given, name) != field.default, f"{name} is not tried"
    checkpoint = resolve_model(str(source))
    request = describe_request(calibrating, checkpoint, choose_machine("cpu", "bfloat16", checkpoint.dtype))
    commands = {
        "calibrate": (calibrating, *calibrate_commands("source", "0123abc", request)),
        "solve": (solving, solve_command(solving.model_dump(mode="json"))),
        "export": (exporting, export_command(exporting.model_dump(mode="json"))),
    }
    for stage, (given, line) in commands.items():
        seen = []
        monkeypatch.setattr(f"a3cli.{stage}.{stage}", stopping_with(seen))
        assert a3(*shlex.split(line)[1:]).code == 2
        assert [each for each in seen if isinstance(each, type(given))] == [given]


def stopping_with(seen):
    def stage(*arguments, **options):
        seen.extend(arguments)
        raise A3Error("that will do")

    return stage


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
    from a3cli import export

    assert a3("export", tmp_path / "out", "--check-reproducible", "--work", work).code == 0
    assert not (work / ".scratch").exists()
    before = snapshot(tmp_path)
    plain, calls = export.converted, []

    def drifting(*given):
        calls.append(given)
        return plain(*given) + len(calls) * 1e-6

    monkeypatch.setattr(export, "converted", drifting)
    outcome = a3("export", tmp_path / "new", "--check-reproducible", "--work", work)
    assert outcome.code == 1
    assert "differ in model.safetensors" in outcome.stderr
    assert snapshot(tmp_path) == before
