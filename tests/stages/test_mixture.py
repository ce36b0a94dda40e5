"""Mixtures of calibration text: their blocks, what is recorded of them, and every stage that reads the record."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import a3cli
from a3cli.settings import CalibrateSettings
from a3cli.settings.keywords import settings_from
from a3cli.stages.probe import probed_blocks
from a3cli.stages.recipe import read_recipe
from a3cli.work.manifests import CalibrationRequest
from tests.conftest import ROOT, SOLVE, but, refused, snapshot
from tests.helpers.statistics import assert_close

pytestmark = pytest.mark.usefixtures("hasty")

CUT = ("--samples", 6, "--seq-len", 32, "--seed", 3, "--batch-size", 2)
BLOCKS = {"a.txt": 3, "rows.jsonl": 2, "chats.jsonl": 1}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
MIXED = ("--dataset", "a.txt:0.5", "--dataset", "rows.jsonl:0.3", "--dataset", "chats.jsonl:0.2")


@pytest.fixture
def folder(checkpoint, text_file, tmp_path, monkeypatch) -> Path:
    """The current folder, with `source`, whose tokenizer has a chat template, and the texts."""
    content = text_file.read_text("utf-8")
    shutil.copytree(checkpoint("llama-gqa"), tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "a.txt").write_text(content[:3000], "utf-8")
    rows = [{"text": content[start : start + 300]} for start in range(3000, 6000, 300)] + [{"text": None}]
    chats = [{"messages": [{"role": "user", "content": content[6000 + 50 * i :][:50]}]} for i in range(20)]
    for name, written in (("rows.jsonl", rows), ("chats.jsonl", chats)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in written))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tokens(work: str) -> torch.Tensor:
    return load_file(Path(work, "calibration", "tokens.safetensors"))["tokens"]


def test_a_mixture_equals_the_merged_calibrations_of_its_texts(a3, folder):
    """Blocks are the same, in the same order; sums up to rounding."""
    assert a3("calibrate", "source", *MIXED, *CUT, "--work", "mixed").code == 0
    for name, samples in BLOCKS.items():
        options = but(CUT, "--samples", samples)
        assert a3("calibrate", "source", "--dataset", name, *options, "--work", f"of-{name}").code == 0
    assert a3("stats", "merge", *(f"of-{name}" for name in BLOCKS), "--into", "merged").code == 0
    assert torch.equal(tokens("mixed"), tokens("merged"))
    assert_close([Path("merged"), Path("mixed")])


def test_all_stages_run_from_a_mixture(a3, folder):
    made = a3("calibrate", "source", *MIXED, *CUT, "--json")
    assert made.code == 0, made
    assert "dataset chats.jsonl: no field 'text'; its 'messages' go through the chat template" in made.stderr
    request = made.json["request"]
    assert request["text"]["dataset"] == "a.txt + rows.jsonl + chats.jsonl"
    parts = {part["text"]["dataset"]: part for part in request["mixture"]}
    assert {name: part["text"]["samples"] for name, part in parts.items()} == BLOCKS
    assert [part["weight"] for part in parts.values()] == [0.5, 0.3, 0.2]
    assert [list(part["text_files"]) for part in parts.values()] == [[name] for name in BLOCKS]
    assert parts["rows.jsonl"]["text_read"] == {"rows": 11, "skipped": 1, "whole": True}
    assert made.json["text_read"] == {"rows": 31, "skipped": 1, "whole": True}
    said = "a.txt (3 blocks) and rows.jsonl (2 blocks; 11 rows, 1 without text skipped) and chats.jsonl (1 block; 20"
    assert said in " ".join(a3("inspect").stdout.split())
    probed = ("--sensitivity", "probe", "--probe-blocks", 3, "--probe-points", 1, "--sequential", "--refit-rounds", 0)
    assert a3(*SOLVE, *probed).code == 0
    assert a3("export", "out").code == 0
    checked = a3("verify", "out", "--json")
    assert checked.code == 0, checked
    assert checked.json["passed"]
    card = Path("out", "README.md").read_text("utf-8")
    assert "`rows.jsonl` (2 blocks; 11 rows, 1 without text skipped)" in " ".join(card.split())
    assert "--dataset a.txt:0.5 --dataset rows.jsonl:0.3 --dataset chats.jsonl:0.2" in card
    assert "rows.jsonl (2 blocks" in a3("inspect", "out").stdout
    for place in ("a3-work", "out"):
        assert a3("report", place, "--html", "page.html").code == 0
        page = Path("page.html").read_text("utf-8")
        assert "a.txt (3 blocks) and rows.jsonl (2 blocks" in page
        assert "--dataset chats.jsonl:0.2" in page


@pytest.mark.slow
def test_a_sweep_over_budgets_from_a_mixture(a3, folder):
    made = a3("calibrate", "source", *MIXED, *CUT, "--json").json
    points = ("--budgets", "0.2", "--head-multiple", 2, "--mlp-multiple", 8, "--sensitivity", "probe")
    assert a3("pareto", *points, "--json").json["calibration"] == made["sha256"]


def test_the_same_mixture_is_finished_and_another_is_refused(a3, folder, monkeypatch):
    command = ("calibrate", "source", *CUT, "--json")
    first = a3(*command, *MIXED).json
    assert a3(*command, *MIXED, "--overwrite").json["tokens_hash"] == first["tokens_hash"]
    first = a3(*command, *MIXED).json
    (folder / "elsewhere").mkdir()
    shutil.copy("a.txt", "elsewhere/copy.txt")
    with monkeypatch.context() as patch:
        patch.setattr("a3cli.stages.calibrate.sample_blocks", pytest.fail)
        for name in ("./a.txt", "elsewhere/copy.txt"):  # only what was read counts; weights are relative
            texts = ("--dataset", f"{name}:5", "--dataset", "rows.jsonl:3", "--dataset", "chats.jsonl:2.0")
            assert a3(*command, *texts).json == first
        refused(a3(*command, *MIXED[:-1], "chats.jsonl:0.3"), "differs in mixture (weight)", "--overwrite")
        refused(a3(*command, *MIXED[2:4], *MIXED[:2], *MIXED[4:]), "differs in mixture (")
        assert a3(*command, *MIXED, "--text-field", "text").json == first  # the default
        refused(a3(*command, *MIXED, "--chat"), "differs in mixture (chat, text_field)")
        refused(a3(*command, "--dataset", "a.txt"), "differs in", "mixture")
        refused(a3(*command, "--dataset", "a.txt:1", "--dataset", "rows.jsonl:1"), "differs in mixture (")
        (folder / "rows.jsonl").write_text('{"text": "changed"}\n')
        refused(a3(*command, *MIXED), "differs in mixture (rows.jsonl)")
        (folder / "chats.jsonl").unlink()
        refused(a3(*command, *MIXED), "'chats.jsonl': no such file or folder")


def test_an_unfinished_mixture_resumes(a3, folder, monkeypatch):
    from a3cli.cli.progress import SweepProgress

    plain = SweepProgress.__call__

    def interrupting(self, **at):
        plain(self, **at)
        if at.get("layer") == 1:
            raise KeyboardInterrupt

    command = ("calibrate", "source", *MIXED, *CUT)
    with monkeypatch.context() as patch:
        patch.setattr(SweepProgress, "__call__", interrupting)
        assert a3(*command).code == 3
    assert "rows.jsonl (2 blocks" in a3("inspect").stdout
    with monkeypatch.context() as patch:
        patch.setattr("a3cli.stages.calibrate.sample_blocks", pytest.fail)
        ended = a3(*command)
    assert ended.code == 0, ended
    assert "resuming at layer 2 of 2" in ended.stderr
    assert a3(*command, "--work", "whole").code == 0
    assert snapshot(Path("whole")) == snapshot(Path("a3-work"))


def test_sets_without_weights_share_alike(a3, folder):
    texts = [word for word in MIXED if word == "--dataset"]
    shared = [word for pair in zip(texts, BLOCKS, strict=True) for word in pair]
    parts = a3("calibrate", "source", *shared, *but(CUT, "--samples", 7), "--json").json["request"]["mixture"]
    assert [part["text"]["samples"] for part in parts] == [3, 2, 2]
    assert [part["weight"] for part in parts] == [1, 1, 1]


def test_one_set_with_a_weight_is_no_mixture(a3, folder):
    for number, name in enumerate(("a.txt", "a.txt:0.5")):
        assert a3("calibrate", "source", "--dataset", name, *CUT, "--work", number).code == 0
    assert snapshot(Path("0")) == snapshot(Path("1"))
    assert "mixture" not in Path("0", "calibration", "manifest.json").read_text()


def test_mixtures_that_cannot_be(a3, folder):
    command = ("calibrate", "source", *CUT)
    one, two = ("--dataset", "a.txt:1"), ("--dataset", "rows.jsonl")
    cases = {
        (*one, *two): ("some data sets have a weight, but rows.jsonl has none", "give each one a weight, or none"),
        (*one, "--dataset", "rows.jsonl:0"): ("--dataset rows.jsonl:0: the weight is 0",),
        (*one, "--dataset", "none.jsonl:1"): ("'none.jsonl': no such file or folder",),
        (*one, "--dataset", "./a.txt:1"): ("./a.txt is given twice",),
        (*MIXED, "--samples", 2): ("--samples 2 is too small for a mixture of 3 data sets", "--samples 3"),
        (*MIXED, "--samples", 400): ("dataset a.txt: too little text", "200 were asked for"),
        (*MIXED, "--text-field", "a", "--text-field", "b"): ("2 times for 3 data sets",),
        (*MIXED, "--split", "train"): ("leave out --split",),
        (*one, "--dataset", "owner/name:1"): ("dataset owner/name: HF_HUB_OFFLINE=1", "give --dataset FILE"),
    }
    for changed, words in cases.items():
        options = [word for word in command if "--samples" not in changed or word not in ("--samples", 6)]
        refused(a3(*options, *changed), *words)
    assert not (folder / "a3-work").exists()


def test_a_mixture_is_checked_offline_before_any_text_is_read(a3, folder, monkeypatch):
    monkeypatch.setattr("a3cli.stages.calibrate.sample_blocks", pytest.fail)
    refused(a3("calibrate", "source", *CUT, "--dataset", "a.txt", "--dataset", "c4"), "dataset c4", "--dataset FILE")


def test_every_set_is_looked_for_on_the_hub_before_any_text_is_read(a3, folder, monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    asked = []

    def missing(self, name, **options):
        asked.append(name)
        if name == "owner/typo":
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("a3cli.text.documents.unreachable", lambda: None)
    monkeypatch.setattr(HfApi, "dataset_info", missing)
    monkeypatch.setattr("a3cli.stages.calibrate.sample_blocks", pytest.fail)
    texts = ("--dataset", "a.txt:1", "--dataset", "owner/name:part:1", "--dataset", "owner/typo:1")
    refused(a3("calibrate", "source", *CUT, *texts), "'owner/typo': the Hub has no such data set")
    assert asked == ["owner/name", "owner/typo"]


def test_mixtures_merge(a3, folder):
    assert a3("calibrate", "source", *MIXED, *CUT, "--work", "one").code == 0
    assert a3("calibrate", "source", "--dataset", "a.txt", *but(CUT, "--seed", 4), "--work", "two").code == 0
    merged = a3("stats", "merge", "one", "two", "--into", "both", "--json").json
    assert merged["text_read"] == {"rows": 31, "skipped": 1, "whole": True}
    assert [len(part.get("mixture", [])) for part in merged["request"]["merged"]] == [3, 0]
    assert "(2 blocks; 11 rows, 1 without text skipped)" in a3("inspect", "both").stdout
    assert a3(*SOLVE, "--work", "both").code == 0
    assert a3("export", "out", "--work", "both").code == 0
    card = Path("out", "README.md").read_text("utf-8")
    assert "--dataset rows.jsonl:0.3 --dataset chats.jsonl:0.2" in card
    assert "a3 stats merge work-1 work-2" in card


@pytest.mark.parametrize(
    ("counts", "most", "expected"),
    [
        ([64, 38, 26], 8, [0, 1, 2, 3, 64, 65, 102, 103]),
        ([126, 1, 1], 3, [0, 126, 127]),
        ([2, 2], 8, [0, 1, 2, 3]),
        ([2, 60], 1, [2]),
        ([], 3, [0, 1, 2]),
        ([], 9, [0, 1, 2, 3, 4]),
    ],
)
def test_a_probe_sees_every_text(counts, most, expected):
    text = {"dataset": "a", "seq_len": 8}
    described = [{"weight": 1, "text": {**text, "samples": count}, "text_files": {}} for count in counts]
    request = CalibrationRequest.model_construct(
        mixture=described
        and CalibrationRequest.model_validate(
            {
                "text": text,
                "text_files": {},
                "mixture": described,
                "source": {"config.json": "0" * 64, "shards": {"a": "blake3:" + "0" * 64}},
                "tokenizer": {},
                "batch_size": 1,
                "mlp_stats": "full",
                "device": "cpu",
                "dtype": "float32",
                "trust_remote_code": False,
            }
        ).mixture
    )
    assert probed_blocks(request, sum(counts) or 5, most) == expected


@pytest.fixture
def recipe(folder) -> Path:
    content = {
        "work": "work",
        "out": "out",
        "calibrate": {
            "model": "./source",
            "text": {"samples": 6, "seq_len": 32, "seed": 3},
            "texts": [
                {"dataset": "../a.txt", "weight": 0.5},
                {"dataset": "../rows.jsonl", "weight": 0.3, "text_field": "text"},
                {"dataset": "../chats.jsonl", "weight": 0.2},
            ],
            "batch_size": 2,
        },
        "solve": {"budget": 0.2, "method": "paper", "head_multiple": 2, "mlp_multiple": 8},
        "verify": False,
    }
    (folder / "recipes").mkdir()
    shutil.move(folder / "source", folder / "recipes" / "source")
    path = folder / "recipes" / "mix.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_recipe_with_a_mixture(a3, recipe, folder, monkeypatch):
    monkeypatch.chdir("/")
    first = a3("run", recipe, "--json")
    assert first.code == 0, first
    mixture = first.json["calibrate"]["request"]["mixture"]
    assert {part["text"]["dataset"]: part["text"]["samples"] for part in mixture} == BLOCKS
    ended = a3("run", recipe)
    assert ended.code == 0
    assert "nothing was left to do" in ended.stdout
    previewed = a3("run", recipe, "--dry-run", "--json").json["stages"]["calibrate"]
    assert previewed["state"] == "finished"
    assert "dataset" not in previewed["settings"]["text"]
    assert [text["weight"] for text in previewed["settings"]["texts"]] == [0.5, 0.3, 0.2]
    shown = yaml.safe_load(a3("run", recipe, "--dry-run").stdout)
    assert CalibrateSettings(**shown["calibrate"]) == read_recipe(recipe).calibrate
    other = f"calibrate.texts=[{{dataset: {folder}/a.txt}}, {{dataset: {folder}/rows.jsonl}}]"
    state = a3("run", recipe, "--set", other, "--dry-run", "--json").json["stages"]["calibrate"]
    assert (state["state"], "differs in mixture (" in state["detail"]) == ("other settings", True)
    refused(a3("run", recipe, "--set", "calibrate.text.samples=8", "--quiet"), "differs in mixture (samples), samples")


def test_several_processes_get_the_whole_mixture(a3, recipe, folder, monkeypatch):
    launched = []
    monkeypatch.setattr("a3cli.stages.run.launch", lambda count, arguments: launched.append(arguments))
    assert a3("run", recipe, "--set", "calibrate.num_processes=3").code == 0
    (arguments,) = launched
    before = snapshot(folder / "recipes" / "work" / "calibration")
    assert a3(*arguments).code == 0
    assert snapshot(folder / "recipes" / "work" / "calibration") == before


def test_mistakes_in_a_recipes_mixture(a3, recipe):
    def changed(texts, **text):
        content = yaml.safe_load(recipe.read_text())
        content["calibrate"] |= {"texts": texts, "text": {"samples": 6, "seq_len": 32, **text}}
        other = recipe.with_name("other.yaml")
        other.write_text(yaml.safe_dump(content))
        return a3("run", other)

    a, b = {"dataset": "../a.txt"}, {"dataset": "../rows.jsonl"}
    refused(changed([{**a, "wieght": 1}, b]), "calibrate.texts.0.wieght: unknown key; did you mean weight?")
    refused(
        changed([{**a, "weight": 1}, b]), "calibrate.texts: some data sets have a weight, but", "rows.jsonl has none"
    )
    refused(changed([{**a, "weight": -1}, b]), "calibrate.texts.0.weight -1: must be above 0")
    refused(changed([{"weight": 1}]), "calibrate.texts.0.dataset is missing")
    refused(changed([a, b], dataset="../a.txt"), "calibrate: give either the dataset of text, or texts")
    refused(changed("a.txt"), "calibrate.texts 'a.txt': must be a list")
    refused(changed([]), "calibrate.text.dataset is missing")


def test_a_mixture_from_python(a3, folder):
    cut = {"samples": 6, "seq_len": 32, "seed": 3, "batch_size": 2}
    listed = a3cli.calibrate("source", "one", dataset=["a.txt:0.5", "rows.jsonl:0.3", "chats.jsonl:0.2"], **cut)
    texts = [
        {"dataset": "a.txt", "weight": 0.5},
        {"dataset": "rows.jsonl", "weight": 0.3},
        {"dataset": "chats.jsonl", "weight": 0.2},
    ]
    assert a3cli.calibrate("source", "two", texts=texts, **cut) == listed
    assert a3("calibrate", "source", *MIXED, *CUT, "--work", "three").code == 0
    assert snapshot(Path("one")) == snapshot(Path("two")) == snapshot(Path("three"))
    sizes = {"head_multiple": 2, "mlp_multiple": 8, "method": "paper"}
    small = a3cli.compress("source", "out", texts=texts, **cut, **sizes)
    assert small.calibration.request == listed.request
    small = a3cli.compress("source", "out", dataset=["a.txt", "rows.jsonl"], overwrite=True, **cut, **sizes)
    assert [part.text.samples for part in small.calibration.request.mixture] == [3, 3]


def test_keywords_of_a_mixture():
    def made(**values):
        return settings_from(CalibrateSettings, "calibrate", {"model": "m", **values})

    assert made(dataset="owner/name:2024").text.dataset == "owner/name:2024"  # a configuration of the Hub
    assert made(dataset=["owner/name:2024:1"]).text.dataset == "owner/name:2024"
    assert made(dataset=["wikitext2:2"]).texts == ()
    assert [each.dataset for each in made(dataset=["owner/name:2024:1", "c4:3"]).parts] == ["owner/name:2024", "c4"]
    assert [each.samples for each in made(texts=[{"dataset": "a"}, {"dataset": "b"}]).parts] == [64, 64]
    assert [(each.dataset, each.samples) for each in made().parts] == [("wikitext2", 64), ("c4", 64)]
    for values, said in (
        ({"texts": [{"dataset": "a"}], "dataset": "b"}, "either texts or dataset"),
        ({"texts": [{"dataset": "a"}], "text": {"dataset": "b"}}, "either the dataset of text, or texts"),
        ({"texts": [{"dataset": "a"}, {"dataset": "b", "weight": 1}]}, "a has none"),
        ({"dataset": ["a:1", "b"]}, "b has none"),
        ({"text": {"dataset": "b"}, "dataset": "a"}, "either text or dataset"),
    ):
        with pytest.raises(a3cli.A3Error, match=said):
            made(**values)


def test_the_example_in_the_docs(a3, tmp_path, monkeypatch):
    """The command and the recipe of docs/text.md give one mixture, with the numbers of blocks that the page says."""
    page = (ROOT / "docs" / "text.md").read_text("utf-8")
    (command,) = re.findall(r"^```\n(a3 calibrate .*?)\n```", page, re.M | re.S)
    (written,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    made = a3(*shlex.split(command)[1:], "--json")
    assert made.code == 0, made
    blocks = [part["text"]["samples"] for part in made.json["request"]["mixture"]]
    assert f"Here {blocks[0]} blocks and {blocks[1]}." in page
    content = {**yaml.safe_load(written), "solve": {"budget": 0.25}, "work": "../a3-work", "out": "../out"}
    Path("configs").mkdir()
    Path("configs", "mix.yaml").write_text(yaml.safe_dump(content))
    states = a3("run", "configs/mix.yaml", "--dry-run", "--json").json["stages"]
    assert states["calibrate"]["state"] == "finished"
