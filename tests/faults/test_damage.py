"""Every file of the work folder and of the source damaged, one at a time: refused by name, never a wrong result."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SHORT, SOLVE, build_tokenizer, refused, snapshot


def truncate(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip_a_bit(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    place = random.Random(path.name).randrange(len(data) * 8)
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def replace(path: Path, other: Path) -> None:
    assert path.read_bytes() != other.read_bytes()
    shutil.copyfile(other, path)


DAMAGES: list[Callable[[Path, Path], None]] = [truncate, flip_a_bit, empty, replace]
WEIGHTS = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
CARRIED = ["generation_config.json", "README.md"]
MANIFEST, TOKENS = "calibration/manifest.json", "calibration/tokens.safetensors"
STATISTICS = ["calibration/layer-000.safetensors", "calibration/layer-001.safetensors"]
SOLUTION = ["solution/manifest.json", "solution/layer-000.safetensors", "solution/layer-001.safetensors"]
# Which files each command refuses when they are damaged. What it does not read cannot change its result.
READS = {
    "export": [*(f"source/{n}" for n in WEIGHTS + TOKENIZER + CARRIED), *(f"work/{n}" for n in (MANIFEST, *SOLUTION))],
    "solve": [*(f"source/{n}" for n in WEIGHTS), *(f"work/{n}" for n in (MANIFEST, TOKENS, *STATISTICS))],
    "calibrate": [*(f"source/{n}" for n in WEIGHTS + TOKENIZER), f"work/{MANIFEST}"],
}
READS["export"].append("work/source.json")
READS["solve"].append("work/source.json")
FILES = sorted({name for names in READS.values() for name in names})


@pytest.fixture(scope="module")
def whole(checkpoint, text_file, tmp_path_factory) -> Path:
    """`source`, `work` up to a solution and `out`; in `other` the same of another model with the same shapes."""
    from a3cli.calibrate import calibrate
    from a3cli.export import export
    from a3cli.settings import CalibrateSettings, ExportSettings, SolveSettings, make_settings
    from a3cli.solve import solve
    from a3cli.work import Work

    folder = tmp_path_factory.mktemp("whole")
    for place, number in ((folder, 0), (folder / "other", 1)):
        rope = {"rope_type": "default", "rope_theta": 1e4 * (1 + number)}
        model = checkpoint("llama-gqa", seed=number, rope_parameters=rope, max_shard_size="200KB")
        source = Path(shutil.copytree(model, place / "source"))
        (source / "README.md").write_text(f"---\nlicense: {('mit', 'apache-2.0')[number]}\n---\n")
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": number}))
        if number:
            tokenizer = build_tokenizer()
            tokenizer.add_tokens(["<|x|>"])
            tokenizer.model_max_length = 77
            tokenizer.save_pretrained(source)
        text = {"dataset": str(text_file), "samples": 3, "seq_len": 32, "seed": number}
        work = Work(place / "work")
        settings = make_settings(CalibrateSettings, model=str(source), text=text)
        calibrate(settings, work, overwrite=False, progress=lambda **at: None)
        rounding = {"mlp_multiple": 8, "head_multiple": 2}
        solve(make_settings(SolveSettings, budget=0.25, **rounding), work, overwrite=False, progress=lambda **at: None)
        export(place / "out", ExportSettings(), work)
    return folder


@pytest.fixture
def here(whole, a3, text_file, tmp_path, monkeypatch) -> dict[str, tuple[object, ...]]:
    """Copies of `source` and `work` in the current folder, and the commands to run there again."""
    for part in ("source", "work"):
        shutil.copytree(whole / part, tmp_path / part)
    monkeypatch.chdir(tmp_path)
    calibrate = ("calibrate", "source", "--dataset", text_file, *SHORT, "--work", "work")
    assert a3(*calibrate).code == 0  # tells the work folder where its source is now
    return {"export": ("export", "out", "--work", "work"), "solve": (*SOLVE, "--overwrite", "--work", "work")} | {
        "calibrate": calibrate
    }


def exported(folder: Path) -> dict[str, object]:
    """All files of an export, but for the place of its source."""
    files: dict[str, object] = dict(snapshot(folder))
    manifest = json.loads((folder / "a3_manifest.json").read_text())
    manifest["source"].pop("model")
    return files | {"a3_manifest.json": manifest}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damaged(name, damage, whole, here, a3, tmp_path):
    damage(tmp_path / name, whole / "other" / name)
    damaged = snapshot(tmp_path)
    for stage, command in here.items():
        outcome = a3(*command)
        if name in READS[stage]:
            refused(outcome, name.split("/")[-1])
            assert snapshot(tmp_path) == damaged
        else:
            assert outcome.code == 0, outcome.stderr
            if stage == "export":
                assert exported(tmp_path / "out") == exported(whole / "out")
                shutil.rmtree(tmp_path / "out")
            elif stage == "solve":
                assert snapshot(tmp_path / "work" / "solution") == snapshot(whole / "work" / "solution")
                damaged = snapshot(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES[:3], ids=lambda damage: damage.__name__)
def test_damaged_index(damage, whole, here, a3, tmp_path):
    """Only its file names count."""
    damage(tmp_path / "source" / "model.safetensors.index.json", Path())
    outcome = a3(*here["export"])
    if outcome.code:
        refused(outcome, "model.safetensors.index.json")
    else:
        assert exported(tmp_path / "out") == exported(whole / "out")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["progress.json", "tokens.safetensors", "layer-000.safetensors", "hidden-001.bin"])
def test_damaged_under_way(name, damage, whole, a3, text_file, tmp_path, monkeypatch):
    from a3cli import display

    monkeypatch.chdir(tmp_path)
    plain = display.SweepProgress.__call__

    def interrupting(self, **at):
        plain(self, **at)
        if at["layer"] == 1:
            raise KeyboardInterrupt

    places = (whole / "source", "work"), (whole / "other" / "source", "other")
    commands = [("calibrate", s, "--dataset", text_file, *SHORT, "--quiet", "--work", w) for s, w in places]
    with monkeypatch.context() as patch:
        patch.setattr(display.SweepProgress, "__call__", interrupting)
        if damage is replace:
            assert a3(*commands[1], "--seed", 1).code == 3
        assert a3(*commands[0]).code == 3
    damage(Path("work/calibration", name), Path("other/calibration", name))
    before = snapshot(tmp_path)
    if name.startswith("hidden"):  # can be made again
        outcome = a3(*commands[0])
        assert outcome.code == 0
        assert f"{name} is not as it was written" in outcome.stderr
        assert a3(*commands[0][:-1], "undisturbed").code == 0
        ours, theirs = (sorted(Path(work, "calibration").glob("*.safetensors")) for work in ("work", "undisturbed"))
        assert [file.read_bytes() for file in ours] == [file.read_bytes() for file in theirs]
        return
    if (name, damage) == ("progress.json", replace):
        refused(a3(*commands[0]), "progress.json", "(differs in seed, source")
    else:
        refused(a3(*commands[0]), name, "--overwrite")
    assert snapshot(tmp_path) == before


def flip_between_samples(path: Path) -> None:
    """In the middle of the first gap between two sampled places."""
    from a3cli.checkpoint import FINGERPRINT_BYTES, FINGERPRINT_SAMPLES

    spacing = (path.stat().st_size - FINGERPRINT_BYTES) / (FINGERPRINT_SAMPLES - 1)
    data = bytearray(path.read_bytes())
    data[int((FINGERPRINT_BYTES + spacing) / 2)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("full", [False, True])
def test_a_large_source_is_sampled_except_with_full_check(full, checkpoint, a3, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint("llama-gqa", vocab_size=12000), "source")
    weights = Path("source", "model.safetensors")
    assert weights.stat().st_size > 1 << 22
    text = ("--dataset", text_file, *SHORT, "--work", "work")
    check = ("--full-check",) if full else ()
    assert a3("calibrate", "source", *text, *check).code == 0
    assert a3(*SOLVE, "--work", "work").code == 0
    assert a3("export", "whole", "--work", "work", *check).code == 0
    if not full:
        refused(a3("export", "out", "--work", "work", "--full-check"), "a3 calibrate --full-check --overwrite")
    flip_between_samples(weights)
    if full:
        refused(a3("export", "out", "--work", "work", *check), "model.safetensors")
        refused(a3("calibrate", "source", *text, *check), "model.safetensors")
    assert a3("export", "out", "--work", "work").code == 0  # sampled: it goes unnoticed, as docs/faults.md says


@pytest.mark.parametrize("size", [1, 60_000, 65_536, 500_001, (1 << 20) - 1, 1 << 20])
def test_the_fingerprint_covers_files_up_to_a_mebibyte_wholly(size, tmp_path):
    from a3cli.checkpoint import FINGERPRINT_BYTES, FINGERPRINT_SAMPLES

    covered, end = 0, 0
    for i in range(FINGERPRINT_SAMPLES):
        start = i * max(0, size - FINGERPRINT_BYTES) // (FINGERPRINT_SAMPLES - 1)
        assert start <= end
        covered = end = max(end, min(size, start + FINGERPRINT_BYTES))
    assert covered == size
