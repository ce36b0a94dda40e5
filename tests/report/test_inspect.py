"""`a3 inspect`: its output for a work folder at every stage and for an export, and its warnings."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from a3cli.report.health import spectrum_health
from a3cli.report.layers import name_layers
from a3cli.solvers.linalg import effective_rank
from a3cli.solvers.moments import unpack_upper
from a3cli.text.tokens import NGRAM, describe_blocks
from tests.conftest import SHORT, SOLVE, put_in_statistics, refused

pytestmark = pytest.mark.usefixtures("hasty")


def test_a_calibration_under_way(a3, checkpoint, text_file, tmp_path, monkeypatch):
    from a3cli.cli.progress import SweepProgress

    plain = SweepProgress.__call__

    def interrupting(self, **at):
        plain(self, **at)
        if at.get("layer") == 1:
            raise KeyboardInterrupt

    command = ("calibrate", checkpoint("llama-gqa"), "--dataset", text_file, *SHORT, "--work", tmp_path / "work")
    with monkeypatch.context() as patch:
        patch.setattr(SweepProgress, "__call__", interrupting)
        assert a3(*command).code == 3
    found = a3("inspect", tmp_path / "work", "--json").json
    assert found["stage"] == "calibrating"
    assert [each["layer"] for each in found["layers"]] == [0]
    assert a3(*command).code == 0
    found = a3("inspect", tmp_path / "work", "--json").json
    assert (found["stage"], len(found["layers"])) == ("calibrated", 2)
    assert found["layers"][0]["qk"]["size"] is None


def test_an_mlp_without_a_gate_is_smaller(a3, checkpoint, text_file, tmp_path):
    work = ("--work", tmp_path / "work")
    assert a3("calibrate", checkpoint("starcoder2-gqa"), "--dataset", text_file, *SHORT, *work).code == 0
    assert a3(*SOLVE, *work).code == 0
    assert a3("export", tmp_path / "out", *work).code == 0
    for folder in ("work", "out"):
        layer = a3("inspect", tmp_path / folder, "--json").json["layers"][0]["mlp"]
        assert layer["bytes"] == {"before": 2 * 96 * 48 * 4, "after": 2 * layer["size"] * 48 * 4}


def test_what_it_says_is_what_the_files_hold(a3, work, tmp_path):
    found = a3("inspect", work, "--json").json
    solution = json.loads((work / "solution" / "manifest.json").read_text())
    sums = load_file(work / "calibration" / "layer-001.safetensors")
    layer = found["layers"][1]
    values = torch.linalg.eigvalsh(torch.cat([sums["k_gram"], sums["q_gram"]]))
    assert found["stage"] == "solved"
    assert layer["qk"]["condition"] == pytest.approx((values[:, -1] / values[:, 0]).max().item(), rel=1e-6)
    assert layer["qk"]["effective_rank"] == pytest.approx(effective_rank(values[:2]).mean().item(), rel=1e-3)
    outputs = torch.linalg.eigvalsh(unpack_upper(sums["o_gram"], 64).double())
    assert layer["ov"]["condition"] == pytest.approx((outputs[-1] / outputs[0]).item(), rel=1e-6)
    assert layer["mlp"]["tokens_per_dimension"] == 96 / 96
    assert layer["ov"]["tokens_per_dimension"] == 96 / (4 * 16)
    for component in ("qk", "ov", "mlp"):
        assert layer[component]["size"] == solution["sizes"][1][component]
        assert 0 < layer[component]["energy_kept"] <= 1
    total = sum(each[c]["predicted_loss"] for each in found["layers"] for c in ("qk", "ov", "mlp"))
    assert total == pytest.approx(sum(solution["predicted_loss"].values()), rel=1e-4)
    assert layer["mlp"]["bytes"] == {"before": 3 * 96 * 48 * 4, "after": 3 * layer["mlp"]["size"] * 48 * 4}


def test_energy_of_nothing_kept_bounds_every_curve(a3, work):
    """In every method, keeping nothing loses at least as much as keeping something."""
    for method in ("best", "paper"):
        options = ("--budget", 0.25, "--head-multiple", 2, "--mlp-multiple", 8, "--method", method, "--overwrite")
        solution = a3("solve", *options, "--work", work, "--json").json
        for layer in solution["per_layer"]:
            for component, curve in layer["curves"].items():
                assert max(curve["loss"]) <= layer["energy"][component] * (1 + 1e-5)


def test_an_export_says_the_same_without_the_work_folder(a3, work, tmp_path):
    assert a3("export", tmp_path / "out", "--work", work).code == 0
    of_work = a3("inspect", work, "--json").json
    shutil.rmtree(work)
    found = a3("inspect", tmp_path / "out", "--json").json
    assert (found["kind"], found["stage"]) == ("export", "exported")
    for one, other in zip(found["layers"], of_work["layers"], strict=True):
        for component in ("qk", "ov", "mlp"):
            for key in ("size", "predicted_loss", "energy_kept", "effective_rank", "bytes", "damping"):
                assert one[component][key] == other[component][key]


def test_tables_and_warnings_for_people(a3, work):
    outcome = a3("inspect", work)
    assert outcome.code == 0
    for word in ("predicted loss", "energy kept", "tokens per dim", "most frequent tokens", "fewer than 10", "MLP"):
        assert word in outcome.stdout
    assert "1.0 tokens for each of the 96 dimensions" in outcome.stdout


def test_copied_text_is_seen(a3, checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    lines = [f"{number} squared is {number * number}\n" for number in range(99)]
    text.write_text("".join(lines) * 3)
    model = checkpoint("llama-gqa")
    options = ("--samples", 60, "--seq-len", 64, "--work", tmp_path / "work")
    assert a3("calibrate", model, "--dataset", text, *options).code == 0
    found = a3("inspect", tmp_path / "work", "--json").json
    assert any("calibration blocks repeat another" in warning for warning in found["warnings"])
    assert found["text"]["repeated_ngrams"] > 0.5
    assert found["text"]["characters"]["digits"] > 0.2
    assert found["text"]["bytes_per_token"] == pytest.approx(1, abs=0.02)


def test_blocks_that_overlap():
    blocks = torch.randint(0, 5000, (12, 100), generator=torch.Generator().manual_seed(0))
    assert describe_blocks(blocks).overlapping_blocks == []
    assert describe_blocks(blocks).repeated_ngrams == 0
    blocks[5] = blocks[2]
    blocks[9, :80] = blocks[3, 20:]
    blocks[7, :40] = blocks[3, 20:60]  # less than half
    share = (80 - NGRAM + 1) / (100 - NGRAM + 1)
    assert [each.plain() for each in describe_blocks(blocks).overlapping_blocks] == [
        {"block": 5, "of": 2, "share": 1.0},
        {"block": 9, "of": 3, "share": pytest.approx(share)},
    ]
    assert describe_blocks(torch.ones(3, 8, dtype=torch.int64)).distinct_tokens == 1


def test_spectrum_of_singular_statistics():
    x = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = spectrum_health(x.mT @ x)
    assert whole.singular == 0
    assert 1 < whole.condition < 100
    x[1, :, 3] = x[1, :, 2]
    x[1, :, 5] = 0
    assert spectrum_health(x.mT @ x).singular == 2
    assert spectrum_health(x.mT @ x).condition is None


def test_layers_in_words():
    assert name_layers([3]) == "layer 3"
    assert name_layers([0, 1, 2, 5, 7, 8]) == "layers 0–2, 5, 7–8"


def test_neither_work_folder_nor_export(a3, tmp_path, checkpoint):
    refused(a3("inspect", tmp_path), str(tmp_path), "neither")
    refused(a3("inspect", checkpoint("llama-gqa")), "neither")


def test_without_the_source(a3, work, source, tmp_path):
    shutil.rmtree(source)
    found = a3("inspect", work, "--json").json
    assert found["layers"][0]["mlp"]["bytes"] == {"before": None, "after": None}
    assert "bytes_per_token" not in found["text"]
    assert any("the source was not found" in warning for warning in found["warnings"])
    assert a3("inspect", work).code == 0


def test_a_solution_of_an_earlier_calibration_is_not_shown(a3, work, source, text_file):
    solution = {path.name: path.read_bytes() for path in (work / "solution").iterdir()}
    assert a3("calibrate", source, "--dataset", text_file, *SHORT, "--seed", 5, "--overwrite", "--work", work).code == 0
    (work / "solution").mkdir()
    for name, data in solution.items():
        (work / "solution" / name).write_bytes(data)
    found = a3("inspect", work, "--json").json
    assert (found["stage"], found["solution"]) == ("calibrated", None)
    assert any("another calibration" in warning for warning in found["warnings"])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (None, "num_attention_heads"),
        ({"num_attention_heads": "four"}, "num_attention_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"hidden_size": [48]}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_an_export_with_a_damaged_configuration(change, key, a3, work, tmp_path):
    assert a3("export", tmp_path / "out", "--work", work).code == 0
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({} if change is None else config | change))
    refused(a3("inspect", tmp_path / "out"), "config.json", key)


@pytest.mark.parametrize(
    ("name", "component"), [("k_gram", "QK"), ("o_gram", "OV"), ("mlp_gram", "MLP"), ("mlp_energy", "MLP")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite(name, component, value, a3, work):
    put_in_statistics(work, name, value)
    refused(a3("inspect", work), "layer 1", component, name, "NaN")


def test_a_source_json_of_another_model_or_altered(a3, work, checkpoint, text_file, tmp_path):
    other = checkpoint("llama-gqa", seed=5)
    assert a3("calibrate", other, "--dataset", text_file, *SHORT, "--work", tmp_path / "other").code == 0
    shutil.copy(tmp_path / "other" / "source.json", work)
    refused(a3("inspect", work), "source.json", str(other), "another model", "a3 calibrate")
    altered = json.loads((work / "source.json").read_text()) | {"model": "elsewhere"}
    (work / "source.json").write_text(json.dumps(altered))
    refused(a3("inspect", work), "source.json", "altered", "a3 calibrate")
