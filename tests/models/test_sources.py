"""Inconsistent sources: rejected with names and values where a guess could be wrong, or else read correctly."""

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from a3cli.models.checkpoint import INDEX, SINGLE, Checkpoint, read_header, same_content
from a3cli.models.config import check_rope_spellings
from a3cli.models.model import describe
from a3cli.stages import checker
from tests.conftest import LINEAR, LLAMA3, LONGROPE, MODELS, SHORT, SOLVE, refused, snapshot

pytestmark = pytest.mark.usefixtures("hasty")

PLANNED = ("--seq-len", 32, "--samples", 3, "--head-multiple", 2, "--mlp-multiple", 8)
NORM = "model.layers.1.input_layernorm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def copied(checkpoint, tmp_path) -> Callable[..., Path]:
    """Return a function that copies a checkpoint of the table, with changed config.json entries and tensors."""

    def copy(
        name: str, *, config: dict[str, Any] | None = None, tensors: Callable | None = None, **options: Any
    ) -> Path:
        folder = Path(shutil.copytree(checkpoint(name, **options), tmp_path / "source"))
        edit_json(folder / "config.json", config or {})
        if tensors:
            edit_tensors(folder / SINGLE, tensors)
        return folder

    return copy


def edit_json(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})


def calibrate(source: object, text_file: Path, work: Path, *options: object) -> tuple[object, ...]:
    return ("calibrate", source, "--dataset", text_file, *SHORT, "--work", work, *options)


@pytest.fixture
def refuses(a3, text_file, tmp_path) -> Callable[..., None]:
    """Return a check that a3 plan and a3 calibrate both reject a folder with these words and leave nothing behind."""

    def check(source: Path, *words: str) -> None:
        before = snapshot(tmp_path)
        refused(a3("plan", source, *PLANNED), *words)
        refused(a3(*calibrate(source, text_file, tmp_path / "work")), *words)
        assert snapshot(tmp_path) == before

    return check


@pytest.fixture
def chain(a3, text_file, tmp_path, monkeypatch) -> Callable[..., Path]:
    """Return a function that runs all stages from a source to a verified export and returns the export's folder.

    The checker of a3 verify runs in this process: starting another one takes longer than all the rest.
    """

    def run_checker(request: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
        export = checker.Export(request)
        looked = [(name, *checker.attempt(check, export)) for name, (check, _) in checker.CHECKS.items()]
        return [{"name": name, "outcome": outcome, "detail": detail} for name, outcome, detail in looked]

    monkeypatch.setattr("a3cli.stages.verify.run_checker", run_checker)

    def run(source: object, *options: object, name: str = "made", solving: tuple[object, ...] = ()) -> Path:
        work, out = ("--work", tmp_path / name / "work"), tmp_path / name / "out"
        for command in (
            calibrate(source, text_file, work[1], *options),
            (*SOLVE, *solving, *work),
            ("export", out, *work),
            ("verify", out, "--require-reference", *work, *(["--trust-remote-code"] if solving else [])),
            ("inspect", *work[1:]),
        ):
            outcome = a3(*command)
            assert outcome.code == 0, outcome
        return out

    return run


# Two sets of weights in one folder


def merged(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(folder.glob("model-*")) for name, tensor in load_file(shard).items()}


def test_a_single_file_beside_shards_with_the_same_tensors_is_what_is_read(a3, source, text_file, tmp_path):
    save_file(merged(source), source / SINGLE)
    assert Checkpoint(source).shards == [source / SINGLE]
    assert a3("plan", source, *PLANNED, "--json").json["weights"]["checked"] == "tensors"
    assert a3(*calibrate(source, text_file, tmp_path / "work")).code == 0
    request = json.loads((tmp_path / "work" / "calibration" / "manifest.json").read_text())["request"]
    assert list(request["source"]["shards"]) == [SINGLE]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {**tensors, NORM: tensors[NORM] * 2},
        lambda tensors: {**tensors, NORM: tensors[NORM].half()},
        lambda tensors: {**tensors, NORM: tensors[NORM][:-1]},
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != NORM},
        lambda tensors: {**tensors, f"{NORM}.other": tensors[NORM]},
    ],
    ids=["values", "dtype", "shape", "fewer", "more"],
)
def test_a_single_file_beside_shards_with_other_tensors(change, refuses, a3, source, text_file):
    save_file(merged(source), source / SINGLE)
    edit_tensors(source / SINGLE, change)
    words = (str(source / SINGLE), str(source / INDEX), "7 shards", NORM)
    refuses(source, *words)
    refused(a3("eval", source, "--dataset", text_file, "--samples", 1, "--seq-len", 32), *words)


def test_an_index_whose_shards_are_gone(refuses, source):
    """No library can load it, so only its tensor names are compared."""
    save_file(merged(source), source / SINGLE)
    for shard in source.glob("model-*"):
        shard.unlink()
    assert Checkpoint(source).shards == [source / SINGLE]
    edit_tensors(source / SINGLE, lambda tensors: {**tensors, "extra": torch.ones(2)})
    refuses(source, INDEX, "only one has extra")


def test_of_large_files_the_beginning_of_each_tensor_is_compared(source, monkeypatch):
    monkeypatch.setattr("a3cli.models.checkpoint.SAMPLED_ABOVE", 0)
    monkeypatch.setattr("a3cli.models.checkpoint.FINGERPRINT_BYTES", 8)
    tensors = merged(source)
    tensors[NORM][2] = 5  # beyond the second float
    save_file(tensors, source / SINGLE)
    assert Checkpoint(source).shards == [source / SINGLE]
    tensors[NORM][1] = 5
    save_file(tensors, source / SINGLE)
    with pytest.raises(Exception, match="hold different tensors"):
        Checkpoint(source)


def test_content_is_compared_to_the_last_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("a3cli.models.checkpoint.COPIED_AT_ONCE", 64)
    one = torch.randn(10, 7)
    save_file({"one": one, "same": one.clone(), "empty": torch.ones(0), "nan": one / 0 * 0}, tmp_path / "t")
    infos = read_header(tmp_path / "t")
    assert same_content(infos["one"], infos["same"])
    assert same_content(infos["empty"], infos["empty"])
    assert same_content(infos["nan"], infos["nan"])
    assert not same_content(infos["one"], infos["empty"])
    one[-1, -1] += 1
    save_file({"one": one}, tmp_path / "other")
    assert not same_content(infos["one"], read_header(tmp_path / "other")["one"])


# Tensors that the class does not have


def without(*parts: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("name", "parts", "words"),
    [
        ("llama-gqa", (HEAD,), ("untied embeddings", f"1 tensor is missing ({HEAD})")),
        ("llama-gqa", ("model.norm",), ("1 tensor is missing (model.norm.weight)",)),
        ("llama-gqa", (NORM,), (f"1 tensor is missing ({NORM})",)),
        ("qwen2-gqa", ("layers.0.self_attn.k_proj.bias",), ("missing (model.layers.0.self_attn.k_proj.bias)",)),
        ("llama-gqa-bias", ("bias",), ("14 tensors are missing (model.layers.0.self_attn.q_proj.bias, ", ", …)")),
        ("nemotron-gqa", ("model.norm.bias",), ("1 tensor is missing (model.norm.bias)",)),
        ("llama-gqa-tied", (EMBEDDING,), (f"1 tensor is missing ({EMBEDDING})",)),
    ],
)
def test_missing_tensors(name, parts, words, refuses, copied):
    refuses(copied(name, tensors=without(*parts)), "source: config.json says 2 layers of ", *words)


def test_tensors_that_the_class_does_not_know(refuses, copied):
    norms = {f"model.layers.{i}.self_attn.{kind}_norm.weight": torch.ones(16) for i in (0, 1) for kind in "qkv"}
    folder = copied("llama-gqa", tensors=lambda tensors: {**tensors, **norms})
    refuses(folder, "LlamaForCausalLM", "6 tensors are not known", "model.layers.0.self_attn.k_norm.weight", ", …)")


def test_biases_that_config_json_does_not_mention(refuses, copied):
    folder = copied("llama-mha-bias", config={"attention_bias": False})
    refuses(folder, "8 tensors are not known to this class", "model.layers.0.self_attn.k_proj.bias")


def test_everything_that_is_wrong_is_said_at_once(refuses, copied):
    def change(tensors):
        return {**without(NORM)(tensors), "odd": torch.ones(1), EMBEDDING: tensors[EMBEDDING][:-1]}

    refuses(copied("llama-gqa", tensors=change), NORM, "(odd)", f"{EMBEDDING} is [259, 48], config.json says [260, 48]")


@pytest.mark.parametrize("solving", [(), ("--shape", "per-layer")], ids=["stock", "per-layer"])
def test_old_buffers_are_left_out_and_a_stored_copy_of_a_tied_embedding_is_carried(solving, chain, copied):
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.arange(8.0) for i in (0, 1)}
    source = copied("llama-gqa-tied", tensors=lambda tensors: {**tensors, **old, HEAD: tensors[EMBEDDING]})
    written = load_file(chain(source, solving=solving) / SINGLE)
    assert torch.equal(written[HEAD], load_file(source / SINGLE)[EMBEDDING])
    assert not written.keys() & old.keys()


@pytest.mark.parametrize("change", [lambda t: t + 1, lambda t: t.half()], ids=["values", "dtype"])
def test_a_tied_embedding_that_is_stored_twice_and_differs(change, refuses, copied):
    folder = copied("llama-gqa-tied", tensors=lambda tensors: {**tensors, HEAD: change(tensors[EMBEDDING])})
    refuses(folder, f"ties {HEAD} to {EMBEDDING}", "different values", "tie_word_embeddings")


@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_the_tensors_of_its_class(name, checkpoint):
    """The family's names and shapes match those of the class exactly."""
    source = Checkpoint(checkpoint(name))
    model = describe(source)
    stored = {name: info.shape for name, info in model.source.tensors.items()}
    assert stored == {name: shape for name, shape in model.stock.shapes.items() if name not in model.stock.tied}
    assert not model.source.stored_otherwise


# Base-model checkpoints


@pytest.mark.parametrize("name", ["llama-gqa-tied", "starcoder2-gqa", "qwen2-gqa"])
def test_a_checkpoint_of_the_base_model(name, a3, chain, checkpoint, text_file, tmp_path):
    """A checkpoint saved by `AutoModel` gives the same export as the whole model, prefix included."""
    whole = checkpoint(name, tie_word_embeddings=True)
    base = Path(shutil.copytree(whole, tmp_path / "base"))
    AutoModel.from_pretrained(whole).save_pretrained(base)
    assert "layers.0.mlp" in " ".join(load_file(base / SINGLE))
    assert not any(name.startswith("model.") for name in load_file(base / SINGLE))
    ours, theirs = chain(base, name="ours"), chain(whole, name="theirs")
    written = load_file(ours / SINGLE)
    assert written.keys() == load_file(theirs / SINGLE).keys()
    assert all(torch.equal(written[name], value) for name, value in load_file(theirs / SINGLE).items())
    assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    assert a3("plan", base, *PLANNED, "--json").json["weights"]["checked"] == "tensors"
    text = ("--dataset", text_file, "--samples", 2, "--seq-len", 32, "--json")
    measured = [a3("eval", out, "--against", of, *text).json for out, of in ((ours, base), (theirs, whole))]
    assert measured[0]["kl"] == measured[1]["kl"]


def test_a_checkpoint_of_the_base_model_without_an_output_layer(refuses, checkpoint, tmp_path):
    base = Path(shutil.copytree(checkpoint("llama-gqa"), tmp_path / "base"))
    AutoModel.from_pretrained(base).save_pretrained(base)
    refuses(base, f"untied embeddings, but 1 tensor is missing ({HEAD})")


def test_a_tensor_stored_with_and_without_prefix(refuses, copied):
    folder = copied("llama-gqa", tensors=lambda tensors: {**tensors, "norm.weight": tensors["model.norm.weight"]})
    refuses(folder, "1 tensor is stored with and without model. (norm.weight)")


# RoPE given twice


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": 500000.0}, ("rope_theta is 500000.0 at its top and 10000.0 in rope_parameters",)),
        ({"rope_scaling": LINEAR}, ("rope_type is 'linear' at its top and 'default' in rope_parameters",)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ("rope_type is 'linear'",)),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": LINEAR},
            ("factor is 4 at its top and 2.0 in rope_parameters",),
        ),
        ({"rope_scaling": None, "rope_parameters": LINEAR}, ("rope_type is 'default' at its top and 'linear'",)),
        (
            {"rope_theta": 1e5, "rope_scaling": {**LLAMA3, "rope_theta": 1e5}, "rope_parameters": LLAMA3},
            ("rope_theta is 100000.0 at its top and 10000.0",),
        ),
        ({"partial_rotary_factor": 0.5, "rope_parameters": {**LINEAR, "partial_rotary_factor": 1}}, ("is 0.5 at its",)),
    ],
)
def test_rope_that_contradicts_itself(changes, words, refuses, copied):
    refuses(copied("llama-gqa", config=changes), "config.json", "transformers 4.57 and 5", *words)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 10000, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": {"rope_theta": 10000}},
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": LINEAR},
        {
            "rope_scaling": {"type": "llama3", **{k: v for k, v in LLAMA3.items() if k != "rope_type"}},
            "rope_parameters": LLAMA3,
        },
        {"rope_scaling": {k: v for k, v in LONGROPE.items() if k != "rope_theta"}, "rope_parameters": LONGROPE},
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": None, "rope_parameters": LINEAR},
    ],
)
def test_rope_that_is_said_twice_alike(config, tmp_path):
    check_rope_spellings(config, tmp_path / "config.json")


@pytest.mark.parametrize("name", ["llama-gqa", "llama-linear", "llama-llama3", "llama-longrope", "nemotron-gqa"])
@pytest.mark.parametrize("shape", ["stock", "per-layer"])
def test_our_own_exports_say_it_twice_alike(name, shape, a3, checkpoint, text_file, tmp_path):
    work, out = ("--work", tmp_path / "work"), tmp_path / "out"
    assert a3(*calibrate(checkpoint(name), text_file, work[1])).code == 0
    sizes = ("--attention-budget", 0.3, "--mlp-budget", 0.2, *SOLVE[3:])
    assert a3("solve", *sizes, "--shape", shape, "--method", "paper", *work).code == 0
    assert a3("export", out, *work).code == 0
    config = json.loads((out / "config.json").read_text())
    assert {"rope_theta", "rope_scaling", "rope_parameters"} <= config.keys()
    check_rope_spellings(config, out / "config.json")
    if shape == "stock":
        found = a3("plan", out, *PLANNED, "--budget", 0.1, "--json").json
        assert found["weights"] == {"checked": "tensors", "reason": None}


# Files that do not belong to the model


def test_stale_files_are_not_carried(chain, copied):
    source = copied("llama-gqa")
    for name in ("pytorch_model.bin.index.json", "other.index.json", "params.json", "adapter_model.json"):
        (source / name).write_text("{}")
    for name in ("chat_template.jinja", "LICENSE", "tekken.json"):
        (source / name).write_text("{}")
    written = {path.name for path in chain(source).iterdir()}
    assert {"chat_template.jinja", "LICENSE", "tekken.json"} <= written
    assert not {name for name in written if "index" in name or name.startswith(("params", "adapter"))}


@pytest.mark.parametrize("weights", [True, False])
def test_an_adapter(weights, refuses, a3, copied, text_file):
    source = copied("llama-gqa")
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (source / SINGLE).unlink() if not weights else None
    refuses(source, str(source / "adapter_config.json"), "peft", "merge the adapter")
    refused(a3("eval", source, "--dataset", text_file, "--samples", 1), "adapter_config.json", "merge the adapter")


# Links that leave the folder


@pytest.fixture
def linked(checkpoint, tmp_path) -> Path:
    """Return a folder of symbolic links to a store beside it."""
    store = Path(shutil.copytree(checkpoint("llama-gqa"), tmp_path / "store"))
    folder = tmp_path / "linked"
    folder.mkdir()
    for path in store.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def test_links_are_followed_only_if_that_is_asked_for(refuses, a3, linked, text_file):
    refuses(linked, "symbolic link out of its folder", "an export would publish", "--follow-symlinks")
    text = ("--dataset", text_file, "--samples", 1, "--seq-len", 32)
    refused(a3("eval", linked, *text), "symbolic link", "--follow-symlinks")
    assert a3("eval", linked, *text, "--follow-symlinks").code == 0
    assert a3("plan", linked, *PLANNED, "--follow-symlinks").code == 0


def test_every_stage_knows_that_links_were_allowed(a3, chain, linked, text_file, tmp_path):
    out, work = chain(linked, "--follow-symlinks"), tmp_path / "made" / "work"
    assert not any(path.is_symlink() for path in out.iterdir())
    points = ("--budgets", "0.25", "--mlp-multiple", 8, "--head-multiple", 2)
    measured = a3("pareto", *points, "--work", work, "--dataset", text_file, "--samples", 1, "--seq-len", 32)
    assert measured.code == 0, measured.stderr
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in work.rglob("*.*") if path.is_file()}
    assert a3(*calibrate(linked, text_file, work, "--follow-symlinks")).code == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    refused(a3(*calibrate(linked, text_file, work)), "symbolic link")
    for path in (tmp_path / "store").iterdir():
        (linked / path.name).unlink()
        shutil.copyfile(path, linked / path.name)
    statistics = snapshot(work / "calibration")
    assert a3(*calibrate(linked, text_file, work)).code == 0  # the regular files: same request, same statistics
    assert snapshot(work / "calibration") == statistics
    source = work / "source.json"
    assert json.loads(source.read_text())["follow_symlinks"] is False
    written = source.read_bytes(), source.stat().st_mtime_ns
    assert a3(*calibrate(linked, text_file, work, "--follow-symlinks")).code == 0
    assert (source.read_bytes(), source.stat().st_mtime_ns) == written
    (linked / "LICENSE").symlink_to(tmp_path / "store" / "config.json")
    refused(a3("export", tmp_path / "other", "--work", work), "LICENSE", "symbolic link")


@pytest.mark.slow
def test_links_in_a_recipe(a3, linked, text_file, tmp_path):
    text = {"dataset": str(text_file), "samples": 2, "seq_len": 32}
    recipe = {
        "work": "work",
        "out": "out",
        "calibrate": {"model": str(linked), "text": text, "follow_symlinks": True},
        "solve": {"budget": 0.25, "mlp_multiple": 8, "head_multiple": 2, "method": "paper"},
        "eval": {"against": str(linked), "text": text, "follow_symlinks": True},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    outcome = a3("run", tmp_path / "recipe.yaml", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["eval"]["against"] == str(linked)


# The Hub's cache


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
watched: list[Path] = []  # if a test puts a folder here, operations on files below it are recorded in `done`
done: list[tuple[object, ...]] = []


def watch(event: str, arguments: tuple[object, ...]) -> None:
    if watched and any(str(each).startswith(str(watched[0])) for each in arguments):
        changing = event.startswith("os.") and event not in ("os.listdir", "os.scandir", "os.getxattr")
        if changing or (event == "open" and arguments[2] & WRITING):
            done.append((event, *arguments))


def into_cache(source: Path, cache: Path, commit: str = "0" * 40) -> None:
    """Copy a source to the Hub cache's layout, with read-only blobs."""
    home = cache / "models--o--n"
    for folder in (home / "blobs", home / "snapshots" / commit, home / "refs"):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted(source.iterdir())):
        blob = home / "blobs" / f"{number:040x}"
        shutil.copyfile(path, blob)
        blob.chmod(0o444)
        (home / "snapshots" / commit / path.name).symlink_to(Path("..", "..", "blobs", blob.name))


def inodes(folder: Path) -> dict[str, object]:
    """Return what changes if a file is written to, replaced or linked to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        at = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[str(path)] = (at.st_ino, at.st_mtime_ns, at.st_ctime_ns, at.st_nlink, at.st_mode, content)
    return found


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Return a temporary Hub cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_hubs_cache_is_only_read(a3, chain, checkpoint, cache, text_file):
    into_cache(checkpoint("llama-gqa", max_shard_size="40KB"), cache)
    before = inodes(cache)
    sys.addaudithook(watch)
    watched.append(cache)
    try:
        (cache / "models--o--n" / "refs" / "main").open("r+").close()
        assert done.pop()[0] == "open"  # the hook works
        out = chain("o/n")
        text = ("--dataset", text_file, "--samples", 1, "--seq-len", 32)
        assert a3("eval", out, "--against", "o/n", *text).code == 0
        assert a3("plan", "o/n", *PLANNED, "--json").json["weights"]["checked"] == "tensors"
    finally:
        watched.clear()
    assert not done
    assert inodes(cache) == before
    for path in out.iterdir():
        assert not path.is_symlink()
        assert path.stat().st_nlink == 1


# The Hub


COMMIT = "1" * 40


class Hub(ThreadingHTTPServer):
    """A local Hub with one repository, `o/n`: its files, and the requests as (method, file, range)."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files, self.asked, self.headers_broken = files, [], False

    @property
    def downloaded(self) -> set[str]:
        return {file for method, file, part in self.asked if method == "GET" and part is None}


class HubRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        files = self.server.files
        if path.startswith("/api/models/o/n/revision/"):
            self.send({"id": "o/n", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif path.startswith("/api/models/o/n/tree/"):
            entries = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
            self.send([{"type": "file", "path": n, "size": len(files[n]), "oid": oid} for n, oid in entries.items()])
        elif path.startswith("/o/n/resolve/") and (name := path.split("/", 5)[5]) in files:
            self.send_file(name, files[name])
        else:
            self.send({"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound"})

    def send_file(self, name: str, data: bytes) -> None:
        part = self.headers.get("range")
        self.server.asked.append((self.command, name, part))
        if part and self.server.headers_broken:
            self.send({"error": "no ranges here"}, 500)
            return
        code, tag = 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if part:
            first, last = part.removeprefix("bytes=").split("-")
            code, data = 206, data[int(first) : int(last) + 1]
        self.send(data, code, **tag)

    def send(self, content: Any, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(cache, monkeypatch) -> Iterator[Callable[..., Hub]]:
    """Serve a folder's files from the local Hub, with further ones."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.hf_api import api

    with ExitStack() as stack:

        def serve(folder: Path, **more: bytes) -> Hub:
            files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
            server = stack.enter_context(Hub(files | more))
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            endpoint = f"http://127.0.0.1:{server.server_port}"
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(constants, "ENDPOINT", endpoint)
            template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            monkeypatch.setattr(api, "endpoint", endpoint)
            return server

        yield serve
        huggingface_hub.close_session()


OTHERS = {
    "consolidated.safetensors": b"a second copy",
    "model.fp16.safetensors": b"a variant",
    "model-00001-of-00002.fp16.safetensors": b"a variant",
    "pytorch_model.bin": b"a pickle",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"a pickle",
    "onnx/model.safetensors": b"another format",
}


@pytest.mark.parametrize("size", ["40KB", "5GB"])
def test_only_weights_that_are_read_are_downloaded(size, a3, hub, checkpoint, text_file, tmp_path):
    folder = checkpoint("llama-gqa", max_shard_size=size)
    server = hub(folder, **OTHERS)
    assert a3(*calibrate("o/n", text_file, tmp_path / "work")).code == 0
    assert server.downloaded == {path.name for path in folder.iterdir()}
    server.asked.clear()
    assert a3(*SOLVE, "--work", tmp_path / "work").code == 0
    assert a3("export", tmp_path / "out", "--work", tmp_path / "work").code == 0
    assert json.loads((tmp_path / "out" / "a3_manifest.json").read_text())["source"]["model"] == "o/n"
    found = a3("inspect", tmp_path / "work", "--json").json
    assert found["warnings"] is not None
    assert not [each for each in found["warnings"] if "source was not found" in each]
    assert not server.downloaded


def test_both_sets_of_weights_of_a_repository_are_compared(a3, hub, source, text_file, tmp_path):
    """transformers would load the single file, so it must be compared too."""
    save_file(merged(source), source / SINGLE)
    edit_tensors(source / SINGLE, lambda tensors: {**tensors, NORM: tensors[NORM] * 2})
    hub(source)
    refused(a3(*calibrate("o/n", text_file, tmp_path / "work")), SINGLE, INDEX, NORM, "different tensors")


@pytest.mark.parametrize("size", ["40KB", "5GB"])
def test_a_plan_reads_headers_from_the_hub(size, a3, hub, checkpoint):
    server = hub(checkpoint("llama-gqa", max_shard_size=size), **OTHERS)
    outcome = a3("plan", "o/n", *PLANNED, "--json")
    assert outcome.json["weights"] == {"checked": "tensors", "reason": None}
    assert server.downloaded == {"config.json", *([INDEX] if size == "40KB" else [])}
    assert "names, shapes and dtypes were checked" in a3("plan", "o/n", *PLANNED).stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(NORM), ("o/n", f"1 tensor is missing ({NORM})")),
        (lambda tensors: {**tensors, NORM: tensors[NORM][:-1]}, ("o/n", f"{NORM} is [47], config.json says [48]")),
        (lambda tensors: {**tensors, NORM: tensors[NORM].to(torch.int8)}, ("o/n", f"{NORM} is I8", "quantised")),
        (lambda tensors: {**tensors, "odd": torch.ones(1)}, ("o/n", "(odd)")),
    ],
    ids=["missing", "shape", "dtype", "unknown"],
)
def test_a_plan_refuses_what_calibrate_would(change, words, a3, hub, copied):
    hub(copied("llama-gqa", tensors=change))
    refused(a3("plan", "o/n", *PLANNED), *words)


def test_a_plan_of_two_sets_of_weights_on_the_hub(a3, hub, source):
    save_file(merged(source), source / SINGLE)
    hub(source)
    assert a3("plan", "o/n", *PLANNED).code == 0
    edit_tensors(source / SINGLE, without(NORM))
    hub(source)
    shutil.rmtree(Path(huggingface_cache()) / "models--o--n")
    refused(a3("plan", "o/n", *PLANNED), SINGLE, INDEX, NORM)


def huggingface_cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def test_a_plan_without_headers_takes_the_names_of_the_index(a3, hub, source):
    hub(source).headers_broken = True
    found = a3("plan", "o/n", *PLANNED, "--json").json["weights"]
    assert found["checked"] == "names"
    assert "headers could not be read" in found["reason"]
    assert "only the weights' names were checked" in a3("plan", "o/n", *PLANNED).stdout
    edit_json(source / "config.json", {"attention_bias": True})
    hub(source).headers_broken = True
    shutil.rmtree(Path(huggingface_cache()) / "models--o--n")
    refused(a3("plan", "o/n", *PLANNED), "o/n", "missing (model.layers.0.self_attn.q_proj.bias")


def test_a_plan_without_headers_or_index_says_so(a3, hub, checkpoint):
    hub(checkpoint("llama-gqa")).headers_broken = True
    found = a3("plan", "o/n", *PLANNED, "--json").json["weights"]
    assert found["checked"] == "nothing"
    assert "headers could not be read" in found["reason"]
    assert "the weights were not checked" in a3("plan", "o/n", *PLANNED).stdout


def test_a_plan_refuses_an_adapter_on_the_hub(a3, hub, checkpoint):
    hub(checkpoint("llama-gqa"), **{"adapter_config.json": b"{}"})
    refused(a3("plan", "o/n", *PLANNED), "adapter_config.json", "merge")


def test_a_plan_of_a_folder_without_weights(a3, source):
    """With only an index the names are checked, with only config.json nothing; with any shard, all must exist."""
    shards = sorted(source.glob("model-*"))
    shards[0].rename(source / "elsewhere")
    refused(a3("plan", source, *PLANNED), "model-00001-of-00007.safetensors is missing")
    for shard in shards[1:]:
        shard.unlink()
    found = a3("plan", source, *PLANNED, "--json").json["weights"]
    assert (found["checked"], found["reason"]) == ("names", f"no safetensors weights in {source}")
    (source / INDEX).unlink()
    assert a3("plan", source, *PLANNED, "--json").json["weights"]["checked"] == "nothing"
    assert "the weights were not checked: no safetensors" in a3("plan", source, *PLANNED).stdout
