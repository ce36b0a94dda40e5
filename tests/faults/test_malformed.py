"""Malformed input by hypothesis, each in a forked process with time and memory limits: one error line, or success."""

import json
import shutil
import struct
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.conftest import SHORT
from tests.helpers import forks

SECONDS, MEMORY = 10, 1 << 30
SOME = settings(
    max_examples=8,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
MANY = settings(SOME, max_examples=60)

absurd = st.one_of(
    st.sampled_from([
        None, True, False, -1, 0, 1, 2, 3, 7, 10**9, 2**31, 2**63, 2**64 + 1, -(2**63), 0.5, -0.0, 1e-300, 1e308,
        float("nan"), float("inf"), "", "x", "48", "\x00\x1b[31m\n", "../..", [], [1], {}, {"a": 1}, [[[]]],
    ]),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)),
)  # fmt: skip


@st.composite
def mutated(draw: Any, value: dict[str, Any]) -> dict[str, Any]:
    """Draw an object with one to three keys, of it or of nested objects, removed or changed."""
    changed = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        place = changed
        while isinstance(place, dict) and place:
            key = draw(st.sampled_from(sorted(place)))
            if isinstance(place[key], dict) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.booleans()):
                place[key] = draw(absurd)
            else:
                del place[key]
            break
    return changed


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory) -> Path:
    """Return a single-file checkpoint; tests copy it."""
    return Path(shutil.copytree(checkpoint("llama-gqa"), tmp_path_factory.mktemp("model") / "source"))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("malformed")


def check(place: Path, source: Path, text: Path, *, command: str = "calibrate") -> None:
    """Run the command and check its outcome."""
    work = ("--work", "work") if command == "calibrate" else ()
    read = ("--dataset", text, *SHORT) if command != "plan" else ()
    check_command((command, source, *read, "--quiet", *work), empty(place / "run"))


def check_command(arguments: tuple[object, ...], run: Path, *, seconds: float = SECONDS) -> None:
    """Run a command in `run` and check its outcome; a failed command must leave nothing new there."""
    before = {path.name for path in run.iterdir()}
    outcome = forks.run(arguments, run, seconds=seconds, memory=MEMORY)
    assert outcome.memory < MEMORY, outcome
    check_outcome(outcome, failed_checks=arguments[0] == "verify")
    if outcome.code:
        assert {path.name for path in run.iterdir()} <= before | set(forks.OUTPUTS)


def check_outcome(outcome: Any, *, failed_checks: bool = False) -> None:
    """Check for success with an empty stderr, or for one line there; with failed checks, results must exist too."""
    assert outcome.code in ((0, 1, 2) if failed_checks else (0, 2)), outcome
    if outcome.code:
        (line,) = outcome.stderr.splitlines()
        assert line.startswith("error: ")
        assert line.isprintable(), line
        assert outcome.code == 1 or outcome.stdout == ""
    else:
        assert outcome.stderr == ""


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def copy(model: Path, place: Path) -> Path:
    shutil.rmtree(place / "source", ignore_errors=True)
    return Path(shutil.copytree(model, place / "source"))


def repeated(test: Any) -> Any:
    """Run a few examples by default, many in the slow run."""
    return pytest.mark.parametrize("amount", [SOME, pytest.param(MANY, marks=pytest.mark.slow)], ids=["some", "many"])(
        test
    )


@pytest.mark.parametrize("command", ["calibrate", "eval", "plan"])
@repeated
def test_configurations(amount, command, model, place, text_file):
    original = json.loads((model / "config.json").read_text())

    @amount
    @given(config=mutated(original))
    def run(config: dict[str, Any]) -> None:
        source = copy(model, place)
        (source / "config.json").write_text(json.dumps(config))
        check(place, source, text_file, command=command)

    run()


ABSURD = {
    "vocabulary": {"vocab_size": 10**9},
    "layers": {"num_hidden_layers": 10**9},
    "some more layers": {"num_hidden_layers": 3000},
    "layers that each have a type": {"model_type": "qwen2", "num_hidden_layers": 2 * 10**8},
    "width": {"hidden_size": 10**8},
    "MLP width": {"intermediate_size": 10**9},
    "heads": {"head_dim": 10**9},
    "context": {"max_position_embeddings": 10**12},
    "attention": {"attn_implementation": "flash_attention_2"},
    "dtype": {"dtype": "nonsense"},
}


@pytest.mark.parametrize("command", ["calibrate", "eval", "plan"])
@pytest.mark.parametrize("name", ABSURD)
def test_absurd_sizes(name, command, model, place, text_file):
    """The sizes are compared with the weights before anything of such a size is allocated."""
    source = copy(model, place)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | ABSURD[name]))
    check(place, source, text_file, command=command)


@st.composite
def headers(draw: Any, header: dict[str, Any], size: int) -> bytes:
    """Draw the header of a safetensors file with wrong offsets, shapes or types, or without any sense."""
    kind = draw(st.sampled_from(["entry", "entry", "entry", "length", "bytes", "nested", "swap"]))
    if kind == "bytes":
        return draw(st.binary(max_size=64))
    changed = json.loads(json.dumps(header))
    names = sorted(set(changed) - {"__metadata__"})
    one, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    if kind == "swap":  # two tensors with the same offsets
        changed[one]["data_offsets"] = changed[other]["data_offsets"]
    elif kind == "entry":
        numbers = st.sampled_from([0, 1, -1, size, size + 1, 2**31, 2**62, 2**64, 10**30])
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        odd = {
            "dtype": st.sampled_from(["F32", "I64", "F8_E4M3", "BOOL", "", "X", "BF16"]),
            "shape": st.lists(numbers, max_size=4),
            "data_offsets": st.lists(numbers, min_size=2, max_size=2),
        }[field]
        changed[one][field] = draw(odd | absurd)
    text = json.dumps(changed).encode()
    if kind == "nested":
        text = b'{"a":' * 100_000
    length = draw(st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1])) if kind == "length" else len(text)
    return struct.pack("<Q", length) + text


def split_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


@repeated
def test_safetensors_headers(amount, model, place, text_file):
    original, data = split_header(model / "model.safetensors")

    @amount
    @given(header=headers(original, len(data)))
    def run(header: bytes) -> None:
        source = copy(model, place)
        (source / "model.safetensors").write_bytes(header + data)
        check(place, source, text_file)

    run()


@repeated
def test_tokenizers(amount, model, place, text_file):
    originals = {name: json.loads((model / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")}
    originals["tokenizer.json"]["model"]["vocab"] = dict(
        list(originals["tokenizer.json"]["model"]["vocab"].items())[:40]
    )

    @amount
    @given(data=st.data(), name=st.sampled_from(sorted(originals)))
    def run(data: Any, name: str) -> None:
        source = copy(model, place)
        text = json.dumps(data.draw(mutated(originals[name])))
        (source / name).write_text(text[: data.draw(st.integers(0, len(text)) | st.just(len(text)))])
        check(place, source, text_file)

    run()


@repeated
def test_texts(amount, model, place):
    rows = st.one_of(
        st.binary(max_size=300),
        st.lists(st.dictionaries(st.sampled_from(["text", "body"]), absurd, max_size=2), max_size=6).map(
            lambda lines: "\n".join(json.dumps(line) for line in lines).encode()
        ),
        st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.just(b"PAR1" + b"\xff" * 40 + b"PAR1"),
    )

    @amount
    @given(content=rows, suffix=st.sampled_from([".txt", ".jsonl", ".parquet"]))
    def run(content: bytes, suffix: str) -> None:
        text = place / f"text{suffix}"
        text.write_bytes(content)
        check(place, model, text)

    run()


@repeated
def test_recipes(amount, model, place, text_file):
    text = {"dataset": str(text_file), "samples": 3, "seq_len": 32, "seed": 0}
    recipe = {
        "work": "work",
        "out": "out",
        "calibrate": {"model": str(model), "text": text, "batch_size": 1, "dtype": "float32"},
        "solve": {"budget": 0.25, "head_multiple": 2, "mlp_multiple": 8, "components": ["qk", "ov", "mlp"]},
        "export": {"max_shard_size": "1MB", "dtype": "source"},
    }
    places = {"work", "out"}

    @amount
    @given(data=st.data())
    def run(data: Any) -> None:
        folder = empty(place / "recipe")
        changed = data.draw(mutated({key: value for key, value in recipe.items() if key not in places}))
        content = yaml.safe_dump({**{key: recipe[key] for key in places}, **changed})
        (folder / "recipe.yaml").write_text(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
        check_command(("run", folder / "recipe.yaml", "--quiet"), folder)

    run()


@pytest.fixture(scope="module")
def finished(model, text_file, tmp_path_factory) -> Path:
    """Return a folder with `source`, `work` up to a solution, and `out`."""
    from a3cli.settings import CalibrateSettings, ExportSettings, SolveSettings, make_settings
    from a3cli.stages.calibrate import calibrate
    from a3cli.stages.export import export
    from a3cli.stages.solve import solve
    from a3cli.work.folder import Work

    folder = tmp_path_factory.mktemp("finished")
    source, work = Path(shutil.copytree(model, folder / "source")), Work(folder / "work")
    text = {"dataset": str(text_file), "samples": 3, "seq_len": 32}
    settings = make_settings(CalibrateSettings, model=str(source), text=text)
    calibrate(settings, work, overwrite=False, progress=lambda **at: None)
    settings = make_settings(SolveSettings, budget=0.25, mlp_multiple=8, head_multiple=2, method="paper")
    solve(settings, work, overwrite=False, progress=lambda **at: None)
    export(folder / "out", ExportSettings(), work)
    return folder


@st.composite
def malformed(draw: Any, files: list[Path]) -> tuple[Path, bytes]:
    """Draw one of the files and its new beginning: JSON with other values, or another header."""
    path = draw(st.sampled_from(files))
    if path.suffix == ".json":
        return path, json.dumps(draw(mutated(json.loads(path.read_text())))).encode()
    header, data = split_header(path)
    return path, draw(headers(header, len(data)))


def rest_of(path: Path) -> bytes:
    return split_header(path)[1] if path.suffix == ".safetensors" else b""


@repeated
def test_inspected(amount, finished, place):
    """Inspect an export and a work folder whose source is malformed."""
    out, source = finished / "out", finished / "source"
    files = [*(out / n for n in ("config.json", "a3_manifest.json")), source / "config.json", *source.glob("model*")]

    @amount
    @given(change=malformed(files))
    def run(change: tuple[Path, bytes]) -> None:
        path, beginning = change
        whole = path.read_bytes()
        path.write_bytes(beginning + rest_of(path))
        try:
            looked_at = out if path.parent == out else finished / "work"
            check_command(("inspect", looked_at, "--quiet"), empty(place / "run"))
        finally:
            path.write_bytes(whole)

    run()


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "apart"])
def test_verified(apart, finished, place, a3, monkeypatch):
    """Skip the checker process, whose start takes seconds, by default; run some of its checks here."""
    source, work = finished / "out", finished / "work"
    if not apart:
        monkeypatch.setattr("a3cli.stages.verify.run_checker", looking_at_files)
    files = [source / name for name in ("config.json", "a3_manifest.json", "model.safetensors")]

    @(SOME if apart else MANY)
    @given(change=malformed(files))
    def run(change: tuple[Path, bytes]) -> None:
        path, beginning = change
        out = copy(source, place)
        (out / path.name).write_bytes(beginning + rest_of(path))
        command = ("verify", out, "--work", work, "--quiet")
        if apart:
            check_command(command, empty(place / "run"), seconds=6 * SECONDS)
        else:
            check_outcome(a3(*command), failed_checks=True)

    run()


def looking_at_files(request: dict[str, Any], folder: Path) -> list[dict[str, str]]:
    """Run the checks that precede loading the model. Their tracebacks go to stderr, as in the checker process."""
    from a3cli.stages import checker

    export, found = checker.Export(request), []
    with (folder / "stderr").open("w") as stderr, redirect_stderr(stderr):
        for name in ("files", "code", "tensors", "finite"):
            outcome, detail = checker.attempt(checker.CHECKS[name][0], export)
            found.append({"name": name, "outcome": outcome, "detail": detail})
    return found
