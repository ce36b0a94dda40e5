"""The Python interface: docs/python.md runs as it stands, nothing is printed, and results are the command line's."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import a3cli
from a3cli.errors import Interrupted
from a3cli.report.manifest import Manifest
from a3cli.settings import EvalSettings, ParetoSettings
from a3cli.settings.keywords import settings_from
from a3cli.work.manifests import CalibrationManifest, SolutionManifest
from tests.conftest import ROOT, snapshot

pytestmark = pytest.mark.usefixtures("hasty")

TEXT = {"samples": 3, "seq_len": 32}
SIZES = {"head_multiple": 2, "mlp_multiple": 8}
FUNCTIONS = ("calibrate", "compress", "evaluate", "export", "plan", "solve", "verify")


@pytest.fixture
def folder(checkpoint, text_file, tmp_path, monkeypatch) -> Path:
    """The current folder, with `model`, wide enough for the default multiples, and `text.txt`."""
    monkeypatch.chdir(tmp_path)
    shape = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 256}
    shutil.copytree(checkpoint("llama-gqa", **shape), "model")
    shutil.copy(text_file, "text.txt")
    return tmp_path


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, a3cli; print({'torch', 'transformers', 'pydantic', 'typer'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_the_package_offers_its_functions_with_types_and_docs():
    assert set(FUNCTIONS) < set(dir(a3cli))
    assert set(a3cli.__all__) == {*FUNCTIONS, "A3Error", "__version__"}
    for name in FUNCTIONS:
        function = getattr(a3cli, name)
        assert set(typing.get_type_hints(function)) == {*inspect.signature(function).parameters, "return"}
        described = inspect.getdoc(function)
        for parameter in inspect.signature(function).parameters:
            assert re.search(rf"^ +\**{parameter}: ", described, re.M), f"{name}: {parameter}"
        assert "Returns:" in described
        assert "A3Error:" in described
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        a3cli.train  # noqa: B018


def test_types_ship():
    assert (Path(a3cli.__file__).parent / "py.typed").is_file()
    assert '"a3cli" = ["py.typed"]' in (ROOT / "pyproject.toml").read_text("utf-8").splitlines()


# What tests and the command line silence libraries with; a program that imports a3cli has none of it.
SILENCE = ("TRANSFORMERS_", "DATASETS_", "TQDM_", "HF_HUB_DISABLE_")


@pytest.mark.slow
def test_the_examples_run(folder):
    """All blocks of docs/python.md in order, as one program; only their own `print` writes anything."""
    page = (ROOT / "docs" / "python.md").read_text("utf-8")
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S))
    assert all(f"a3cli.{name}(" in program for name in FUNCTIONS)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(SILENCE)}
    ran = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, env=plain, check=False)
    assert ran.returncode == 0, ran.stderr
    bars = [line for line in ran.stderr.splitlines() if line]
    assert all(line.startswith("Loading weights: ") for line in bars), ran.stderr
    assert sum("100%" in line for line in bars) == 1  # of the page's own from_pretrained: a3 restored the setting
    printed = ran.stdout
    expected = [
        r"\d+\.\d% of the decoder's linear weights removed",
        r"perplexity \d+\.\d \(source \d+\.\d\), KL \d+\.\d{3} nats",
        r"\{.*\}",
        r"reading the calibration text: \d+ of 4096 tokens",
        r"layer 1 of 2: .*",
        r"layer 2 of 2: 512 of 512 tokens",
        r"solve\(\) has no setting 'budgett' \(did you mean 'budget'\?\); .*",
    ]
    lines = printed.splitlines()
    assert all(any(re.fullmatch(each, line) for line in lines) for each in expected), printed
    assert all(any(re.fullmatch(each, line) for each in expected) for line in lines), printed
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []  # compress removed its own


def test_the_stages_give_the_same_bytes_as_the_commands(a3, checkpoint, text_file, tmp_path):
    source, one, other = checkpoint("llama-gqa"), tmp_path / "python", tmp_path / "commands"
    seen = []
    calibration = a3cli.calibrate(
        source,
        one,
        dataset=str(text_file),
        **TEXT,
        progress=lambda **at: "layer" in at and seen.append((at["layer"], at["layers"])),
    )
    solution = a3cli.solve(one, budget=0.25, **SIZES)
    manifest = a3cli.export(tmp_path / "out-python", one)
    kinds = (CalibrationManifest, SolutionManifest, Manifest)
    assert tuple(map(type, (calibration, solution, manifest))) == kinds
    assert {layer for layer, _ in seen} == {0, 1}
    for command in (
        ("calibrate", source, "--dataset", text_file, "--samples", 3, "--seq-len", 32),
        ("solve", "--budget", 0.25, "--head-multiple", 2, "--mlp-multiple", 8),
        ("export", tmp_path / "out-commands"),
    ):
        assert a3(*command, "--work", other).code == 0
    assert snapshot(one) == snapshot(other)
    assert snapshot(tmp_path / "out-python") == snapshot(tmp_path / "out-commands")
    text = {"dataset": str(text_file), "samples": 2, "seq_len": 32}
    measured = a3cli.evaluate(tmp_path / "out-python", against=source, **text, bootstrap=0)
    options = ("--dataset", text_file, "--samples", 2, "--seq-len", 32, "--bootstrap", 0)
    shown = a3("eval", tmp_path / "out-python", "--against", source, *options, "--json").json
    for result in (measured, shown):
        for figures in (result, *result["datasets"]):
            figures.pop("tokens_per_second")
    assert measured == shown


def compress(folder: Path, **changed):
    options = {"budget": 0.25, "dataset": "text.txt", **TEXT, **changed}
    return a3cli.compress("model", folder / "out", **options)


def test_compress_keeps_its_work_folder_until_it_has_succeeded(folder, monkeypatch):
    def full(*arguments, **options):
        raise a3cli.A3Error("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("a3cli.stages.api.run_export", full)
        with pytest.raises(a3cli.A3Error, match="disk full"):
            compress(folder)
    kept = folder / ".out.a3-work"
    assert (kept / "solution" / "manifest.json").is_file()
    monkeypatch.setattr("a3cli.stages.calibrate.Calibration.run", full)  # nothing is computed again
    assert compress(folder).solution.budget_reached >= 0.25
    assert not kept.exists()
    assert (folder / "out" / "a3_manifest.json").is_file()


def test_compress_in_a_work_folder_of_ones_own(folder):
    first = compress(folder, work="mine")
    assert (folder / "mine" / "calibration" / "manifest.json").is_file()
    assert compress(folder, work="mine") == first  # finished: nothing to do
    with pytest.raises(a3cli.A3Error, match="other settings"):
        compress(folder, work="mine", budget=0.3)
    again = compress(folder, work="mine", budget=0.3, overwrite=True, export={"max_shard_size": "100KB"})
    assert again.max_shard_size == 100_000
    assert again.solution.budget_reached >= 0.3


def test_compress_refuses_before_any_work(folder, monkeypatch):
    monkeypatch.setattr("a3cli.stages.api.calibrated", pytest.fail)
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    with pytest.raises(a3cli.A3Error, match=r"not an empty folder; use overwrite=True"):
        compress(folder)
    cases = {
        "has no setting 'sampels' .did you mean 'samples'": {"sampels": 3},
        "has no setting 'overwrit' .did you mean 'overwrite'": {"export": {"overwrit": True}},
        "--budget 1.5": {"budget": 1.5},
        "--seq-len 'long'": {"seq_len": "long"},
    }
    for message, changed in cases.items():
        with pytest.raises(a3cli.A3Error, match=message):
            compress(folder, **changed)
    assert sorted(path.name for path in folder.iterdir()) == ["model", "out", "text.txt"]


def test_a_time_limit_interrupts_and_the_same_call_resumes(folder):
    with pytest.raises(Interrupted, match="--max-minutes 0 before"):
        a3cli.calibrate("model", "work", dataset="text.txt", **TEXT, max_minutes=0)
    assert a3cli.calibrate("model", "work", dataset="text.txt", **TEXT).request.text.samples == 3


def test_keywords_of_texts():
    def texts(**values):
        return settings_from(EvalSettings, "evaluate", {"model": "m", **values}).texts

    assert [(each.dataset, each.samples, each.seed) for each in texts(dataset=["a", "b"], samples=2)] == [
        ("a", 2, 0),
        ("b", 2, 0),
    ]
    assert [(each.dataset, each.samples) for each in texts()] == [("wikitext2", None)]  # as of the command
    assert texts(tasks=("arc",)) == ()
    assert [each.split for each in texts(texts=[{"dataset": "a", "split": "s"}])] == ["s"]
    with pytest.raises(a3cli.A3Error, match="either texts or dataset"):
        texts(texts=(), dataset="a")
    with pytest.raises(a3cli.A3Error, match="'chat'"):  # no option of the command either
        settings_from(ParetoSettings, "pareto", {"chat": True})
