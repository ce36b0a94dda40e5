"""Merged statistics equal those of all the text at once; incompatible calibrations are rejected."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from a3cli.solvers.samples import NAMES
from a3cli.text.blocks import Sampled
from tests.conftest import but, refused, reseal, snapshot

pytestmark = pytest.mark.usefixtures("hasty")

SHORT = ("--samples", 6, "--seq-len", 40, "--batch-size", 2)


def calibrate(a3, source, text, work, *options) -> Path:
    outcome = a3("calibrate", source, "--dataset", text, *but(SHORT, *options), "--work", work)
    assert outcome.code == 0, outcome.stderr
    return work


@pytest.fixture(scope="module")
def made(checkpoint, text_file, tmp_path_factory) -> list[Path]:
    """Return two calibrations of the same model on blocks from different places. Don't write to them."""
    from a3cli.settings import CalibrateSettings, make_settings
    from a3cli.stages.calibrate import calibrate
    from a3cli.work.folder import Work

    works = []
    for seed in (1, 2):
        works.append(tmp_path_factory.mktemp("half"))
        text = {"dataset": str(text_file), "samples": 6, "seq_len": 40, "seed": seed}
        model = str(checkpoint("llama-gqa"))
        settings = make_settings(CalibrateSettings, model=model, text=text, batch_size=2)
        calibrate(settings, Work(works[-1]), overwrite=False, progress=lambda **at: None)
    return works


@pytest.fixture
def halves(made, tmp_path) -> list[Path]:
    return [Path(shutil.copytree(work, tmp_path / name)) for work, name in zip(made, ("one", "two"), strict=True)]


def test_merged_halves_are_the_whole(a3, halves, checkpoint, text_file, tmp_path, monkeypatch):
    """The whole is calibrated on exactly the halves' blocks."""
    merged = a3("stats", "merge", *halves, "--into", tmp_path / "merged", "--json").json
    blocks = torch.cat([load_file(work / "calibration" / "tokens.safetensors")["tokens"] for work in halves])
    monkeypatch.setattr("a3cli.stages.calibrate.sample_blocks", lambda *_, **__: Sampled(blocks, blocks[:0]))
    calibrate(a3, checkpoint("llama-gqa"), text_file, tmp_path / "whole", "--samples", 12)
    for layer in range(2):
        name = f"calibration/layer-{layer:03d}.safetensors"
        ours, theirs = load_file(tmp_path / "merged" / name), load_file(tmp_path / "whole" / name)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            close = 1e-3 if value.dtype == torch.bfloat16 else 1e-6  # samples may be rounded differently
            assert (ours[key] - value).double().norm() <= close * value.double().norm(), key
    assert torch.equal(load_file(tmp_path / "merged" / "calibration" / "tokens.safetensors")["tokens"], blocks)
    assert merged["blocks"] == [12, 40]
    assert merged["tokens"] == 480


def test_merged_statistics_are_solved_and_exported(a3, halves, tmp_path):
    work = tmp_path / "merged"
    assert a3("stats", "merge", *halves, "--into", work).code == 0
    cut = ("--budget", 0.25, "--head-multiple", 2, "--mlp-multiple", 8, "--sequential")
    assert a3("solve", *cut, "--work", work).code == 0
    assert a3("export", tmp_path / "out", "--work", work).code == 0
    manifest = json.loads((tmp_path / "out" / "a3_manifest.json").read_text())
    assert [part["text"]["seed"] for part in manifest["calibration"]["request"]["merged"]] == [1, 2]
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"--seed 1 .*--work work-1\n", card)
    assert "a3 stats merge work-1 work-2 --into a3-work" in card


def test_merged_again_it_is_a_no_op_and_merges_on(a3, halves, checkpoint, text_file, tmp_path):
    merged = tmp_path / "merged"
    outcome = a3("stats", "merge", *halves, "--into", merged)
    assert outcome.code == 0
    assert outcome.stderr.splitlines() == ["layer 1 of 2", "layer 2 of 2"]
    before = {path: path.stat().st_mtime_ns for path in merged.rglob("*") if path.name != ".lock"}
    assert a3("stats", "merge", *halves, "--into", merged).code == 0
    assert {path: path.stat().st_mtime_ns for path in merged.rglob("*") if path.name != ".lock"} == before
    third = calibrate(a3, checkpoint("llama-gqa"), text_file, tmp_path / "three", "--seed", 3)
    refused(a3("stats", "merge", halves[0], third, "--into", merged), "another calibration", "--overwrite")
    refused(a3("stats", "merge", merged, halves[1], "--into", tmp_path / "no"), "twice")
    together = a3("stats", "merge", merged, third, "--into", tmp_path / "all", "--json").json
    assert [part["text"]["seed"] for part in together["request"]["merged"]] == [1, 2, 3]
    assert a3("stats", "merge", halves[0], third, "--into", merged, "--overwrite").code == 0


def test_what_does_not_belong_together_is_refused(a3, halves, checkpoint, text_file, tmp_path):
    source = checkpoint("llama-gqa")
    others = {
        "source": calibrate(a3, checkpoint("llama-gqa", seed=5), text_file, tmp_path / "model"),
        "mlp_stats": calibrate(a3, source, text_file, tmp_path / "stats", "--mlp-stats", "diagonal"),
        "dtype": calibrate(a3, source, text_file, tmp_path / "dtype", "--dtype", "bfloat16"),
        "seq_len": calibrate(a3, source, text_file, tmp_path / "length", "--seq-len", 48),
    }
    for word, other in others.items():
        refused(a3("stats", "merge", halves[0], other, "--into", tmp_path / "into"), "differ in", word)
    assert not (tmp_path / "into").exists()


def test_damaged_unfinished_or_odd_folders_are_refused(a3, halves, tmp_path):
    one, two = halves
    into = ("--into", tmp_path / "into", "--quiet")
    refused(a3("stats", "merge", one, *into), "at least two")
    refused(a3("stats", "merge", one, one, *into), "given twice")
    refused(a3("stats", "merge", one, two, "--into", two), "one of the work folders")
    refused(a3("stats", "merge", one, tmp_path / "none", *into), "not a work folder")
    copy = Path(shutil.copytree(one, tmp_path / "copy"))
    refused(a3("stats", "merge", one, copy, *into), "same calibration is given twice")
    file = two / "calibration" / "layer-001.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "tokens": tensors["tokens"] + 1}, file)
    refused(a3("stats", "merge", one, two, *into), "layer-001", "hash differs")
    save_file({name: value for name, value in tensors.items() if name not in NAMES}, file)
    reseal(file)
    refused(a3("stats", "merge", one, two, *into), "layer-001", "no attention samples", "a3 calibrate --overwrite")
    (two / "calibration" / "manifest.json").unlink()
    refused(a3("stats", "merge", one, two, *into), "no finished calibration")
    assert not (tmp_path / "into").exists()


def test_a_failure_on_the_way_leaves_nothing(a3, halves, tmp_path, monkeypatch):
    monkeypatch.setattr("a3cli.stages.merge.add_statistics", lambda files: (_ for _ in ()).throw(KeyboardInterrupt))
    target = tmp_path / "into"
    target.mkdir()
    assert a3("stats", "merge", *halves, "--into", target).code == 3
    assert {name for name in snapshot(target) if "calibration" in name} == set()


def test_a_source_json_of_another_model_or_altered(a3, halves, checkpoint, text_file, tmp_path):
    one, two = halves
    command = ("stats", "merge", one, two, "--into", tmp_path / "into", "--quiet")
    other = checkpoint("llama-gqa", seed=5)
    shutil.copy(calibrate(a3, other, text_file, tmp_path / "other") / "source.json", one)
    refused(a3(*command), "source.json", str(other), "another model", "a3 calibrate")
    altered = json.loads((one / "source.json").read_text()) | {"model": "elsewhere"}
    (one / "source.json").write_text(json.dumps(altered))
    refused(a3(*command), "source.json", "altered", "a3 calibrate")
    assert not (tmp_path / "into").exists()
