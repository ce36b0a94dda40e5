"""The commands on a model card reproduce the export, whatever its options."""

import json
import re
import shlex
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a3cli.models.checkpoint import resolve_model
from a3cli.report.commands import calibrate_commands, export_command, solve_command
from a3cli.report.names import public_dataset
from a3cli.settings import (
    COMPONENTS,
    CalibrateSettings,
    ExportSettings,
    Settings,
    SolveSettings,
    TextSettings,
    option_of,
)
from a3cli.settings.texts import MixedText, joined_name
from a3cli.stages.calibration_folder import describe_request
from a3cli.stages.merge import merged_request
from a3cli.work.machine import Machine
from a3cli.work.manifests import Calibration, CalibrationRequest, MadeWith
from tests.conftest import snapshot

pytestmark = pytest.mark.usefixtures("hasty")

# Settings that a card's commands omit, each with the reason why the bytes of the weights do not depend on it.
UNSAID: dict[type[Settings], dict[str, str]] = {
    TextSettings: {},
    MixedText: {},
    CalibrateSettings: {
        "devices": "they take whole layers in turn; their kind is said as --device",
        "follow_symlinks": "it allows reading through links; what is read is the same",
        "hidden_states": "the same numbers lie in memory or in a file",
    },
    SolveSettings: {
        "num_processes": "each layer is solved by one thread, however many there are",
        "memory": "figures are compared with it",
        "name": "it says where the same bytes are kept",
    },
    ExportSettings: {
        "name": "it says where the solution is kept",
        "overwrite": "it is about what was there before",
        "num_processes": "each weight file is written by one of them",
        "full_check": "the source is compared with what calibration saw; nothing is written from it",
        "check_reproducible": "the second export is removed",
        "evaluations": "figures of the export itself, in README.md and a3_manifest.json alone",
        "push_to_hub": "it says where a copy of the same bytes goes",
        "public": "it says who sees that copy",
    },
}
# Settings whose option has another name, or that have no option of their own.
OTHER_OPTION = {"model": "model"}
# Options that are not settings: paths, time limits and verbosity.
NO_SETTING = {"--work", "--source", "--overwrite", "--max-minutes", "--json", "--quiet", "out"}
STAGES: dict[str, type[Settings]] = {"calibrate": CalibrateSettings, "solve": SolveSettings, "export": ExportSettings}

COUNTS = st.integers(1, 2**40)
FRACTIONS = st.floats(0, 1, exclude_max=True)
# What `printable` leaves as it is; generated, since filtering would reject most texts.
CHARACTERS = {"exclude_categories": ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")}
NAMES = st.text(st.characters(**CHARACTERS), min_size=1, max_size=12)
FILES = st.text(st.characters(**CHARACTERS, exclude_characters="/"), min_size=1, max_size=12).map("{}.txt".format)
DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
TEXT = {
    "dataset": FILES | st.sampled_from(["wikitext2", "allenai/c4:en", "owner/name"]),
    "text_field": NAMES | st.just(""),
    "split": st.none() | NAMES,
    "chat": st.booleans(),
    "samples": COUNTS,
    "seq_len": st.integers(2, 2**40),
    "seed": st.integers(0, 2**40),
}
CALIBRATE = {
    "model": FILES,
    "revision": st.none() | st.from_regex("[0-9a-f]{40}", fullmatch=True),
    "text": st.builds(TextSettings, **TEXT),
    "texts": st.just(()),  # a mixture has a test of its own
    "device": st.sampled_from(["cpu", "cuda"]),  # the device that was chosen, also by `auto`
    "dtype": DTYPES,
    "batch_size": st.none() | COUNTS,
    "mlp_stats": st.sampled_from(["full", "diagonal"]),
    "trust_remote_code": st.booleans(),
    "full_check": st.booleans(),
    "num_processes": st.integers(1, 100),
}
MIXED = {
    "dataset": TEXT["dataset"] | st.just("owner/name:2024"),
    "weight": st.floats(0, exclude_min=True, allow_infinity=False),
    "text_field": st.none() | NAMES,
    "split": st.none() | NAMES,
}
SOLVE = {
    "budget": st.none() | FRACTIONS,
    "kv_budget": st.none() | FRACTIONS,
    "budget_bytes": st.none() | COUNTS,
    "budget_params": st.none() | COUNTS,
    "attention_budget": st.none() | FRACTIONS,
    "mlp_budget": st.none() | FRACTIONS,
    "method": st.sampled_from(["best", "paper"]),
    "shape": st.sampled_from(["stock", "per-layer"]),
    "context": st.none() | st.integers(2, 2**40),
    "components": st.sets(st.sampled_from(COMPONENTS), min_size=1).map(tuple),
    "head_multiple": COUNTS,
    "mlp_multiple": COUNTS,
    "min_head": COUNTS,
    "min_mlp": COUNTS,
    "rope_form": st.sampled_from(["auto", "theta", "linear", "longrope"]),
    "eigenvalue_floor": FRACTIONS,
    "ridge": st.floats(0, allow_infinity=False),
    "sensitivity": st.sampled_from(["gradient", "residual", "probe"]),
    "probe_blocks": COUNTS,
    "probe_points": COUNTS,
    "sequential": st.booleans(),
    "refit_rounds": st.integers(0, 2**40),
    "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:1"]),
    "dtype": DTYPES | st.just("auto"),
    "batch_size": COUNTS,
}
EXPORT = {
    "dtype": DTYPES | st.just("source"),
    "max_shard_size": COUNTS,
    "as_type": st.sampled_from([None, "llama"]),
}
TRIED = {
    TextSettings: TEXT,
    MixedText: MIXED,
    CalibrateSettings: CALIBRATE,
    SolveSettings: SOLVE,
    ExportSettings: EXPORT,
}


@pytest.mark.parametrize("kind", TRIED, ids=lambda kind: kind.__name__)
def test_every_setting_is_tried_or_cannot_change_a_byte(kind):
    """This fails for a new setting: add it to the card's commands, or give the reason why they may omit it."""
    assert not TRIED[kind].keys() & UNSAID[kind].keys()
    assert TRIED[kind].keys() | UNSAID[kind].keys() == kind.model_fields.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_has_an_option(stage, command_line):
    options = {name for parameter in command_line.commands[stage].params for name in parameter.opts}
    fields = {*STAGES[stage].model_fields} - {"text", "texts"} | (
        {*TextSettings.model_fields} if stage == "calibrate" else set()
    )
    expected = {OTHER_OPTION.get(name, option_of((name,))) for name in fields}
    assert expected <= options
    assert options <= expected | NO_SETTING


class Parsed(Exception):
    """Ends a command once its settings have been built."""


@pytest.fixture(scope="module")
def settings_of(command_line):
    """Return a function that parses a line of a card with the real command line into the settings of a stage."""

    def parse(line: str) -> Any:
        made: list[Settings] = []

        def make_settings(kind, **values):
            made.append(kind(**values))
            raise Parsed

        _, name, *arguments = shlex.split(line)
        with pytest.MonkeyPatch.context() as patch, suppress(Parsed):
            patch.setattr("a3cli.cli.options.make_settings", make_settings)
            command_line.commands[name].main(arguments, standalone_mode=False)
        return made[0]

    return parse


@dataclass(frozen=True)
class Calibrated:
    """Settings, and the manifest of a calibration with them on some machine."""

    settings: CalibrateSettings
    manifest: dict[str, Any]
    expected: CalibrateSettings  # with the values that `auto` resolved to, and the data set's public name


@st.composite
def calibrations(draw, checkpoint, **same: Any) -> Calibrated:
    drawn = {name: draw(strategy) for name, strategy in CALIBRATE.items() if name not in same}
    settings = CalibrateSettings(**drawn, **same)
    machine = Machine(torch.device(settings.device), getattr(torch, settings.dtype))
    batch_size = settings.batch_size or draw(COUNTS)
    manifest = {
        "request": describe_request(settings, checkpoint, machine),
        "made_with": [{"processes": settings.num_processes, "batch_size": batch_size}] * 2,
        "tokens": settings.text.samples * settings.text.seq_len,
        "text_read": None,
        "tokens_hash": "blake3:" + "0" * 64,
        "blocks": [settings.text.samples, settings.text.seq_len],
        "sha256": draw(st.from_regex("[0-9a-f]{64}", fullmatch=True)),
    }
    texts = tuple(each.model_copy(update={"dataset": public_dataset(each.dataset)}) for each in settings.texts)
    name = joined_name(each.dataset for each in texts) if texts else public_dataset(settings.text.dataset)
    text = settings.text.model_copy(update={"dataset": name})
    same_bytes = {"text": text, "texts": texts, "batch_size": batch_size}
    return Calibrated(settings, manifest, settings.model_copy(update=same_bytes))


def named(settings: CalibrateSettings) -> CalibrateSettings:
    """Prefix a name that begins like an option with its folder."""
    return settings.model_copy(update={"model": f"./{settings.model}" if settings.model[0] == "-" else settings.model})


@pytest.fixture(scope="module")
def opened(checkpoint):
    return resolve_model(str(checkpoint("llama-gqa")))


@given(data=st.data())
def test_calibrate_commands_have_every_setting(data, opened, settings_of):
    made = data.draw(calibrations(opened))
    manifest = Calibration.model_validate(made.manifest)
    (line,) = calibrate_commands(made.settings.model, made.settings.revision, manifest.request, manifest.made_with)
    assert settings_of(line) == named(made.expected)


@hypothesis.settings(max_examples=50)
@given(data=st.data())
def test_the_command_of_a_mixture_has_every_setting(data, opened, settings_of):
    """Also of one that is a part of a merged calibration."""
    text = {name: data.draw(TEXT[name]) for name in ("samples", "seq_len", "seed", "chat")}
    mixed = st.builds(MixedText, **MIXED)
    texts = data.draw(st.lists(mixed, min_size=2, max_size=4, unique_by=lambda each: public_dataset(each.dataset)))
    text["samples"] += len(texts)
    made = data.draw(calibrations(opened, text=text, texts=texts))
    manifest = Calibration.model_validate(made.manifest)
    (line,) = calibrate_commands(made.settings.model, made.settings.revision, manifest.request, manifest.made_with)
    found = settings_of(line)
    assert found.parts == made.expected.parts
    assert found == named(made.expected)
    other = data.draw(calibrations(opened))
    merged = merged_request([manifest, Calibration.model_validate(other.manifest)])
    assert "mixture" not in merged
    request = CalibrationRequest.model_validate(merged)
    again = settings_of(calibrate_commands(made.settings.model, None, request, None)[0])
    assert again.parts == made.expected.parts


@hypothesis.settings(max_examples=30)
@given(data=st.data())
def test_merged_calibrations_have_a_command_each(data, opened, settings_of):
    """Shared settings are those of the first one; text, batch size, processes and device are each one's own."""
    first = data.draw(calibrations(opened))
    own = ("text", "batch_size", "device", "num_processes")
    same = {name: getattr(first.settings, name) for name in CALIBRATE if name not in own}
    others = data.draw(st.lists(calibrations(opened, **same), min_size=1, max_size=3))
    merged = merged_request([Calibration.model_validate(each.manifest) for each in (first, *others)])
    request = CalibrationRequest.model_validate(merged)
    *lines, merge = calibrate_commands(first.settings.model, first.settings.revision, request, None)
    assert [settings_of(line) for line in lines] == [named(each.expected) for each in (first, *others)]
    works = [shlex.split(line)[-1] for line in lines]
    assert len({*works}) == len(lines)
    assert shlex.split(merge) == ["a3", "stats", "merge", *works, "--into", "a3-work"]


@given(st.builds(SolveSettings, **SOLVE))
def test_solve_command_has_every_setting(settings_of, settings):
    assert settings_of(solve_command(settings)) == settings


@given(st.builds(ExportSettings, **EXPORT))
def test_export_command_has_every_setting(settings_of, settings):
    assert settings_of(export_command(settings.dtype, settings.max_shard_size, settings.as_type)) == settings


def test_layers_that_were_divided_in_different_ways_are_mentioned(opened):
    """This happens after a calibration that ran out of memory, or that resumed with another number of processes."""
    settings = CalibrateSettings(model="source", text={"dataset": "text.txt", "seq_len": 32})
    made_with = [MadeWith(processes=1, batch_size=size) for size in (8, 4, 4)]
    request = describe_request(settings, opened, Machine(torch.device("cpu"), torch.float32))
    comment, line = calibrate_commands("source", None, CalibrationRequest.model_validate(request), made_with)
    assert comment.startswith("# Not all layers")
    assert "--batch-size 4" in line


# Options that change bytes, and some that must not and that the commands omit.
UNUSUAL = {
    "sequential": (
        ("--seed", 3, "--samples", 4, "--batch-size", 2, "--dtype", "bfloat16", "--full-check", "--devices", "cpu,cpu",
         "--hidden-states", "memory"),
        ("--attention-budget", 0.2, "--mlp-budget", 0.3, "--head-multiple", 4, "--mlp-multiple", 4, "--context", 128,
         "--ridge", 1e-3, "--eigenvalue-floor", 1e-4, "--sensitivity", "probe", "--probe-blocks", 2,
         "--probe-points", 2, "--dtype", "float32", "--sequential", "--refit-rounds", 1, "--batch-size", 2,
         "--num-processes", 1, "--name", "q-25.b"),
        ("--dtype", "bfloat16", "--max-shard-size", "100KB", "--num-processes", 2, "--full-check",
         "--check-reproducible", "--name", "q-25.b"),
    ),
    "one shot": (
        ("--samples", 3, "--batch-size", 3, "--mlp-stats", "diagonal", "--device", "cpu"),
        ("--budget", 0.3, "--method", "paper", "--shape", "per-layer", "--head-multiple", 2, "--mlp-multiple", 8,
         "--min-head", 6, "--components", "ov,mlp", "--eigenvalue-floor", 0.01, "--device", "cpu", "--batch-size", 3,
         "--refit-rounds", 0),
        ("--max-shard-size", "40KB"),
    ),
    "of the cache": (
        ("--samples", 3, "--batch-size", 3),
        ("--kv-budget", 0.3, "--budget-params", "70K", "--head-multiple", 2, "--mlp-multiple", 8, "--method", "paper"),
        (),
    ),
    "as many blocks as fit": (("--samples", 3), ("--budget", 0.25, "--mlp-multiple", 8, "--head-multiple", 2), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_the_commands_of_a_card_give_the_same_bytes(name, a3, checkpoint, text_file, tmp_path, monkeypatch):
    """Compare every file of the export; in a3_manifest.json, ignore the requested batch size if it was `auto`."""
    calibrating, solving, exporting = UNUSUAL[name]
    begin(tmp_path / "here", checkpoint, text_file, monkeypatch)
    assert a3("calibrate", "source", "--dataset", "text.txt", "--seq-len", 32, *calibrating).code == 0
    assert a3("solve", *solving).code == 0
    assert a3("export", "OUT", *exporting).code == 0
    ours = snapshot(Path("OUT"))
    card = Path("OUT/README.md").read_text("utf-8")
    begin(tmp_path / "there", checkpoint, text_file, monkeypatch)
    follow(a3, card)
    theirs = snapshot(Path("OUT"))
    if name == "as many blocks as fit":
        manifests = [json.loads(files.pop("a3_manifest.json")) for files in (ours, theirs)]
        asked = [manifest["calibration"]["request"].pop("batch_size") for manifest in manifests]
        assert asked == ["auto", 3]
        for manifest in manifests:  # hashes of manifests that contain the batch size
            for part in (manifest, manifest["calibration"], manifest["solution"]):
                del part["sha256"]
            del manifest["solution"]["request"]["calibration"]
        assert manifests[0] == manifests[1]
    assert ours == theirs


def begin(folder: Path, checkpoint, text_file, monkeypatch) -> None:
    """Create a fresh current folder with the source and the text, and without a work folder."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.copytree(checkpoint("llama-gqa"), "source")
    shutil.copyfile(text_file, "text.txt")
    shutil.copyfile(Path(__file__), "other.txt")


def follow(a3, card: str) -> None:
    lines = re.findall(r"^a3 (.+)$", card, re.M)
    assert [line.split()[0] for line in lines if line.split()[0] != "stats"][-2:] == ["solve", "export"]
    for line in lines:
        outcome = a3(*shlex.split(line))
        assert outcome.code == 0, (line, outcome.stderr)


def test_the_commands_of_a_mixture_give_the_same_bytes(a3, checkpoint, text_file, tmp_path, monkeypatch):
    begin(tmp_path / "here", checkpoint, text_file, monkeypatch)
    Path("rows.jsonl").write_text(json.dumps({"body": text_file.read_text("utf-8")[:3000]}) + "\n")
    texts = ("--dataset", "text.txt:2", "--dataset", "./rows.jsonl:1", "--text-field", "", "--text-field", "body")
    options = ("--samples", 5, "--seq-len", 32, "--seed", 4, "--batch-size", 2)
    assert a3("calibrate", "source", *texts, *options).code == 0
    assert a3("solve", "--budget", 0.25, "--mlp-multiple", 8, "--head-multiple", 2).code == 0
    assert a3("export", "OUT").code == 0
    ours = snapshot(Path("OUT"))
    begin(tmp_path / "there", checkpoint, text_file, monkeypatch)
    shutil.copy(tmp_path / "here" / "rows.jsonl", "rows.jsonl")
    follow(a3, ours["README.md"].decode())
    assert snapshot(Path("OUT")) == ours


def test_the_commands_of_a_merged_calibration_give_the_same_bytes(a3, checkpoint, text_file, tmp_path, monkeypatch):
    begin(tmp_path / "here", checkpoint, text_file, monkeypatch)
    text = ("--samples", 4, "--seq-len", 32)
    assert a3("calibrate", "source", "--dataset", "text.txt", *text, "--batch-size", 2, "--work", "one").code == 0
    assert a3("calibrate", "source", "--dataset", "other.txt", *text, "--batch-size", 3, "--work", "two").code == 0
    assert a3("stats", "merge", "one", "two", "--into", "a3-work").code == 0
    assert a3("solve", "--budget", 0.25, "--mlp-multiple", 8, "--head-multiple", 2).code == 0
    assert a3("export", "OUT").code == 0
    ours = snapshot(Path("OUT"))
    begin(tmp_path / "there", checkpoint, text_file, monkeypatch)
    follow(a3, ours["README.md"].decode())
    assert snapshot(Path("OUT")) == ours
