"""Hostile input: paths and links that leave the folder, code, decompression bombs; and permissions of our own files."""

import json
import os
import shutil
import stat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import SHORT, SOLVE, refused, snapshot
from tests.helpers import forks

TELL_TALE = "from pathlib import Path\nPath({!r}).touch()\n"


def calibrate(source: Path, text_file: Path, work: Path, *options: object) -> tuple[object, ...]:
    return ("calibrate", source, "--dataset", text_file, *SHORT, "--work", work, *options)


@pytest.mark.parametrize("target", ["../outside.safetensors", "/etc/hostname", "a/b.safetensors", "..", ""])
def test_weight_map_that_leaves_the_folder(target, source, text_file, a3, tmp_path):
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], target)
    path.write_text(json.dumps(index))
    refused(a3(*calibrate(source, text_file, tmp_path / "work")), "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "config.json", "model-00001-of-00007.safetensors"])
def test_links_out_of_the_source(name, source, text_file, a3, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes((source / name).read_bytes() if (source / name).exists() else b"secret")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    refused(a3(*calibrate(source, text_file, tmp_path / "work")), name, "symbolic link")


def test_a_link_made_after_the_calibration(work, source, a3, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (source / "NOTICE.txt").symlink_to(tmp_path / "secret")
    refused(a3("export", tmp_path / "out", "--work", work), "NOTICE.txt", "symbolic link")


def test_the_hubs_cache_links_to_its_blobs(source, text_file, a3, tmp_path):
    home = tmp_path / "models--owner--name"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / "0123abc").mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.move(path, home / "blobs" / str(number))
        (home / "snapshots" / "0123abc" / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert a3(*calibrate(home / "snapshots" / "0123abc", text_file, tmp_path / "work")).code == 0


def test_a_pipe_in_place_of_a_file(source, text_file, a3, tmp_path):
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")  # reading it would block forever
    refused(a3(*calibrate(source, text_file, tmp_path / "work")), "config.json", "not a regular file")


def test_code_that_comes_with_a_model_does_not_run(source, text_file, a3, tmp_path, monkeypatch):
    """No stage runs the model's or the tokenizer's code without --trust-remote-code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    told = tmp_path / "told"
    for name, classes in (
        ("config.json", ("AutoConfig", "AutoModelForCausalLM")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        path = source / name
        settings = json.loads(path.read_text())
        settings["auto_map"] = {each: f"hostile.{each}" for each in classes}
        if "AutoTokenizer" in classes:
            settings["auto_map"] = {"AutoTokenizer": ["hostile.AutoTokenizer", None]}
        path.write_text(json.dumps(settings))
    (source / "hostile.py").write_text(TELL_TALE.format(str(told)))
    outcome = a3(*calibrate(source, text_file, tmp_path / "work"))
    if outcome.code:
        refused(outcome, "source")
    else:
        assert a3(*SOLVE, "--work", tmp_path / "work").code == 0
        assert a3("export", tmp_path / "out", "--work", tmp_path / "work").code == 0
        assert not (tmp_path / "out" / "hostile.py").exists()
    evaluated = a3("eval", source, "--dataset", text_file, "--samples", 1, "--seq-len", 32)
    assert evaluated.code in (0, 2)
    assert a3("inspect", tmp_path / "work").code in (0, 2)
    assert not told.exists()
    a3(*calibrate(source, text_file, tmp_path / "trusted", "--trust-remote-code"))
    assert told.exists()  # the code does run if asked for


def test_an_unknown_model_with_code_is_refused_before_it_runs(source, text_file, a3, tmp_path):
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "hostile", "auto_map": {"AutoConfig": "hostile.Config"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "hostile.py").write_text(TELL_TALE.format(str(tmp_path / "told")))
    refused(a3(*calibrate(source, text_file, tmp_path / "work", "--trust-remote-code")), "'hostile'", "llama")
    assert not (tmp_path / "told").exists()


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["one cell", "many rows"])
def test_a_bomb_as_parquet(shape, source, a3, tmp_path):
    """A file of half a megabyte that unpacks to half a gigabyte is rejected before it is unpacked."""
    cells = ["\0" * (1 << 28)] if shape == "one cell" else ["\0" * (1 << 16)] * (1 << 12)
    table = pa.table({"text": pa.array(cells)})
    pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd", use_dictionary=False, row_group_size=1 << 12)
    del table, cells
    assert (tmp_path / "bomb.parquet").stat().st_size < 1 << 20
    (tmp_path / "run").mkdir()
    command = calibrate(source, tmp_path / "bomb.parquet", tmp_path / "work")
    outcome = forks.run(command, tmp_path / "run", seconds=60)
    refused(outcome, "bomb.parquet", "unpack")
    assert outcome.memory < 1 << 30


@pytest.mark.slow
def test_a_dictionary_bomb_as_parquet(source, a3, tmp_path):
    """A million rows refer to one cell of a megabyte."""
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * 1_000_000, pa.int32()), pa.array(["x" * (1 << 20)]))
    pq.write_table(pa.table({"text": cells}), tmp_path / "bomb.parquet", compression="zstd")
    (tmp_path / "run").mkdir()
    command = calibrate(source, tmp_path / "bomb.parquet", tmp_path / "work")
    outcome = forks.run(command, tmp_path / "run", seconds=60, memory=1 << 30)
    assert outcome.code in (0, 2), outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.memory < 1 << 30


def test_permissions_are_those_of_any_file(work, a3, tmp_path):
    mask = os.umask(0)
    os.umask(mask)
    assert a3("export", tmp_path / "out", "--work", work).code == 0
    assert a3("report", work, "--html", tmp_path / "report.html").code == 0
    for path in (*tmp_path.rglob("*"),):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        if path.name != ".lock" and not path.is_relative_to(tmp_path / "source"):
            assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_links_in_the_way_of_what_is_written(work, source, text_file, a3, tmp_path):
    """A written file replaces a link; the link's target is not changed."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    assert a3("export", tmp_path / "out", "--work", work).code == 0
    for name in ("model.safetensors", "config.json", "README.md"):
        (tmp_path / "out" / name).unlink()
        (tmp_path / "out" / name).symlink_to(precious)
    (tmp_path / "out" / "folder").symlink_to(folder)
    assert a3("export", tmp_path / "out", "--overwrite", "--work", work).code == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    (tmp_path / ".report.html.partial").symlink_to(precious)
    (tmp_path / "report.html").symlink_to(precious)
    assert a3("report", work, "--html", tmp_path / "report.html").code == 0
    for name in ("source.json", "calibration/layer-000.safetensors", "calibration/tokens.safetensors"):
        path = work / name
        (path.parent / f".{path.name}.partial").symlink_to(precious)
    for name in ("hidden-000.bin", "hidden-next.bin", "layer-000.safetensors"):
        (work / "calibration" / name).unlink(missing_ok=True)
        (work / "calibration" / name).symlink_to(precious)
    assert a3(*calibrate(source, text_file, work, "--overwrite")).code == 0
    assert a3(*SOLVE, "--work", work).code == 0
    before = snapshot(tmp_path)
    (tmp_path / ".new.a3-partial").symlink_to(folder)
    assert a3("export", tmp_path / "new", "--work", work).code == 0
    assert not (tmp_path / "new").is_symlink()
    assert precious.read_text() == "mine"
    assert (folder / "precious").read_text() == "mine"
    assert before.keys() <= snapshot(tmp_path).keys()
