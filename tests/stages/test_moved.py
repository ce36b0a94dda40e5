"""`--source`: a model that was moved after its calibration is found again, and nothing is computed anew."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

import a3cli
from tests.conftest import SOLVE, refused, snapshot

pytestmark = pytest.mark.usefixtures("hasty")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def moved(source, work, tmp_path) -> Path:
    """A work folder's source, moved away from where it was calibrated."""
    return source.rename(tmp_path / "elsewhere")


def recorded(work: Path) -> dict:
    return json.loads((work / "source.json").read_text())


def test_every_command_names_the_option(a3, work, moved, tmp_path):
    for command in ((*SOLVE, "--name", "x"), ("export", tmp_path / "out"), ("pareto", "--budgets", 0.2)):
        refused(a3(*command, "--work", work), str(work), "no such folder", "if it was moved, give --source NEWPATH")
    assert "if it was moved, give --source" in a3("inspect", work).stdout


COMMANDS = {
    "solve": lambda work, tmp: (*SOLVE, "--name", "other", "--work", work),
    "export": lambda work, tmp: ("export", tmp / "out", "--work", work),
    "pareto": lambda work, tmp: (
        "pareto", "--budgets", 0.2, "--head-multiple", 2, "--mlp-multiple", 8, "--work", work,
    ),
    "inspect": lambda work, tmp: ("inspect", work),
    "report": lambda work, tmp: ("report", work, "--html", tmp / "report.html"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_the_new_place_is_recorded_by_every_command(command, a3, work, moved, tmp_path):
    arguments = COMMANDS[command](work, tmp_path)
    before = recorded(work)
    outcome = a3(*arguments, "--source", moved)
    assert outcome.code == 0, outcome
    after = recorded(work)
    del before["sha256"], after["sha256"]
    assert after == {**before, "model": str(moved)}
    found = a3("inspect", work, "--json").json  # a later command needs no option
    assert not [each for each in found["warnings"] if "not found" in each]


def test_the_same_bytes_and_the_next_command(a3, work, source, tmp_path, monkeypatch):
    assert a3("export", tmp_path / "before", "--work", work).code == 0
    (tmp_path / "new").mkdir()
    moved = source.rename(tmp_path / "new" / "source")
    monkeypatch.chdir(tmp_path)
    outcome = a3("export", "after", "--work", work, "--source", "new/source")
    assert snapshot(tmp_path / "after") == snapshot(tmp_path / "before")
    assert outcome.code == 0
    outcome = a3("verify", "after", "--work", work, "--require-reference")
    following = outcome.stdout.splitlines()[-1].removeprefix("next: a3 ")
    assert shlex.split(following) == ["eval", "after", "--against", "new/source"]
    moved.rename(source)
    outcome = a3("verify", "after", "--work", work, "--require-reference")
    assert outcome.code == 1
    assert "--source" in outcome.stdout + outcome.stderr
    assert a3("verify", "after", "--work", work, "--require-reference", "--source", source).code == 0
    assert recorded(work)["model"] == str(source)


def test_another_model_is_refused_and_nothing_changes(a3, work, moved, checkpoint, tmp_path):
    before = snapshot(work)
    other = checkpoint("llama-gqa", seed=1, max_shard_size="40KB")
    for place, words in (
        (other, ("is not the checkpoint of", "model-00001-of-00007.safetensors")),
        (checkpoint("qwen2-gqa"), ("is not the checkpoint of", "config.json")),
        (tmp_path / "nowhere", ("no such folder",)),
        (tmp_path, ("config.json is missing",)),
    ):
        refused(a3("export", tmp_path / "out", "--work", work, "--source", place), f"--source {place}: ", *words)
        assert snapshot(work) == before
    none = tmp_path / "none"
    refused(a3(*SOLVE, "--work", none, "--source", moved), f"--source {moved}: {none} has no calibration")
    assert not none.exists()


def test_an_export_has_no_source_to_move(a3, work, source, tmp_path):
    assert a3("export", tmp_path / "out", "--work", work).code == 0
    refused(a3("inspect", tmp_path / "out", "--source", source), "leave out --source")


def test_a_folder_in_use_is_left_alone(a3, work, moved, tmp_path):
    from a3cli.work.folder import Work

    before = recorded(work)
    with Work(work).locked():
        refused(a3("inspect", work, "--source", moved), "in use by another a3 process")
    assert recorded(work) == before


def test_from_python(work, moved, tmp_path):
    with pytest.raises(a3cli.A3Error, match="--source NEWPATH"):
        a3cli.solve(work, budget=0.3, name="x", head_multiple=2, mlp_multiple=8)
    a3cli.solve(work, budget=0.3, name="x", head_multiple=2, mlp_multiple=8, source=moved)
    a3cli.export(tmp_path / "out", work, name="x")
    again = moved.rename(tmp_path / "again")
    assert a3cli.verify(tmp_path / "out", work, require_reference=True, source=again)["passed"]


@pytest.fixture
def cached(checkpoint, tmp_path, monkeypatch) -> Path:
    """The snapshot of `owner/name` in a Hub's cache."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(checkpoint("llama-gqa"), repository / "snapshots" / COMMIT))


def test_a_hub_id_may_lie_in_a_folder_and_keeps_its_name(a3, cached, text_file, tmp_path):
    work = ("--work", tmp_path / "work")
    text = ("--dataset", text_file, "--samples", 3, "--seq-len", 32)
    assert a3("calibrate", "owner/name", *text, *work).code == 0
    assert a3(*SOLVE, *work).code == 0
    assert a3("export", tmp_path / "before", *work).code == 0
    local = cached.rename(tmp_path / "local")
    refused(a3("export", tmp_path / "after", *work), "owner/name", "--source NEWPATH")
    outcome = a3("export", tmp_path / "after", *work, "--source", local)
    assert outcome.code == 0, outcome
    assert snapshot(tmp_path / "after") == snapshot(tmp_path / "before")  # also the card's base model
    assert "base_model: owner/name" in (tmp_path / "after" / "README.md").read_text()
    outcome = a3("verify", tmp_path / "after", *work)
    following = shlex.split(outcome.stdout.splitlines()[-1].removeprefix("next: a3 "))
    assert following == ["eval", str(tmp_path / "after"), "--against", str(local)]
    found = a3("inspect", tmp_path / "work", "--json").json
    assert found["source"]["model"] == "owner/name"
    assert not [each for each in found["warnings"] if "not found" in each]
    sizes = ("--head-multiple", 2, "--mlp-multiple", 8)
    measured = a3("pareto", "--budgets", 0.2, *sizes, "--dataset", text_file, "--samples", 1, "--seq-len", 32, *work)
    assert measured.code == 0, measured
    local.rename(cached)
    assert a3("export", tmp_path / "again", *work, "--source", "owner/name").code == 0
    assert "folder" not in recorded(tmp_path / "work")
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "before")


def test_a_recipe_whose_model_was_moved_keeps_its_calibration(a3, source, text_file, tmp_path, monkeypatch):
    text = {"dataset": str(text_file), "samples": 3, "seq_len": 32}
    content = {
        "work": "work",
        "out": "out",
        "calibrate": {"model": str(source), "text": text},
        "solve": {"budget": 0.25, "head_multiple": 2, "mlp_multiple": 8},
        "verify": False,
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    assert a3("run", recipe).code == 0
    first = snapshot(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    moved = source.rename(tmp_path / "elsewhere")
    outcome = a3("run", recipe)
    assert outcome.code == 2
    assert f"model '{source}': no such folder" in outcome.stderr
    monkeypatch.setattr("a3cli.stages.calibrate.Calibration.run", pytest.fail)
    monkeypatch.setattr("a3cli.stages.solve.analyse", pytest.fail)
    outcome = a3("run", recipe, "--set", f"calibrate.model={moved}")
    assert outcome.code == 0, outcome
    assert recorded(tmp_path / "work")["model"] == str(moved)
    named = {"README.md", "a3_manifest.json"}  # they have the folder's name, which is another one now
    assert {k: v for k, v in snapshot(tmp_path / "out").items() if k not in named} == {
        k: v for k, v in first.items() if k not in named
    }
