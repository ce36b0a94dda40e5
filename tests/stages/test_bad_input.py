"""Bad input: one line that says what failed and where, exit code 2, and nothing left behind."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import SHORT, SOLVE, Outcome, build_tokenizer, but, refused, snapshot
from tests.helpers.damage import flip

pytestmark = pytest.mark.usefixtures("hasty")


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return damage


def write_config(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(content) and None


def edit_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
        tensors = load_file(shard)
        save_file({**tensors, name: change(tensors[name].clone())}, shard)

    return damage


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[-1] = float("nan")
    return tensor


def pickle_only(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not read")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def truncate_shard(folder: Path) -> None:
    os.truncate(shards(folder)[2], shards(folder)[2].stat().st_size - 10)


def garble_header(folder: Path) -> None:
    shards(folder)[1].write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def edit_index(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.norm.weight"] = file
        path.write_text(json.dumps(index))

    return damage


def drop_tensor(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for shard in shards(folder):
            save_file({key: value for key, value in load_file(shard).items() if key != name}, shard)

    return damage


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def save_wide_tokenizer(folder: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["def", "return", "import", "se", "re", "in"])
    tokenizer.save_pretrained(folder)


DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
SUPPORTED = (
    "gemma2, gemma3_text, gpt2, granite, llama, ministral3, mistral, mixtral, mpt, nemotron, olmo2, opt, phi3, qwen2, "
    "qwen3, qwen3_5_text, qwen3_moe, smollm3, starcoder2 "
)
DAMAGES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "gone": (shutil.rmtree, ("source",)),
    "unknown family": (edit_config(model_type="bert"), ("'bert'", SUPPORTED, "docs/add-a-family.md")),
    "unknown activation": (edit_config(hidden_act="swish\x9f"), ("config.json", "hidden_act", "transformers")),
    "more layers than configured": (edit_config(num_hidden_layers=1), ("model.layers.1.", "config.json says 1 layers")),
    "a mixture of experts": (edit_config(model_type="qwen2_moe"), ("'qwen2_moe'", SUPPORTED)),
    "no family": (edit_config(model_type=None), ("None", SUPPORTED)),
    "pickle only": (pickle_only, ("pickle", "safetensors")),
    "truncated shard": (truncate_shard, ("model-00003", "truncated")),
    "garbled header": (garble_header, ("model-00002",)),
    "missing shard": (lambda folder: shards(folder)[0].unlink(), ("model-00001", "missing")),
    "shard outside": (edit_index("../elsewhere.safetensors"), ("../elsewhere.safetensors",)),
    "index without map": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        ("weight_map",),
    ),
    "NaN in a linear layer": (edit_tensor(DOWN, with_nan), (DOWN, "NaN")),
    "NaN in the embedding": (edit_tensor("model.embed_tokens.weight", with_nan), ("embed_tokens", "NaN")),
    "integer weights": (edit_tensor(DOWN, lambda t: t.to(torch.int8)), (DOWN, "I8")),
    "wrong shape": (edit_tensor(DOWN, lambda t: t[:, :-1].contiguous()), (DOWN, "config.json")),
    "missing linear layer": (drop_tensor(DOWN), (DOWN,)),
    "missing norm": (drop_tensor(NORM), (NORM,)),
    "quantised": (edit_config(quantization_config={"quant_method": "gptq"}), ("quantised",)),
    "dynamic RoPE": (
        edit_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        ("dynamic", "RoPE"),
    ),
    "partial rotary": (
        edit_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("partial_rotary_factor",),
    ),
    "RoPE without its factor": (
        edit_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        ("config.json", "factor"),
    ),
    "unknown RoPE": (edit_config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), ("spiral",)),
    "no config": (lambda folder: (folder / "config.json").unlink(), ("config.json", "missing")),
    "config not JSON": (write_config("{"), ("config.json", "JSON")),
    "config a list": (write_config("[]"), ("config.json", "list")),
    "impossible heads": (edit_config(num_key_value_heads=3), ("config.json",)),
    "negative width": (edit_config(intermediate_size=-4), ("config.json",)),
    "width of the wrong type": (edit_config(hidden_size="wide"), ("config.json",)),
    "no heads": (edit_config(num_attention_heads=0), ("config.json",)),
    "another width": (edit_config(intermediate_size=100), ("mlp.gate_proj", "[96, 48]", "[100, 48]")),
    "another vocabulary": (edit_config(vocab_size=300), ("embed_tokens", "[260, 48]", "[300, 48]")),
    "more layers than weights": (edit_config(num_hidden_layers=9), ("model.layers.2",)),
    "no tokenizer": (remove_tokenizer, ("tokenizer",)),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), ("tokenizer",)),
    "tokenizer of another model": (save_wide_tokenizer, ("vocabulary",)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(damage, a3, source, text_file, tmp_path):
    inflict, words = DAMAGES[damage]
    inflict(source)
    before = snapshot(tmp_path)
    refused(a3("calibrate", source, "--dataset", text_file, *SHORT, "--work", tmp_path / "new" / "work"), *words)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("model", ["nowhere", "no where!", "./nowhere", "/nowhere", "owner/nowhere", "a/b/nowhere"])
def test_no_such_model(model, a3, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(a3("calibrate", model, "--dataset", text_file, *SHORT), model, "Hub")
    refused(a3("eval", model, "--dataset", text_file), model, "Hub")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_a_folder_of_the_user_as_it_was(a3, source, text_file, tmp_path):
    edit_tensor(DOWN, with_nan)(source)
    (tmp_path / "work" / "mine").mkdir(parents=True)
    before = snapshot(tmp_path)
    refused(a3("calibrate", source, "--dataset", text_file, *SHORT, "--work", tmp_path / "work"), DOWN)
    assert snapshot(tmp_path) == before


def make(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return build


def folder_with_a_bad_file(folder: Path) -> Path:
    (folder / "data").mkdir()
    make("a.txt", "x" * 999)(folder / "data")
    make("b.jsonl", '{"body": "x"}\n')(folder / "data")
    return folder / "data"


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


TEXTS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no such file": (lambda folder: folder / "nothing.txt", ("nothing.txt",)),
    "no such name": (lambda folder: "wikitext3", ("wikitext3", "wikitext2")),
    "hub set, offline": (lambda folder: "owner/name", ("owner/name",)),
    "no text field": (make("t.jsonl", '{"body": "x", "title": "y"}\n'), ("'text'", "body, title", "--text-field")),
    "field no text": (make("t.jsonl", '{"text": 5}\n'), ("row 1", "'text'", "not text")),
    "field missing in one row": (
        make("t.jsonl", '{"text": "x"}\n{"body": "y"}\n'),
        ("1 tokens give 0 blocks", "skipped 1 of 2 rows without text"),
    ),
    "no row with text": (
        make("t.jsonl", '{"text": null}\n{"text": ""}\n{"text": " \\n"}\n'),
        ("all of its 3 rows are without text", "--text-field"),
    ),
    "messages": (make("t.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n'), ("row 1", "no chat template")),
    "conversations": (make("t.jsonl", '{"conversations": [{"from": "human"}]}\n'), ("row 1, turn 1: has neither",)),
    "no messages": (make("t.jsonl", '{"messages": []}\n'), ("all of its 1 rows are without text",)),
    "one file of a folder": (folder_with_a_bad_file, ("b.jsonl", "'text'")),
    "fields of two types": (make("t.jsonl", '{"text": "x"}\n{"text": [1]}\n'), ("t.jsonl",)),
    "malformed jsonl": (make("t.jsonl", '{"text": "x"\n{{{\n'), ("t.jsonl",)),
    "malformed late": (make("t.jsonl", '{"text": "x"}\n' * 9 + "{{{\n"), ("t.jsonl",)),
    "jsonl not UTF-8": (make("t.jsonl", b'{"text": "\xff\xfe"}\n'), ("t.jsonl",)),
    "empty jsonl": (make("t.jsonl", ""), ("t.jsonl",)),
    "malformed parquet": (make("t.parquet", b"PAR1garbage"), ("t.parquet",)),
    "not UTF-8": (make("t.txt", b"\xff\xfe\x00\xd8" * 999), ("t.txt", "UTF-8")),
    "too little": (make("t.txt", "x" * 80), ("80 tokens give 2 blocks of 32", "3 were asked for")),
    "empty": (make("t.txt", ""), ("0 blocks",)),
    "empty folder": (empty_folder, ("empty", ".jsonl")),
    "other suffix": (make("t.csv", "a,b"), ("t.csv", ".jsonl")),
}


@pytest.mark.parametrize("text", TEXTS)
def test_bad_text(text, a3, checkpoint, tmp_path):
    build, words = TEXTS[text]
    dataset = build(tmp_path)
    before = snapshot(tmp_path)
    refused(a3("calibrate", checkpoint("llama-gqa"), "--dataset", dataset, *SHORT, "--work", tmp_path / "work"), *words)
    assert snapshot(tmp_path) == before


def test_chat_without_a_template(a3, checkpoint, tmp_path):
    dataset = make("t.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n')(tmp_path)
    outcome = a3("calibrate", checkpoint("llama-gqa"), "--dataset", dataset, *SHORT, "--chat", "--work", tmp_path / "w")
    refused(outcome, "row 1", "chat template")
    assert not (tmp_path / "w").exists()


BAD_SETTINGS: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "budget negative": (("solve", "--budget", -0.1), ("--budget -0.1",)),
    "budget one": (("solve", "--budget", 1), ("--budget 1",)),
    "budget above one": (("solve", "--budget", 1.5), ("--budget 1.5",)),
    "budget nan": (("solve", "--budget", "nan"), ("--budget nan",)),
    "budget no number": (("solve", "--budget", "half"), ("--budget", "solve --help")),
    "unknown option": (("solve", "--budgets", 0.1), ("--budgets", "solve --help")),
    "missing argument": (("export",), ("Missing argument", "export --help")),
    "unknown command": (("compress",), ("compress",)),
    "no budget": (("solve",), ("--budget",)),
    "three budgets": (("solve", "--budget", 0.2, "--attention-budget", 0.1, "--mlp-budget", 0.3), ("contradict",)),
    "unreachable": (("solve", "--budget", 0.9), ("0.9", "cannot be reached", "at most")),
    "unreachable with these multiples": (
        ("solve", "--budget", 0.1, "--head-multiple", 1000, "--mlp-multiple", 1000),
        ("cannot be reached", "head multiple 1000", "MLP multiple 1000", "at most 0.0000"),
    ),
    "unreachable MLP": (("solve", "--mlp-budget", 0.5, "--mlp-multiple", 96), ("MLP", "cannot be reached")),
    "unreachable attention": (("solve", "--attention-budget", 0.6), ("attention", "cannot be reached")),
    "qk alone": (("solve", "--budget", 0.1, "--components", "qk"), ("one head size",)),
    "no such component": (("solve", "--budget", 0.1, "--components", "qkv"), ("--components", "qkv")),
    "no component": (("solve", "--budget", 0.1, "--components", ""), ("components",)),
    "odd head size": (("solve", "--budget", 0.1, "--head-multiple", 3), ("even",)),
    "no such method": (("solve", "--budget", 0.1, "--method", "magic"), ("--method", "magic")),
    "attention budget without attention": (
        ("solve", "--attention-budget", 0.2, "--components", "mlp"),
        ("--attention-budget",),
    ),
    "shard size": (("export", "OUT", "--max-shard-size", "5 apples"), ("--max-shard-size", "5 apples", "5GB")),
    "export dtype": (("export", "OUT", "--dtype", "int8"), ("--dtype", "int8")),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_leave_everything_as_it_was(name, a3, work, tmp_path, monkeypatch):
    """Even the solution that --overwrite would have replaced stays."""
    command, words = BAD_SETTINGS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("A3_WORK", str(work))
    before = snapshot(tmp_path)
    refused(a3(*command, *(["--overwrite"] if command[0] == "solve" else [])), *words)
    assert snapshot(tmp_path) == before


def test_bad_settings_are_reported_together(a3, checkpoint, text_file, tmp_path):
    options = ("--samples", 0, "--seq-len", 1, "--batch-size", 0, "--mlp-stats", "some", "--dtype", "int4")
    outcome = a3("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *options, "--work", tmp_path / "w")
    refused(outcome, "--samples 0", "--seq-len 1", "--batch-size 0", "--mlp-stats 'some'", "--dtype 'int4'")
    outcome = a3("solve", "--components", "mlp,qk", "--head-multiple", 3, "--work", tmp_path / "w")
    refused(outcome, "no budget", "one head size", "even")
    refused(a3("export", "out", "--dtype", "int4", "--max-shard-size", "x"), "--dtype 'int4'", "--max-shard-size 'x'")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_bad_device(device, a3, checkpoint, text_file, tmp_path):
    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *SHORT, "--device", device)
    refused(a3(*command, "--work", tmp_path / "work"), "--device", device)
    assert not (tmp_path / "work").exists()


def test_blocks_longer_than_the_context(a3, checkpoint, text_file, tmp_path):
    command = ("--dataset", text_file, "--samples", 1, "--seq-len", 257)
    refused(a3("calibrate", checkpoint("llama-gqa"), *command, "--work", tmp_path / "work"), "257", "context", "256")
    assert not (tmp_path / "work").exists()
    refused(a3("eval", checkpoint("llama-gqa"), *command), "257", "context", "256")


@pytest.mark.parametrize(
    "command", [("calibrate", "nowhere"), ("solve",), SOLVE, ("export", "out"), ("eval", "nowhere")]
)
def test_with_json_an_error_prints_nothing_on_stdout(command, a3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(a3(*command, "--json"))
    assert not list(tmp_path.iterdir())


def test_stages_out_of_order(a3, checkpoint, text_file, tmp_path):
    refused(a3(*SOLVE, "--work", tmp_path / "work"), "a3 calibrate")
    refused(a3("export", tmp_path / "new" / "out", "--work", tmp_path / "work" / "new"), "a3 solve")
    assert not list(tmp_path.iterdir())
    calibrated = tmp_path / "calibrated"
    assert a3("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *SHORT, "--work", calibrated).code == 0
    before = snapshot(tmp_path)
    refused(a3("export", tmp_path / "new" / "out", "--work", calibrated), "a3 solve")
    assert snapshot(tmp_path) == before


def test_work_folder_of_another_model_or_request(a3, work, source, checkpoint, text_file):
    before = snapshot(work)
    for command, word in (
        (("calibrate", checkpoint("llama-mha"), "--dataset", text_file, *SHORT), "source"),
        (("calibrate", source, "--dataset", text_file, "--samples", 2, "--seq-len", 32), "(differs in samples)"),
        (("calibrate", source, "--dataset", text_file, *SHORT, "--mlp-stats", "diagonal"), "(differs in mlp_stats)"),
        (("solve", "--budget", 0.3, *SOLVE[3:]), "(differs in budget)"),
    ):
        refused(a3(*command, "--work", work), "--overwrite", word)
    assert snapshot(work) == before


def test_source_replaced_after_calibration(a3, work, source, checkpoint, tmp_path):
    shutil.rmtree(source)
    shutil.copytree(checkpoint("llama-gqa", seed=3), source)
    before = snapshot(tmp_path)
    refused(a3("export", tmp_path / "out", "--work", work), str(source), "calibrate")
    refused(a3(*SOLVE, "--overwrite", "--work", work), str(source), "calibrate")
    assert snapshot(tmp_path) == before
    shutil.rmtree(source)
    refused(a3("export", tmp_path / "out", "--work", work), str(source), "give --source NEWPATH")


def edit(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"versions": {}}))


SOLVE_AGAIN, EXPORT = (*SOLVE, "--overwrite"), ("export", "out")
TAMPERED = [
    (SOLVE_AGAIN, flip, "calibration/layer-000.safetensors"),
    (SOLVE_AGAIN, Path.unlink, "calibration/layer-001.safetensors"),
    (SOLVE_AGAIN, flip, "calibration/manifest.json"),
    (SOLVE_AGAIN, edit, "calibration/manifest.json"),
    (SOLVE_AGAIN, Path.unlink, "source.json"),
    (EXPORT, edit, "calibration/manifest.json"),
    (EXPORT, Path.unlink, "calibration/manifest.json"),
    (EXPORT, flip, "solution/layer-001.safetensors"),
    (EXPORT, Path.unlink, "solution/layer-000.safetensors"),
    (EXPORT, flip, "solution/manifest.json"),
    (EXPORT, edit, "solution/manifest.json"),
]


@pytest.mark.parametrize(("command", "tamper", "name"), TAMPERED)
def test_tampered_work_folder(command, tamper, name, a3, work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tamper(work / name)
    before = snapshot(tmp_path)
    refused(a3(*command, "--work", work), str(work / name))
    assert snapshot(tmp_path) == before


def test_a_solution_of_another_calibration(a3, work, source, text_file, tmp_path):
    earlier = snapshot(work / "solution")
    command = ("calibrate", source, "--dataset", text_file, "--samples", 2, "--seq-len", 32, "--overwrite")
    assert a3(*command, "--work", work).code == 0
    assert not (work / "solution").exists()
    (work / "solution").mkdir()
    for name, data in earlier.items():
        (work / "solution" / name).write_bytes(data)
    before = snapshot(tmp_path)
    refused(a3("export", tmp_path / "out", "--work", work), "another calibration", "a3 solve --overwrite")
    assert snapshot(tmp_path) == before


def test_no_disk_space_is_seen_before_work_begins(a3, work, source, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 1))
    before = snapshot(tmp_path)
    for command in (
        ("export", tmp_path / "new" / "out", "--work", work),
        ("solve", "--budget", 0.2, "--method", "paper", "--overwrite", "--work", work),
        ("calibrate", source, "--dataset", text_file, *SHORT, "--work", tmp_path / "new" / "work"),
        ("calibrate", source, "--dataset", text_file, "--samples", 2, "--seq-len", 32, "--work", work, "--overwrite"),
    ):
        refused(a3(*command), "no disk space", "GB", str(tmp_path))
        assert snapshot(tmp_path) == before


@contextmanager
def no_file_larger(size: int) -> Iterator[None]:
    """Limit the size of files to `size` bytes: the kernel rejects larger ones, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "stops_at"),
    [
        (500, "tokens.safetensors"),
        (1100, "progress.json"),
        (12_000, "hidden-next.bin"),
        (20_000, "layer-000.safetensors"),
    ],
)
def test_a_disk_that_fills_up_in_a_calibration(size, stops_at, a3, source, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("a3cli.models.costs.HELD_OUT_TOKENS", 0)  # the file of tokens must be the smallest
    before = snapshot(tmp_path)
    with no_file_larger(size):
        outcome = a3("calibrate", source, "--dataset", text_file, *SHORT, "--quiet", "--work", tmp_path / "a" / "work")
    refused(outcome, stops_at, "cannot be written")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("size", [100, 2000])
@pytest.mark.parametrize("command", [SOLVE_AGAIN, ("export", "new/out"), ("export", "old", "--overwrite")])
def test_a_disk_that_fills_up_in_a_later_stage(command, size, a3, work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert a3("export", "old", "--work", work).code == 0

    def files() -> dict[str, Any]:
        return {name: data for name, data in snapshot(tmp_path).items() if "kept/layer-" not in name}

    before = files()
    with no_file_larger(size):
        outcome = a3(*command, "--quiet", "--work", work)
    refused(outcome, "cannot be written", f"{work}{os.sep}" if command == SOLVE_AGAIN else "model.safetensors")
    assert files() == before
    assert a3(*command, "--quiet", "--work", work).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", [("calibrate", "source", *SHORT), ("export", "out")])
def test_a_disk_that_fills_up_under_a_real_process(command, work, text_file, tmp_path):
    """stderr has only this error: no library output and no traceback."""
    text = ("--dataset", text_file, "--work", "new") if command[0] == "calibrate" else ("--work", work)
    before = snapshot(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-m", "a3cli", *map(str, (*command, *text, "--quiet"))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000)),
    )
    refused(Outcome(ended.returncode, ended.stdout, ended.stderr), "cannot be written")
    assert snapshot(tmp_path) == before


def test_an_unfinished_calibration_outlives_every_failure(a3, source, text_file, tmp_path, monkeypatch):
    """After an interruption in its last layer and several errors, it still resumes there."""
    from a3cli.cli.progress import SweepProgress

    command = ("calibrate", source, "--dataset", text_file, *SHORT, "--quiet", "--work", tmp_path / "work")
    plain = SweepProgress.__call__

    def interrupting(self, **at):
        plain(self, **at)
        if at.get("layer") == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SweepProgress, "__call__", interrupting)
        assert a3(*command).code == 3
    before = snapshot(tmp_path)
    refused(a3(*command, "--mlp-stats", "diagonal"), "(differs in mlp_stats)", "--overwrite")
    refused(a3(*but(command, "--dataset", tmp_path / "nothing.txt"), "--overwrite"), "nothing.txt")
    refused(a3(*SOLVE, "--work", tmp_path / "work"), "a3 calibrate")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 1))
        refused(a3(*command), "no disk space")
    assert snapshot(tmp_path) == before
    with no_file_larger(20_000):
        refused(a3(*command), "layer-001.safetensors cannot be written")
    progress = tmp_path / "work" / "calibration" / "progress.json"
    kept = progress.read_bytes()
    edit(progress)
    refused(a3(*command), str(progress), "--overwrite")
    progress.write_bytes(kept)
    flip(tmp_path / "work" / "calibration" / "layer-000.safetensors")
    refused(a3(*command), "layer-000.safetensors", "--overwrite")
    flip(tmp_path / "work" / "calibration" / "layer-000.safetensors")
    layers = []
    monkeypatch.setattr(SweepProgress, "__call__", lambda self, **at: layers.append(at["layer"]))
    assert a3(*command).code == 0
    assert set(layers) == {1}


def test_output_folder_in_the_way(a3, work, source, tmp_path):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "precious.txt").write_text("mine")
    file.write_text("mine")
    for out, options, words in (
        (source / "out", (), ("source",)),
        (source, ("--overwrite",), ("source",)),
        (tmp_path, ("--overwrite",), ("inside one another",)),
        (work / "out", (), ("work folder",)),
        (full, (), ("not empty", "--overwrite")),
        (full, ("--overwrite",), ("not an a3 export",)),
        (file, ("--overwrite",), ("not a folder",)),
        (file / "out", (), ("file",)),
    ):
        before = snapshot(tmp_path)
        refused(a3("export", out, *options, "--work", work), *words)
        assert snapshot(tmp_path) == before
    for folder in (file, file / "work"):
        calibrate = ("calibrate", source, "--dataset", full / "precious.txt", *SHORT, "--work", folder)
        refused(a3(*calibrate), str(folder), "cannot be written")
    link = tmp_path / "link"
    link.symlink_to(full)
    refused(a3("export", link, "--work", work), "not a folder")


def test_overwrite_replaces_an_earlier_export(a3, work, tmp_path):
    assert a3("export", tmp_path / "out", "--work", work).code == 0
    before = snapshot(tmp_path / "out")
    refused(a3("export", tmp_path / "out", "--dtype", "bfloat16", "--work", work), "not empty")
    (tmp_path / "out" / "stale.txt").write_text("old")
    assert a3("export", tmp_path / "out", "--overwrite", "--work", work).code == 0
    assert snapshot(tmp_path / "out") == before


def test_one_process_a_work_folder(a3, work, source, text_file, tmp_path):
    from a3cli.work.folder import Work

    calibrate = ("calibrate", source, "--dataset", text_file, *SHORT)
    before = snapshot(tmp_path)
    with Work(work).locked():
        for command in (calibrate, (*calibrate, "--overwrite"), SOLVE_AGAIN, ("export", tmp_path / "out")):
            refused(a3(*command, "--work", work), "in use", "--work")
    assert snapshot(tmp_path) == before
    assert a3("export", tmp_path / "out", "--work", work).code == 0


def test_one_process_an_export(a3, work, tmp_path):
    """Another work folder's export would write to the same draft."""
    from a3cli.work.folder import holding_target

    out = tmp_path / "to" / "out"
    with holding_target(out):
        before = snapshot(tmp_path)
        refused(a3("export", out, "--work", work), f"{out} is in use by another a3 process", "choose another folder")
        assert snapshot(tmp_path) == before
    assert not out.parent.exists()
    assert a3("export", out, "--work", work).code == 0
    assert list(out.parent.iterdir()) == [out]


def test_eval_of_what_does_not_load(a3, checkpoint, text_file, tmp_path):
    text = ("--dataset", text_file, "--samples", 1, "--seq-len", 32)
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama-gqa"), folder)
    tensors = load_file(folder / "model.safetensors")
    gone = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(a3("eval", folder, *text), "up_proj.weight is missing")
    save_file({**tensors, "model.layers.0.mlp.up_proj.weight": gone[:-1]}, folder / "model.safetensors")
    refused(a3("eval", folder, *text), "up_proj.weight is [95, 48], not [96, 48]")


def test_eval_against_another_vocabulary(a3, checkpoint, text_file):
    folders = {size: checkpoint("llama-gqa", vocab_size=size) for size in (100, 260, 300)}
    for other in (100, 300):
        command = ("eval", folders[260], "--against", folders[other], "--dataset", text_file, "--samples", 1)
        refused(a3(*command, "--seq-len", 32), "260", str(other), "same tokenizer")


def test_a_failure_late_keeps_the_layers_before(a3, source, text_file, tmp_path):
    """With a NaN in the last layer, the first one's statistics stay, and are not mixed with those of other weights."""
    intact = {path: path.read_bytes() for path in shards(source)}
    late = DOWN.replace("0", "1")
    edit_tensor(late, with_nan)(source)
    command = ("calibrate", source, "--dataset", text_file, *SHORT, "--quiet", "--work", tmp_path / "work")
    refused(a3(*command), late, "NaN")
    assert (tmp_path / "work" / "calibration" / "layer-000.safetensors").is_file()
    assert not (tmp_path / "work" / "calibration" / "manifest.json").exists()
    before = snapshot(tmp_path / "work")
    refused(a3(*command), late, "NaN")
    assert snapshot(tmp_path / "work") == before
    for path, data in intact.items():
        path.write_bytes(data)
    refused(a3(*command), "(differs in source (model-00007-of-00007.safetensors))", "--overwrite")
    assert a3(*command, "--overwrite").code == 0
