"""Damage every file of the work folder and of the source, one at a time: an error names it; no result is wrong."""

import json
import os
import pkgutil
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import yaml

from tests.conftest import SHORT, SOLVE, build_tokenizer, refused, snapshot
from tests.helpers.hasty import make_hasty

pytestmark = pytest.mark.usefixtures("hasty")


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
# The files that each command rejects when they are damaged. A file that it does not read cannot change its result.
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
    """Return a folder with `source`, `work` up to a solution, `out`, and another calibration in `more`.

    `other` has the same of another model with the same shapes.
    """
    from a3cli.settings import CalibrateSettings, ExportSettings, SolveSettings, make_settings
    from a3cli.stages.calibrate import calibrate
    from a3cli.stages.export import export
    from a3cli.stages.solve import solve
    from a3cli.work.folder import Work

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
        settings = make_settings(SolveSettings, budget=0.25, mlp_multiple=8, head_multiple=2)
        with pytest.MonkeyPatch.context() as patch:  # the tests that solve again do the same
            make_hasty(patch)
            solve(settings, work, overwrite=False, progress=lambda **at: None)
        export(place / "out", ExportSettings(), work)
    text = {**text, "seed": 7}
    settings = make_settings(CalibrateSettings, model=str(folder / "source"), text=text)
    calibrate(settings, Work(folder / "more"), overwrite=False, progress=lambda **at: None)
    return folder


@pytest.fixture
def here(whole, a3, text_file, tmp_path, monkeypatch) -> dict[str, tuple[object, ...]]:
    """Copy `source` and `work` to the current folder; return the commands to run there again."""
    for part in ("source", "work"):
        shutil.copytree(whole / part, tmp_path / part)
    monkeypatch.chdir(tmp_path)
    calibrate = ("calibrate", "source", "--dataset", text_file, *SHORT, "--work", "work")
    assert a3(*calibrate).code == 0  # records the new place of the source in the work folder
    return {"export": ("export", "out", "--work", "work"), "solve": (*SOLVE, "--overwrite", "--work", "work")} | {
        "calibrate": calibrate
    }


def exported(folder: Path) -> dict[str, object]:
    """Return all files of an export, without the path of its source."""
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
    """Only the file names in it matter."""
    damage(tmp_path / "source" / "model.safetensors.index.json", Path())
    outcome = a3(*here["export"])
    if outcome.code:
        refused(outcome, "model.safetensors.index.json")
    else:
        assert exported(tmp_path / "out") == exported(whole / "out")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["progress.json", "tokens.safetensors", "layer-000.safetensors", "hidden-001.bin"])
def test_damaged_under_way(name, damage, whole, a3, text_file, tmp_path, monkeypatch):
    from a3cli.cli.progress import SweepProgress

    monkeypatch.chdir(tmp_path)
    plain = SweepProgress.__call__

    def interrupting(self, **at):
        plain(self, **at)
        if at.get("layer") == 1:
            raise KeyboardInterrupt

    places = (whole / "source", "work"), (whole / "other" / "source", "other")
    commands = [("calibrate", s, "--dataset", text_file, *SHORT, "--quiet", "--work", w) for s, w in places]
    with monkeypatch.context() as patch:
        patch.setattr(SweepProgress, "__call__", interrupting)
        if damage is replace:
            assert a3(*commands[1], "--seed", 1).code == 3
        assert a3(*commands[0]).code == 3
    damage(Path("work/calibration", name), Path("other/calibration", name))
    before = snapshot(tmp_path)
    if name.startswith("hidden"):  # can be recomputed
        outcome = a3(*commands[0])
        assert outcome.code == 0
        assert f"{name} has changed since it was written" in outcome.stderr
        assert a3(*commands[0][:-1], "undisturbed").code == 0
        ours, theirs = (sorted(Path(work, "calibration").glob("*.safetensors")) for work in ("work", "undisturbed"))
        assert [file.read_bytes() for file in ours] == [file.read_bytes() for file in theirs]
        return
    if (name, damage) == ("progress.json", replace):
        refused(a3(*commands[0]), "progress.json", "(differs in seed, source")
    else:
        refused(a3(*commands[0]), name, "--overwrite")
    assert snapshot(tmp_path) == before


@dataclass(frozen=True)
class Halfway:
    """A command that runs twice: its first run completes, or is interrupted at its second call of `cut_at`."""

    command: tuple[object, ...]
    files: tuple[str, ...]  # files that the second run finds
    cut_at: str | None = None


WORK = ("--work", "work")
QUICK = (*SOLVE, "--components", "mlp", "--overwrite", *WORK)
PROBE = (*QUICK, "--sensitivity", "probe", "--probe-points", 2, "--probe-blocks", 2)
DRAFT = "work/.solution.a3-partial"
HALFWAY = {
    "probing": Halfway(
        PROBE, ("work/probes/progress.json", "work/probes/streams-1.bin"), "a3cli.stages.probe._Sweep._pass"
    ),
    "probed": Halfway(PROBE, ("work/probes/best-stock.json", "work/channels/layer-000.json")),
    "correcting": Halfway(
        (*QUICK, "--method", "paper", "--sequential", "--refit-rounds", 0),
        (
            "work/.solution.a3-progress.json",
            *(f"{DRAFT}/{name}-000.safetensors" for name in ("one-shot", "refit")),
            *(f"{DRAFT}/streams/{name}-1.bin" for name in ("source", "smaller")),
        ),
        "a3cli.stream.sequential._Layer.refit",
    ),
    "exporting": Halfway(
        ("export", "out", "--max-shard-size", "70KB", *WORK),
        (".out.a3-progress.json", ".out.a3-partial/model-00001-of-00005.safetensors"),
        "a3cli.stages.weights.write_shard",
    ),
    "comparing": Halfway(
        ("pareto", "--budgets", "0.2", *SOLVE[3:], *WORK), ("work/pareto.json",), "a3cli.stages.pareto.Points.add"
    ),
    "measured": Halfway(("run", "recipe.yaml"), ("work/evaluation.json",)),
}


def begin(place: Path, here: Path, number: int, text_file: Path) -> None:
    """Create `here` with a copy of the work folder in `place`, and a recipe for it."""
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(place / "work", here / "work")
    text = {"dataset": str(text_file), "samples": 3, "seq_len": 32, "seed": number}
    recipe = {
        "work": "work",
        "out": "out",
        "calibrate": {"model": str(place / "source"), "text": text},
        "solve": {"budget": 0.25, "head_multiple": 2, "mlp_multiple": 8},
        "eval": {"text": {**text, "samples": 1}},
    }
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def made(outcome, here: Path) -> tuple[str, dict[str, bytes | None]]:
    """Return a command's output and files, without measured speeds."""
    files = snapshot(here)
    files.pop("work/evaluation.json", None)
    return re.sub(r'"tokens_per_second": [^,]*', "", outcome.stdout), files


@pytest.fixture(scope="module")
def left(tmp_path_factory) -> tuple[Path, dict[str, object]]:
    """Return a folder for what the commands leave, and the expected results by name, for the commands that have run."""
    return tmp_path_factory.mktemp("left"), {}


@pytest.fixture
def halfway(name, left, whole, a3, text_file, monkeypatch):
    """Return the current folder as the first run left it, the other model's, and the result of an undisturbed run.

    The folder is the same for all commands, since an evaluation records the path of its export.
    """
    folder, undisturbed = left
    here, step = folder / "here", HALFWAY[name]
    if name not in undisturbed:
        for number, place in ((1, whole / "other"), (0, whole)):
            begin(place, here, number, text_file)
            monkeypatch.chdir(here)
            cut_short(step, a3, monkeypatch)
            shutil.copytree(here, folder / name / str(number))
        begin(whole, here, 0, text_file)
        monkeypatch.chdir(here)
        outcome = a3(*step.command, "--quiet", "--json")
        assert outcome.code == 0, outcome.stderr
        undisturbed[name] = made(outcome, here)
    shutil.rmtree(here)
    shutil.copytree(folder / name / "0", here)
    monkeypatch.chdir(here)
    return here, folder / name / "1", undisturbed[name]


def cut_short(step: Halfway, a3, monkeypatch) -> None:
    calls = count(1)

    def cut(*args, **options):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **options)

    with monkeypatch.context() as patch:
        if step.cut_at:
            original = pkgutil.resolve_name(step.cut_at)
            patch.setattr(step.cut_at, cut)
        outcome = a3(*step.command)
    assert outcome.code == (3 if step.cut_at else 0), outcome


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(("name", "file"), [(name, file) for name, step in HALFWAY.items() for file in step.files])
def test_damaged_halfway(name, file, damage, halfway, a3):
    """The file is rejected by name, or recomputed with a warning; a file of another request counts as absent."""
    here, other, undisturbed = halfway
    damage(here / file, other / file)
    before = snapshot(here)
    outcome = a3(*HALFWAY[name].command, "--quiet", "--json")
    if outcome.code:
        refused(outcome, Path(file).name)
        assert snapshot(here) == before
    else:
        assert Path(file).name in outcome.stderr or (damage is replace and file.endswith(".json"))
        assert made(outcome, here) == undisturbed


CALIBRATED = ["work/source.json", *(f"work/{name}" for name in (MANIFEST, TOKENS, *STATISTICS))]
SOURCE = [f"source/{name}" for name in (*WEIGHTS, *TOKENIZER)]
EXPORTED = ["out/config.json", "out/a3_manifest.json"]
DESCRIBED = [*SOURCE, *CALIBRATED, "work/solution/manifest.json"]
# Commands that only read, or that write something new elsewhere, and the files that they read.
LOOKING: dict[str, tuple[tuple[object, ...], list[str]]] = {
    "inspect": (("inspect", "work"), DESCRIBED),
    "inspect export": (("inspect", "out"), EXPORTED),
    "report": (("report", "work", "--html", "page.html"), DESCRIBED),
    "report export": (("report", "out", "--html", "page.html"), EXPORTED),
    "pareto": (("pareto", "--budgets", "0.2", *SOLVE[3:], *WORK), [*SOURCE[: len(WEIGHTS)], *CALIBRATED]),
    "merge": (("stats", "merge", "work", "more", "--into", "merged"), CALIBRATED),
    "verify": (
        ("verify", "out", "--require-reference", *WORK),
        [
            *SOURCE[: len(WEIGHTS)],
            *(f"work/{name}" for name in ("source.json", MANIFEST, TOKENS, *SOLUTION)),
            *EXPORTED,
            *(f"out/{name}" for name in ("model.safetensors", *TOKENIZER, *CARRIED)),
        ],
    ),
}


@pytest.fixture
def there(here, whole, tmp_path, monkeypatch) -> Path:
    """Extend `here` with the export, a second calibration in `more`, and only the first check of the export's files."""
    from a3cli.stages import checker

    def look_at_files(request, folder):
        outcome, detail = checker.attempt(checker.check_files, checker.Export(request))
        return [{"name": "files", "outcome": outcome, "detail": detail}]

    monkeypatch.setattr("a3cli.stages.verify.run_checker", look_at_files)
    shutil.copytree(whole / "out", "out")
    shutil.copytree(whole / "more", "more")
    return tmp_path


@pytest.mark.parametrize("name", sorted({name for _, names in LOOKING.values() for name in names}))
def test_damaged_and_looked_at(name, whole, there, a3):
    """The file is rejected by name; for a damaged export `a3 verify` reports the same as a failed check."""
    path = there / name
    undamaged = path.read_bytes()
    for damage in DAMAGES:
        damage(path, whole / "other" / name)
        before = snapshot(there)
        # Another model's manifest is valid in itself: the error names a file that does not match it.
        named = "" if damage is replace and "manifest" in name else path.name
        for command, names in LOOKING.values():
            if name not in names:
                continue
            outcome = a3(*command, "--quiet", "--json")
            if (name, damage) == ("work/solution/manifest.json", replace):  # a solution of an earlier calibration
                assert f"{name} was solved from another" in outcome.stdout or "holds another solution" in outcome.stderr
            elif command[0] == "verify":
                assert outcome.code == 1, outcome
                assert named in outcome.stderr
            else:
                refused(outcome, named)
                assert snapshot(there) == before
        path.write_bytes(undamaged)


@pytest.mark.parametrize("looking", LOOKING)
def test_damaged_and_not_looked_at(looking, whole, there, a3):
    """A file that a command does not read changes neither its output nor its result."""
    command, names = LOOKING[looking]

    def say() -> tuple[object, ...]:
        outcome = a3(*command, "--quiet", "--json")
        page = there / "page.html"
        made = snapshot(there / "merged"), page.read_bytes() if page.exists() else None
        for product in ("merged", "work/channels", "work/kept"):
            shutil.rmtree(there / product, ignore_errors=True)
        return outcome, made

    undisturbed = say()
    for name in sorted({name for _, others in LOOKING.values() for name in others} - set(names)):
        flip_a_bit(there / name, Path())
    assert say() == undisturbed


def flip_between_samples(path: Path) -> None:
    """Flip a byte in the middle of the first gap between two sampled places."""
    from a3cli.models.checkpoint import FINGERPRINT_BYTES, FINGERPRINT_SAMPLES

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
    monkeypatch.setattr("a3cli.models.checkpoint.SAMPLED_ABOVE", 1 << 22)
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
    assert a3("export", "out", "--work", "work").code == 0  # sampled hashes miss it, as docs/trust.md says


def test_a_source_of_up_to_a_gigabyte_is_hashed_wholly(checkpoint, a3, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint("llama-gqa", vocab_size=12000), "source")
    assert a3("calibrate", "source", "--dataset", text_file, *SHORT, "--work", "work").code == 0
    flip_between_samples(Path("source", "model.safetensors"))
    refused(a3(*SOLVE, "--work", "work"), "model.safetensors")


@pytest.mark.parametrize("size", [1, 60_000, 65_536, 500_001, (1 << 20) - 1, 1 << 20])
def test_the_fingerprint_covers_shards_up_to_a_mebibyte_wholly(size, tmp_path):
    from a3cli.models.checkpoint import FINGERPRINT_BYTES, FINGERPRINT_SAMPLES

    covered, end = 0, 0
    for i in range(FINGERPRINT_SAMPLES):
        start = i * max(0, size - FINGERPRINT_BYTES) // (FINGERPRINT_SAMPLES - 1)
        assert start <= end
        covered = end = max(end, min(size, start + FINGERPRINT_BYTES))
    assert covered == size
