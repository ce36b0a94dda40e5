"""Which text a calibration, an evaluation or a sweep over budgets has read, and when another one has the same text."""

import json
import shutil

import pytest
import yaml

from a3cli.work.sealed import write_manifest
from tests.conftest import SHORT, SOLVE, refused

pytestmark = pytest.mark.usefixtures("hasty")


@pytest.fixture
def untouchable(monkeypatch):
    """Return a function that makes any later reading of text fail."""

    def refuse(*arguments):
        raise AssertionError("text was read again")

    def now():
        monkeypatch.setattr("a3cli.stages.calibrate.sample_blocks", refuse)
        monkeypatch.setattr("a3cli.stages.evaluate.evaluation_blocks", refuse)

    return now


@pytest.fixture
def folder(tmp_path, text_file):
    """Return a folder of three files. The first suffices for SHORT (a pool of 768 tokens), not for a piece of text."""
    path = tmp_path / "texts"
    path.mkdir()
    content = text_file.read_text("utf-8")
    (path / "b.txt").write_text(content[:2000], "utf-8")
    rows = [None, content[2000:3000], " ", content[3000:4000]]
    (path / "d.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (path / "f.txt").write_text(content[4000:6000], "utf-8")
    return path


def test_a_data_set_is_the_same_however_it_is_spelled(a3, checkpoint, text_file, tmp_path, monkeypatch, untouchable):
    (tmp_path / "inside").mkdir()
    shutil.copy(text_file, tmp_path / "inside" / "t.txt")
    monkeypatch.chdir(tmp_path / "inside")
    command = ("calibrate", checkpoint("llama-gqa"), *SHORT, "--work", tmp_path / "work", "--json")
    first = a3(*command, "--dataset", "t.txt").json
    assert first["request"]["text"]["dataset"] == "t.txt"
    untouchable()
    for spelling in ("./t.txt", tmp_path / "inside" / "t.txt", "../inside/t.txt", "."):
        assert a3(*command, "--dataset", spelling).json == first
    monkeypatch.chdir(tmp_path)
    shutil.copytree("inside", "copy")
    shutil.copy("inside/t.txt", "renamed.txt")
    for spelling in ("inside/t.txt", "copy/t.txt", "copy", "renamed.txt"):
        assert a3(*command, "--dataset", spelling).json == first
    (tmp_path / "copy" / "t.txt").write_text("other")
    refused(a3(*command, "--dataset", "copy/t.txt"), "(differs in text_files (t.txt))", "--overwrite")
    shutil.copy("inside/t.txt", "t.jsonl")
    refused(a3(*command, "--dataset", "t.jsonl"), "(differs in text_field, text_files (t.jsonl, t.txt))")


def test_an_unfinished_calibration_resumes_with_another_spelling(
    a3, checkpoint, text_file, tmp_path, monkeypatch, untouchable
):
    from a3cli.cli.progress import SweepProgress

    plain = SweepProgress.__call__

    def interrupting(self, **at):
        plain(self, **at)
        if at.get("layer") == 1:
            raise KeyboardInterrupt

    command = ("calibrate", checkpoint("llama-gqa"), *SHORT, "--work", tmp_path / "work", "--dataset")
    for overwrite in ((), ("--overwrite",)):
        with monkeypatch.context() as patch:
            patch.setattr(SweepProgress, "__call__", interrupting)
            assert a3(*command, text_file, *overwrite).code == 3
        with monkeypatch.context() as patch:
            patch.chdir(text_file.parent)
            patch.setattr("a3cli.stages.calibrate.sample_blocks", None)
            ended = a3(*command, f"./{text_file.name}", *overwrite)
        assert ended.code == 0, ended
        assert "resuming at layer 2 of 2" in ended.stderr
    untouchable()
    assert a3(*command, text_file).code == 0


def test_all_files_of_a_folder_count(a3, checkpoint, folder, tmp_path):
    """The pool takes a part of each file, so every file matters, and one that is added."""
    command = ("calibrate", checkpoint("llama-gqa"), *SHORT, "--work", tmp_path / "work", "--json")
    first = a3(*command, "--dataset", folder).json
    assert list(first["request"]["text_files"]) == ["b.txt", "d.jsonl", "f.txt"]
    assert first["text_read"] == {"rows": 4, "skipped": 2, "whole": False, "from_each": True}
    assert a3(*command, "--dataset", folder).json == first
    (folder / "z.jsonl").write_text("added")
    refused(a3(*command, "--dataset", folder), "(differs in text_files (z.jsonl))")
    (folder / "z.jsonl").unlink()
    (folder / "f.txt").write_text("changed")
    refused(a3(*command, "--dataset", folder), "(differs in text_files (f.txt))")


def test_only_what_an_earlier_version_read_of_a_folder_counts(a3, checkpoint, folder, tmp_path):
    """It stopped reading where it had enough, so the files after that do not matter."""
    command = ("calibrate", checkpoint("llama-gqa"), *SHORT, "--work", tmp_path / "work", "--json")
    assert a3(*command, "--dataset", folder / "b.txt").code == 0
    manifest = tmp_path / "work" / "calibration" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["text_read"]["whole"] = False
    content.pop("sha256")
    recorded = write_manifest(manifest, content)
    assert a3(*command, "--dataset", folder).json == recorded
    (folder / "f.txt").write_text("changed")
    assert a3(*command, "--dataset", folder).json == recorded
    assert a3(*command, "--dataset", folder, "--text-field", "body").json == recorded  # no effect on b.txt
    (folder / "a.txt").write_text("comes before")
    refused(a3(*command, "--dataset", folder), "(differs in text_files (a.txt, b.txt))")


def test_what_ended_a_data_set_counts(a3, checkpoint, folder, tmp_path):
    """The whole data set was read, so another file would be read too."""
    command = ("calibrate", checkpoint("llama-gqa"), "--samples", 24, "--seq-len", 32, "--work", tmp_path / "work")
    ended = a3(*command, "--dataset", folder)
    assert f"dataset {folder}: skipped 2 of 4 rows without text" in ended.stderr.splitlines()
    (folder / "ignored.md").write_text("no text")
    again = a3(*command, "--dataset", folder, "--json")
    assert again.json["text_read"] == {"rows": 4, "skipped": 2, "whole": True}
    assert list(again.json["request"]["text_files"]) == ["b.txt", "d.jsonl", "f.txt"]
    (folder / "z.txt").write_text("added")
    refused(a3(*command, "--dataset", folder), "(differs in text_files (z.txt))")


def test_card_and_inspect_name_what_was_read(a3, checkpoint, folder, tmp_path):
    work = ("--work", tmp_path / "work")
    for text, seed, place in ((folder / "b.txt", 0, "one"), (folder, 1, "two")):
        options = (*SHORT, "--seed", seed, "--work", tmp_path / place)
        assert a3("calibrate", checkpoint("llama-gqa"), "--dataset", text, *options).code == 0
    assert "text: b.txt\n" in a3("inspect", tmp_path / "one").stdout
    assert a3("stats", "merge", tmp_path / "one", tmp_path / "two", "--into", tmp_path / "work").code == 0
    both = "b.txt and texts (read: b.txt, d.jsonl, f.txt; 4 rows, 2 without text skipped)"
    assert f"text: {both}\n" in a3("inspect", tmp_path / "work").stdout
    assert a3(*SOLVE, *work).code == 0
    manifest = a3("export", tmp_path / "out", *work, "--json").json
    card = " ".join((tmp_path / "out" / "README.md").read_text("utf-8").split())
    assert "`texts` (read: `b.txt`, `d.jsonl`, `f.txt`; 4 rows, 2 without text skipped)" in card
    assert manifest["calibration"]["text_read"] == {"rows": 4, "skipped": 2, "whole": False, "from_each": True}
    parts = manifest["calibration"]["request"]["merged"]
    assert [list(part["text_files"]) for part in parts] == [["b.txt"], ["b.txt", "d.jsonl", "f.txt"]]
    assert [part["text_read"]["rows"] for part in parts] == [0, 4]


def test_a_typo_is_no_other_data_set(a3, work, source, text_file, tmp_path, monkeypatch):
    """In a folder with a finished calibration, a missing data set is reported before a different request."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    command = ("calibrate", source, *SHORT, "--work", work, "--dataset")
    for name in (f"{text_file}.jsonl", "texts/train.txt", "wikitext3"):
        refused(a3(*command, name), name, "no such file or folder")
    refused(a3("pareto", "--work", work, "--dataset", "none.txt"), "none.txt", "no such file or folder")
    asked = []

    def missing(self, name, **options):
        asked.append(name)
        error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        raise error

    monkeypatch.setattr(HfApi, "dataset_info", missing)
    refused(a3(*command, "owner/typo:some"), "'owner/typo:some'", "the Hub has no such data set")
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, **options: asked.append(name))
    refused(a3(*command, "owner/other"), "(differs in dataset, text_field, text_files (text.txt))", "--overwrite")
    assert asked == ["owner/typo", "owner/other"]


def test_options_that_do_nothing_are_refused(a3, checkpoint, text_file, tmp_path):
    source = checkpoint("llama-gqa")
    calibrate = ("calibrate", source, "--dataset", text_file, *SHORT, "--work", tmp_path / "work")
    for option in (("--chat",), ("--text-field", "text"), ("--split", "train")):
        refused(a3(*calibrate, *option), f"leave out {option[0]}")
        refused(a3("eval", source, "--dataset", text_file, *option), f"leave out {option[0]}")
    for command in (calibrate, ("eval", source, "--dataset", text_file), ("plan", source)):
        refused(a3(*command, "--revision", "main"), "local folder", "leave out --revision")
    against = ("eval", source, "--dataset", text_file, "--against", source)
    refused(a3(*against, "--against-revision", "main"), "local folder", "leave out --revision (--against-revision)")
    assert not (tmp_path / "work").exists()


def test_eval_says_what_it_read(a3, checkpoint, folder, tmp_path):
    options = ("--dataset", folder, "--dataset", folder / "b.txt", *SHORT, "--bootstrap", 0, "--json")
    ended = a3("eval", checkpoint("llama-gqa"), *options)
    several, single = ended.json["datasets"]
    assert f"dataset {folder}: skipped 2 of 4 rows without text" in ended.stderr.splitlines()
    assert several["text_read"] == {"rows": 4, "skipped": 2, "whole": True}
    assert list(several["text_files"]) == ["b.txt", "d.jsonl", "f.txt"]
    assert single["text_files"] == {"b.txt": several["text_files"]["b.txt"]}


def test_a_recipe_measures_once_what_is_the_same(a3, checkpoint, folder, tmp_path, untouchable):
    text = {"dataset": "./texts", "samples": 3, "seq_len": 32}
    recipe = {
        "work": "work",
        "out": "out",
        "calibrate": {
            "model": str(checkpoint("llama-gqa")),
            "text": dict(text),
        },
        "solve": {"budget": 0.2, "method": "paper", "head_multiple": 2, "mlp_multiple": 8},
        "eval": {"text": dict(text), "bootstrap": 0},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.dump(recipe))
    first = a3("run", tmp_path / "recipe.yaml", "--json")
    assert first.code == 0, first
    untouchable()
    shutil.copytree(folder, tmp_path / "moved")
    recipe["eval"]["text"]["dataset"] = recipe["calibrate"]["text"]["dataset"] = "./moved"
    (tmp_path / "recipe.yaml").write_text(yaml.dump(recipe))
    assert a3("run", tmp_path / "recipe.yaml", "--json").json == first.json
    recipe["eval"]["text"]["dataset"] = "./moved/d.jsonl"
    (tmp_path / "recipe.yaml").write_text(yaml.dump(recipe))
    assert "read again" in a3("run", tmp_path / "recipe.yaml").stderr


def test_a_sweep_over_budgets_resumes_with_the_same_text(a3, work, folder, tmp_path, monkeypatch):
    from a3cli.stages import pareto

    measured, plain = [], pareto.measure

    def noting(settings, *rest):
        measured.append(settings.budget)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return plain(settings, *rest)

    monkeypatch.setattr(pareto, "measure", noting)
    command = ("pareto", "--budgets", "0.1,0.2", "--head-multiple", 2, "--mlp-multiple", 8, *SHORT)
    command = (*command, "--work", work, "--dataset")
    assert a3(*command, folder).code == 3
    shutil.copytree(folder, tmp_path / "moved")
    ended = a3(*command, tmp_path / "moved", "--json")
    assert ended.code == 0, ended
    assert len(measured) == 3 + 4
    assert all("perplexity" in point["measured"] for point in ended.json["points"])


def test_a_sweep_over_budgets_begins_anew_with_other_text(a3, work, folder, monkeypatch):
    from a3cli.stages import pareto

    measured, plain = [], pareto.measure

    def noting(settings, *rest):
        measured.append(settings.budget)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return plain(settings, *rest)

    monkeypatch.setattr(pareto, "measure", noting)
    command = ("pareto", "--budgets", "0.2", "--head-multiple", 2, "--mlp-multiple", 8, *SHORT)
    command = (*command, "--work", work, "--dataset", folder)
    assert a3(*command).code == 3
    (folder / "f.txt").write_text("other text")
    assert a3(*command).code == 0
    assert len(measured) == 2 + 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("calibrate", "x", "--dataset", "y", "--text-field", "a", "--text-field", "b"),
            ("2 times for 1 data sets", "once for each"),
        ),
        (("calibrate", "x", "--seed", 1, "--seed=2"), ("--seed was given 2 times",)),
        (("pareto", "--dataset", "a", "--dataset=b"), ("measures on one data set",)),
        (("solve", "--budget", 0.1, "--budget=0.2"), ("--budget was given 2 times",)),
        (("inspect", "x", "--json", "--json", "y"), ("unexpected extra argument",)),
        (("stats", "merge", "a", "b", "--into", "c", "--into", "d", "--into=e"), ("--into was given 3 times",)),
        (("eval", "x", "--dataset", "a", "--dataset", "b", "--seq-len", 8, "--seq-len", 8), ("--seq-len was",)),
    ],
)
def test_a_second_value_is_not_ignored(a3, arguments, words):
    refused(a3(*arguments), *words)
