"""`a3 export --push-to-hub`: what reaches the Hub is the export, file by file, and every refusal comes before work."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import a3cli
from tests.conftest import refused, snapshot
from tests.helpers.commands import write_recipe
from tests.helpers.hub import OWNER, TOKEN, Repository, UploadHub, serving

pytestmark = pytest.mark.usefixtures("hasty")
REPO = f"{OWNER}/smaller"


@pytest.fixture
def online(monkeypatch, tmp_path) -> None:
    """Uploads are allowed and there is a token; the client keeps nothing outside the test's folder, without xet."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its retries
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub(online, monkeypatch) -> Iterator[UploadHub]:
    """The client's endpoint, which it has read from HF_ENDPOINT when it was imported, is a Hub on the loopback."""
    with serving() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def export(a3, prepared, tmp_path):
    """Return a function that exports to `out` and pushes."""

    def run(*options: object, out: str = "out"):
        return a3("export", tmp_path / out, "--work", prepared / "work", *options)

    return run


def files_of(folder: Path) -> dict[str, bytes | None]:
    return {name: data for name, data in snapshot(folder).items() if name != ".gitattributes"}


def uploaded(hub: UploadHub, name: str = REPO) -> dict[str, bytes]:
    return {file: data for file, data in hub.repositories[name].files.items() if file != ".gitattributes"}


def test_what_is_uploaded_is_the_export_and_loads(export, hub, tmp_path, text_file):
    from transformers import AutoModelForCausalLM

    plain = export(out="plain")
    assert plain.code == 0
    out = tmp_path / "out"
    outcome = export("--push-to-hub", REPO)
    assert outcome.code == 0, outcome
    assert f"uploaded, private: {hub.endpoint}/{REPO}" in outcome.stdout.splitlines()
    assert uploaded(hub) == snapshot(out) == snapshot(tmp_path / "plain")  # the setting changes no byte
    assert len(hub.repositories[REPO].commits) == 1
    assert hub.repositories[REPO].private
    back = tmp_path / "back"
    back.mkdir()
    for name, data in uploaded(hub).items():
        (back / name).write_bytes(data)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (back, out)]
    tokens = torch.arange(16)[None]
    assert torch.equal(*(model(tokens).logits for model in models))


def test_the_result_has_the_place(export, hub, tmp_path):
    found = export("--push-to-hub", REPO, "--public", "--json").json
    expected = {"repository": REPO, "url": f"{hub.endpoint}/{REPO}", "commit": f"{1:040x}", "private": False}
    assert found.pop("hub") == expected
    assert found == json.loads((tmp_path / "out" / "a3_manifest.json").read_text())
    assert not hub.repositories[REPO].private


def test_a_finished_export_is_only_uploaded(export, hub, tmp_path, monkeypatch):
    assert export().code == 0
    monkeypatch.setattr("a3cli.stages.export.write_checkpoint", pytest.fail)
    (tmp_path / "out" / "notes.txt").write_text("not of the export")
    (tmp_path / ".out.a3-partial").mkdir()
    for _ in range(2):  # the second time there is nothing to commit
        outcome = export("--push-to-hub", REPO)
        assert (outcome.code, outcome.stderr.count("uploaded")) == (0, 1), outcome
        assert "notes.txt" not in uploaded(hub)
        assert uploaded(hub) == {n: d for n, d in snapshot(tmp_path / "out").items() if n != "notes.txt"}
        assert len(hub.repositories[REPO].commits) == 1


def test_a_name_without_owner_is_ones_own(export, hub):
    assert export("--push-to-hub", "smaller", "--json").json["hub"]["repository"] == REPO
    assert set(hub.repositories) == {REPO}


def test_weights_of_an_earlier_upload_do_not_stay(export, hub, tmp_path):
    """Loaders would read `model.safetensors` in place of the new shards."""
    assert export("--push-to-hub", REPO).code == 0
    own = {"notes.md": b"of the owner", "onnx/model.safetensors": b"of the owner too"}
    hub.repositories[REPO].files |= {**own, "modeling_a3_llama.py": b"old"}
    assert "model.safetensors" in uploaded(hub)
    assert export("--push-to-hub", REPO, "--max-shard-size", "100KB", out="sharded").code == 0
    assert uploaded(hub) == snapshot(tmp_path / "sharded") | own
    assert "model.safetensors" not in uploaded(hub)
    assert len(hub.repositories[REPO].commits) == 2


@pytest.mark.parametrize("name", ["a/b/c", "a b", "-a/b", "a/b.git", "a/b--c", "a/", "/a", ""])
def test_a_wrong_name_is_refused_before_work(name, export, hub, tmp_path):
    refused(export("--push-to-hub", name), "--push-to-hub", "OWNER/NAME")
    assert not hub.asked
    assert not (tmp_path / "out").exists()


def test_offline_and_without_a_token(export, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    refused(export("--push-to-hub", REPO), f"--push-to-hub {REPO}: there is no token; run `hf auth login`")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(export("--push-to-hub", REPO), f"--push-to-hub {REPO}: HF_HUB_OFFLINE=1 forbids uploads")
    refused(export("--public"), "--public", "--push-to-hub")
    assert not hub.asked
    assert not (tmp_path / "out").exists()


def test_nothing_listens(export, online, monkeypatch, tmp_path):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{bound.getsockname()[1]}")
        refused(export("--push-to-hub", REPO), "could not be reached", "refused")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "failing", "words"),
    [
        ("other/model", {}, ("no right to write there (You don't have the rights to create", "; run `hf auth login`")),
        (REPO, {"/create": 401}, ("the Hub refused the token", "hf auth login", "HF_TOKEN")),
        (REPO, {"/create": 503}, ("the Hub answered 503",)),
    ],
)
def test_a_repository_that_cannot_be_made_is_refused_before_work(name, failing, words, export, hub, tmp_path):
    hub.failing = failing
    refused(export("--push-to-hub", name), f"--push-to-hub {name}: ", *words)
    assert not (tmp_path / "out").exists()


def test_a_repository_of_others_that_can_be_read(export, hub, tmp_path):
    hub.repositories["other/model"] = Repository(private=True)
    hub.read_only = {"other/model"}
    refused(export("--push-to-hub", "other/model"), "the token has no right to write there")
    assert not (tmp_path / "out").exists()


def test_nothing_is_published_or_replaced_unasked(export, hub, tmp_path):
    hub.repositories[REPO] = Repository(private=False)
    refused(export("--push-to-hub", REPO), "this repository is public; add --public")
    hub.repositories[REPO] = Repository(private=True, files={"pytorch_model.bin": b"mine"})
    refused(export("--push-to-hub", REPO), "holds a model that is not an a3 export (pytorch_model.bin)")
    assert not (tmp_path / "out").exists()
    hub.repositories[REPO] = Repository(private=True)
    outcome = export("--push-to-hub", REPO, "--public")
    assert outcome.code == 0
    assert "warning: tester/smaller exists and stays private" in outcome.stderr


@pytest.mark.parametrize("end", ["/preupload/main", "/objects/batch", "/commit/main", "/lfs"])
@pytest.mark.parametrize("status", [403, 500])
def test_a_failed_upload_loses_nothing(end, status, export, a3, hub, tmp_path, monkeypatch):
    import shlex

    if end == "/lfs":  # where the weights go: the address ends in their hash
        assert export().code == 0
        from hashlib import sha256

        end = sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    hub.failing = {end: status}
    outcome = export("--push-to-hub", REPO, "--overwrite")
    refused_line = outcome.stderr.splitlines()[-1]
    assert outcome.code == 2
    assert f"{tmp_path / 'out'} is complete, but its upload to {REPO} failed: " in refused_line
    assert ("no right to write there" if status == 403 else "answered 500") in refused_line
    assert not hub.repositories[REPO].commits
    hub.failing = {}
    monkeypatch.setattr("a3cli.stages.export.write_checkpoint", pytest.fail)
    again = a3(*shlex.split(refused_line.partition("to continue: a3 ")[2]))
    assert again.code == 0, again
    assert uploaded(hub) == snapshot(tmp_path / "out")


def test_the_command_that_continues_has_the_settings(a3, prepared, hub, tmp_path):
    figures = tmp_path / "figures of eval.json"
    figures.write_text(json.dumps({"dataset": "text", "seq_len": 8, "tokens": 16, "perplexity": 5.0}))
    hub.failing = {"/commit/main": 500}
    options = ("--dtype", "bfloat16", "--max-shard-size", "1MB", "--eval", figures, "--push-to-hub", REPO, "--public")
    outcome = a3("export", tmp_path / "out", "--work", prepared / "work", *options)
    hub.failing = {}
    import shlex

    again = a3(*shlex.split(outcome.stderr.splitlines()[-1].partition("to continue: a3 ")[2]))
    assert again.code == 0, again
    assert uploaded(hub) == snapshot(tmp_path / "out")
    assert not hub.repositories[REPO].private


def test_without_a_solution_no_repository_is_made(a3, hub, tmp_path):
    refused(a3("export", tmp_path / "out", "--work", tmp_path / "work", "--push-to-hub", REPO), "no finished solution")
    assert not hub.asked


def test_from_python(hub, prepared, checkpoint, text_file, tmp_path):
    a3cli.export(tmp_path / "out", prepared / "work", push_to_hub=REPO)
    assert uploaded(hub) == snapshot(tmp_path / "out")
    text = {"dataset": str(text_file), "samples": 3, "seq_len": 32}
    sizes = {"head_multiple": 2, "mlp_multiple": 8}
    whole = {**text, **sizes, "export": {"push_to_hub": "all", "public": True}}
    a3cli.compress(checkpoint("llama-gqa"), tmp_path / "all", **whole)
    assert uploaded(hub, f"{OWNER}/all") == snapshot(tmp_path / "all")
    with pytest.raises(a3cli.A3Error, match="no right to write there"):
        a3cli.compress(checkpoint("llama-gqa"), tmp_path / "none", **{**whole, "export": {"push_to_hub": "x/y"}})
    assert not list(tmp_path.glob("*none*"))


@pytest.fixture
def recipe(checkpoint, text_file, tmp_path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", checkpoint("llama-gqa"), text_file, export={"push_to_hub": REPO})


def test_a_recipe_uploads_once(a3, recipe, hub, tmp_path):
    """An export that fails a gate is not uploaded, and a finished run asks the Hub nothing."""
    assert a3("run", recipe, "--set", "eval.fail_if=[kl > 0]").code == 1
    assert not hub.repositories[REPO].commits
    assert f"# export: finished; the upload to {REPO} is left" in a3("run", recipe, "--dry-run").stdout.splitlines()
    found = a3("run", recipe, "--json").json
    assert found["export"]["hub"]["url"] == f"{hub.endpoint}/{REPO}"
    assert uploaded(hub) == snapshot(tmp_path / "out")
    hub.asked.clear()
    place = f"{hub.endpoint}/{REPO}"
    assert f"# export: finished; uploaded to {place}" in a3("run", recipe, "--dry-run").stdout.splitlines()
    again = a3("run", recipe)
    assert "nothing was left to do" in again.stdout
    assert place in again.stdout
    assert not hub.asked
    assert a3("run", recipe, "--set", f"export.push_to_hub={OWNER}/other").code == 0
    assert uploaded(hub, f"{OWNER}/other") == snapshot(tmp_path / "out")


def test_a_recipe_that_may_not_upload_does_no_work(a3, recipe, hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    refused(a3("run", recipe), "hf auth login")
    assert not (tmp_path / "work").exists()
